"""Draws all pictures, from files only: the loss and the diagnosis of a run, and the result of an experiment.

`python -m nanochat_native.plot FOLDER` draws the pictures of a folder again.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_native.runs import metrics_log
from nanochat_native.runs.metrics_log import value_of
from nanochat_native.runtime.files import write_atomically

RESULT = "result.json"
MISSING = "none: matplotlib is not installed"


def new_figure(width: float = 8, height: float = 4.5) -> Any:
    """Return a figure that needs no screen, or None if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, replacing the file atomically, and return its path."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def plot_loss(run_dir: Path) -> Path | None:
    """Draw training and validation bits per byte over the steps in `run_dir`/loss.png, with the scores of CORE and of
    chat tasks if there are any, on an axis of their own.

    If the bytes of tokens are not known, draw the loss in nats instead; for a run of reinforce, the reward. Return the
    path of the picture, or None if matplotlib is not installed.
    """
    figure = new_figure()
    if figure is None:
        return None
    records = list(metrics_log.read(run_dir / "metrics.jsonl"))
    in_bits = any(value_of(r, "bpb") is not None for r in records)
    value, label = ("bpb", "bits per byte") if in_bits else ("loss", "nats a token")
    if any(value_of(r, "reward") is not None for r in records):
        value, label = "reward", "mean reward"
    axes = figure.add_subplot()
    for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.8}), ("val", {"marker": "o", "markersize": 3})):
        points = [(r["step"], y) for r in records if r["kind"] == kind and (y := value_of(r, value)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set(title=run_dir.name, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    right = None
    for kind, title, colour in (("core", "CORE", "tab:green"), ("chat", "chat tasks", "tab:purple")):
        scores = [(r["step"], y) for r in records if r["kind"] == kind and (y := value_of(r, "score")) is not None]
        if scores:
            right = right or axes.twinx()
            handles += right.plot(*zip(*scores, strict=True), color=colour, marker="s", markersize=3)
            labels.append(title)
    if right is not None:
        right.set_ylabel(f"score: {' and '.join(label for label in labels if label in ('CORE', 'chat tasks'))}")
    if handles:
        axes.legend(handles, labels)
    return save(figure, run_dir / "loss.png")


def plot_diagnosis(run_dir: Path) -> Path | None:
    """Draw the records of train --diagnose in `run_dir`/diagnosis.png: one panel per quantity, one line per layer.

    Return the path of the picture, or None if there are no records or matplotlib is not installed.
    """
    records = [r for r in metrics_log.read(run_dir / "metrics.jsonl") if r["kind"] == "diagnosis"]
    figure = new_figure(15, 8.5) if records else None
    if figure is None:
        return None
    quantities = list(dict.fromkeys(key.partition("/")[0] for r in records for key in r if "/" in key))
    panels = figure.subplots(2, -(-len(quantities) // 2), squeeze=False).flat
    for axes, quantity in zip(panels, quantities, strict=False):
        keys = list(dict.fromkeys(key for r in records for key in r if key.partition("/")[0] == quantity))
        layers = [key for key in keys if key.partition("/")[2].startswith("h.")]
        for key in keys:
            points = [(r["step"], y) for r in records if (y := value_of(r, key)) is not None]
            if not points:
                continue
            shade = layers.index(key) / max(1, len(layers) - 1) if key in layers else 0.0
            style: dict[str, Any] = {"color": (0.9 * shade, 0.25, 1 - 0.9 * shade), "linewidth": 1}
            if key not in layers:
                style = {"color": "black", "linestyle": "--" if "wte" in key else ":", "linewidth": 1.5}
            few = len(layers) <= 8 or key in (layers[0], layers[-1]) or key not in layers
            axes.plot(*zip(*points, strict=True), marker=".", label=key.partition("/")[2] if few else None, **style)
        axes.set(title=quantity.replace("_", " "), xlabel="step")
        values = [y for r in records for key in keys if (y := value_of(r, key))]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    figure.suptitle(f"{run_dir.name}: blue the first layer, red the last")
    return save(figure, run_dir / "diagnosis.png")


def draw(folder: Path) -> Path | None:
    """Draw the picture of a result.json beside it. Return its path, or None if matplotlib is not installed.

    Raises FileNotFoundError if there is no result, and ValueError for one that this version cannot draw.
    """
    try:
        record = json.loads((folder / RESULT).read_bytes())
        command = str(record["command"])
        if command in DRAW_BY_COMMAND:
            figure = new_figure()
            if figure is None:
                return None
            DRAW_BY_COMMAND[command](figure, record)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{folder / RESULT} cannot be drawn: it is damaged, or of another version") from None
    if command not in DRAW_BY_COMMAND:
        commands = ", ".join(DRAW_BY_COMMAND)
        raise ValueError(f"{folder / RESULT} cannot be drawn: its command must be one of {commands}, got {command!r}")
    return save(figure, folder / f"{command}.png")


def draw_lr_find(figure: Any, record: dict[str, Any]) -> None:
    """Draw the loss over the learning rate, one panel per test, with the suggested rate."""
    tests = record["tests"]
    figure.set_size_inches(6.5 * len(tests), 4.5)
    panels = figure.subplots(1, max(1, len(tests)), squeeze=False)[0]
    for axes, test in zip(panels, tests, strict=False):
        axes.plot(test["factors"], test["losses"], linewidth=0.8, alpha=0.5, color="tab:blue", label="loss")
        axes.plot(test["factors"][: len(test["smoothed"])], test["smoothed"], color="tab:blue", label="smoothed")
        for name, marker, color in (("steepest", "o", "tab:green"), ("lowest", "v", "tab:red")):
            if test[name] is not None:
                point = (test[name], test["smoothed"][test["factors"].index(test[name])])
                axes.plot(*point, marker, color=color, label=f"{name} x{test[name]:.3g}")
        if test["suggestion"] is not None:
            axes.axvline(
                test["suggestion"], color="black", linestyle="--", label=f"suggestion x{test['suggestion']:.3g}"
            )
        label = "all rates" if test["group"] == "all" else f"rate of the {test['group']}"
        axes.set(
            xscale="log", xlabel=f"{label}, factor of the rate of a run", ylabel="loss after the step, nats a token"
        )
        axes.set_title(f"{record['config']['optimizer']}, d{record['config']['depth']}")
        if test["losses"]:
            top, low = max(test["losses"][0], min(test["losses"])), min(test["losses"])
            axes.set_ylim(low - 0.05 * (top - low), top + 0.25 * (top - low))
        axes.grid(alpha=0.3)
        axes.legend()


def draw_batch_size(figure: Any, record: dict[str, Any]) -> None:
    """Draw the noise scale during the run, and the cost of a batch size in steps and in tokens."""
    figure.set_size_inches(12, 4.5)
    left, right = figure.subplots(1, 2)
    length, batch = record["sequence_len"], record["config"]["total_batch_size"]
    for part in record["noise"]:
        points = [(p["step"], p[part] * length) for p in record["series"] if p[part]]
        if points:
            left.plot(*zip(*points, strict=True), marker=".", label=part, linewidth=2 if part == "all" else 1)
    left.axhline(batch, color="black", linestyle="--", label=f"--total-batch-size {batch:,}")
    left.set(yscale="log", xlabel="step", ylabel="noise scale, tokens", title="gradient noise scale during the run")
    scale = record["noise"].get("all", {}).get("scale")
    if scale:
        tokens = scale * length
        sizes = [tokens * 2 ** (i / 4) for i in range(-20, 21)]
        right.plot(sizes, [1 + tokens / size for size in sizes], label="steps, relative to the minimum")
        right.plot(sizes, [1 + size / tokens for size in sizes], label="tokens, relative to the minimum")
        right.axvline(batch, color="black", linestyle="--", label=f"--total-batch-size {batch:,}")
        right.axvline(tokens, color="gray", linestyle=":", label=f"noise scale {tokens:,.0f}")
        right.set(xscale="log", yscale="log", xlabel="batch, tokens", title="cost of reaching the same loss")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()


def draw_compare(figure: Any, record: dict[str, Any]) -> None:
    """Draw the validation curves of the cases at their best rates, as mean and range over the seeds, and the search for
    these rates."""
    figure.set_size_inches(13, 5.5)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    seen = []
    for number, row in enumerate(record["rows"]):
        runs = [run for run in record["runs"] if run["case"] == row["case"]]
        best = [run for run in runs if run["factor"] == row["factor"]]
        name = f"{row['case']} x{row['factor']:.3g}"
        steps = sorted(set.intersection(*({p["step"] for p in run["curve"] if p["value"] is not None} for run in best)))
        values = [[p["value"] for run in best for p in run["curve"] if p["step"] == step] for step in steps]
        color = f"C{number % 10}"
        left.plot(steps, [sum(v) / len(v) for v in values], color=color, marker=".", label=name)
        left.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2)
        seen += [value for step, v in zip(steps, values, strict=True) if step for value in v]
        first = min((run["seed"] for run in runs), default=0)
        search = sorted(
            (run["factor"], run["curve"][-1]["value"])
            for run in runs
            if run["seed"] == first and not run["diverged"] and run["curve"][-1]["value"] is not None
        )
        if search:
            right.plot(*zip(*search, strict=True), color=color, marker="o", markersize=4, label=row["case"])
    if seen:
        margin = 0.03 * (max(seen) - min(seen))
        left.set_ylim(min(seen) - margin, max(seen))
        right.set_ylim(min(seen) - margin, max(seen))  # a rate that is far too high may end anywhere
    left.set(xlabel="step", ylabel=f"validation, {record['unit']}", title="each at its best rate")
    right.set(xscale="log", xlabel="factor of the rates", ylabel=f"final, {record['unit']}", title="search, first seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def draw_memory(figure: Any, record: dict[str, Any]) -> None:
    """Draw the memory of a step by phase and part, or of gradient checkpointing, or the largest batches that fit."""
    axes = figure.add_subplot()
    if "parts" in record:
        base = [0.0] * len(record["phases"])
        for name, sizes in record["parts"].items():
            heights = [size / 2**20 for size in sizes]
            if any(heights):
                axes.bar(record["phases"], heights, bottom=base, label=name, width=0.6)
            base = [a + b for a, b in zip(base, heights, strict=True)]
        if "measured" in record:
            measured = [size / 2**20 for size in record["measured"]]
            left, right = ([i + side for i in range(len(measured))] for side in (-0.35, 0.35))
            axes.hlines(measured, left, right, color="black", linewidth=2, label="measured")
        axes.set(ylabel="MiB at the peak of the phase", title="memory of a training step")
        axes.set_xlim(-0.6, len(base) + 0.4)
    elif "ms" in record:
        for i, name in enumerate(("peak_predicted", "peak_measured", "activations_predicted", "activations_measured")):
            places = [row + 0.2 * (i - 1.5) for row in range(2)]
            axes.bar(places, [size / 2**20 for size in record[name]], width=0.18, label=name.replace("_", ", "))
        labels = [f"{name}, {ms:.0f} ms a step" for name, ms in zip(record["rows"], record["ms"], strict=True)]
        axes.set_xticks(range(2), labels)
        axes.set(ylabel="MiB", title="gradient checkpointing")
    else:
        for i, count in enumerate((1, 2)):
            rows = [row for row in record["rows"] if row["micro_batches"] == count]
            label = "1 micro-batch a step" if count == 1 else "several"
            sizes = [row["device_batch_size"] for row in rows]
            axes.bar([j + 0.3 * (i - 0.5) for j in range(len(rows))], sizes, width=0.28, label=label)
        axes.set_xticks((0, 1), ("activations kept", "--grad-checkpoint"))
        axes.set(ylabel="largest --device-batch-size", title=f"{record['options']['gpu_memory']:g} GiB")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")


def draw_schedules(figure: Any, record: dict[str, Any]) -> None:
    """Draw the learning rate of every schedule, and Muon's momentum and the factor of its decay, over the steps."""
    figure.set_size_inches(12, 4.5)
    left, right = figure.subplots(1, 2)
    for shape, values in record["multipliers"].items():
        left.plot(values, label=shape)
    left.set(xlabel="step", ylabel="factor of the learning rate", title="--schedule")
    right.plot(record["momentum"], label="Muon's momentum")
    if "decay" in record:
        right.plot(record["decay"], label="factor of Muon's weight decay")
    right.set(xlabel="step", title="--momentum-start, --momentum-end, --momentum-final, --decay-schedule")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()


def draw_scaling(figure: Any, record: dict[str, Any]) -> None:
    """Draw the losses at each budget with their parabolas, the best sizes over the budgets, and the loss over FLOPs."""
    fits = record["fits"]
    budgets = fits.get("budgets", [])
    figure.set_size_inches(15 if budgets else 7, 4.8)
    panels = figure.subplots(1, 3 if budgets else 1, squeeze=False)[0]
    if budgets:
        _draw_budgets(panels[0], record["runs"], budgets, record["unit"])
        _draw_minima(panels[1], budgets, fits["size"])
    axes = panels[-1]
    series = [run for run in record["runs"] if run["study"] == "miniseries" and run["value"] is not None]
    inside = [row for row in budgets if "size" in row]
    points = [
        ([(run["flops"], run["value"]) for run in series], fits.get("miniseries"), "miniseries"),
        ([(row["budget"], row["loss"]) for row in inside], fits.get("loss"), "minima at the budgets"),
    ]
    for color, (found, law, name) in zip(("tab:blue", "tab:red"), points, strict=True):
        if found:
            axes.plot(*zip(*found, strict=True), "o", color=color, label=name)
            _draw_law(axes, law, [x for x, _ in found], color)
    for run in series:
        axes.annotate(f"d{run['depth']}", (run["flops"], run["value"]), textcoords="offset points", xytext=(5, 5))
    axes.set(xscale="log", xlabel="FLOP of the training", ylabel=f"final {record['unit']}", title="loss over compute")
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def _draw_budgets(axes: Any, runs: list[dict[str, Any]], budgets: list[dict[str, Any]], unit: str) -> None:
    """Draw the losses of isoflop over the size, a colour for each budget, with parabolas and their minima."""
    for number, row in enumerate(budgets):
        color = f"C{number % 10}"
        points = [(r["size"], r["value"]) for r in runs if r["budget"] == row["budget"] and r["value"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=color, label=f"{row['budget']:g} FLOP")
        if "coefficients" in row:
            c0, c1, c2 = row["coefficients"]
            low, high = map(math.log, row["sizes"])
            logs = [low + (high - low) * i / 60 for i in range(61)]
            losses = [c0 + c1 * (x - row["centre"]) + c2 * (x - row["centre"]) ** 2 for x in logs]
            axes.plot([math.exp(x) for x in logs], losses, color=color, linewidth=1)
        if "size" in row:
            axes.plot(row["size"], row["loss"], "*", color=color, markersize=13, markeredgecolor="black")
    axes.set(xscale="log", xlabel="parameters in matrices and lm_head", ylabel=f"final {unit}", title="equal FLOPs")


def _draw_minima(axes: Any, budgets: list[dict[str, Any]], law: dict[str, Any]) -> None:
    """Draw the best sizes with their intervals over the budgets. An arrow marks a minimum beyond the sizes."""
    for row in budgets:
        if "size" in row:
            axes.plot(row["budget"], row["size"], "o", color="tab:red")
            if row["interval"]:
                axes.plot([row["budget"]] * 2, row["interval"], color="tab:red", linewidth=1)
        elif row.get("where") in ("below", "above"):
            above = row["where"] == "above"
            axes.plot(row["budget"], row["sizes"][above], "^" if above else "v", color="gray", label="beyond the sizes")
    _draw_law(axes, law, [row["budget"] for row in budgets if "size" in row], "tab:red")
    axes.set(xscale="log", yscale="log", xlabel="budget, FLOP", ylabel="parameters", title="best size and its interval")


def _draw_law(axes: Any, law: dict[str, Any] | None, places: list[float], color: str) -> None:
    """Draw a power law between the smallest and the largest place, if it was fitted."""
    if law is None or "not_fitted" in law:
        return
    ends = [min(places), max(places)]
    xs = [ends[0] * (ends[1] / ends[0]) ** (i / 30) for i in range(31)]
    ys = [law["factor"] * x ** law["exponent"] for x in xs]
    axes.plot(xs, ys, color=color, linewidth=1, label=f"C^{law['exponent']:.3f}")


DRAW_BY_COMMAND: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "lr_find": draw_lr_find,
    "batch_size": draw_batch_size,
    "compare": draw_compare,
    "memory": draw_memory,
    "scaling": draw_scaling,
    "schedules": draw_schedules,
}
