"""The loss plot of a run, drawn from its metrics.jsonl."""

import importlib.util
from pathlib import Path

from nanochat_native import metrics


def plot_loss(run_dir: Path) -> Path | None:
    """Draw training and validation bits per byte over steps into `run_dir`/loss.png, replacing it atomically.

    Where the bytes of a token are not known, the loss in nats takes their place.

    Returns its path, or None when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(metrics.read(run_dir / "metrics.jsonl"))
    in_bits = any(r.get("bpb") is not None for r in records)
    value, label = ("bpb", "bits per byte") if in_bits else ("loss", "nats a token")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.8}), ("val", {"marker": "o", "markersize": 3})):
        points = [(r["step"], r[value]) for r in records if r["kind"] == kind and r[value] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set(title=run_dir.name, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path = run_dir / "loss.png"
    temporary = run_dir / "loss.tmp.png"
    FigureCanvasAgg(figure)
    figure.savefig(temporary)
    temporary.replace(path)
    return path
