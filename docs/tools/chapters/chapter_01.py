"""Results and figures of chapter 1, one command."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import style
from style import COLORS

from chapters import ROOT, Figure, Values, command, demonstration, lab, own, reference

TRAIN = "python -m nanochat_native.train --recipe october --diagnose --run d4"
COLUMNS = ("loss", "bpb", "grad_norm", "lr_multiplier", "momentum", "seconds")
LAST = 20  # steps of the mean at the end of the training curve


# --- results ---


def train_d4() -> Values:
    """Train d4 in a temporary folder, in two to three minutes, and reduce its log."""
    with tempfile.TemporaryDirectory() as folder:
        line = f"{TRAIN} --out-dir {shlex.quote(folder)}"
        words = [sys.executable, *shlex.split(line)[1:]]
        finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        return reduce_run(Path(folder) / "d4", finished.stdout.replace(f"{folder}/", "runs/"))


def reduce_run(run: Path, output: str) -> Values:
    """Return what the guide cites of a run and its printed output."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "val", "sample", "diagnosis")}
    config = json.loads((run / "config.json").read_text())["config"]
    done = re.search(r"^done     step \d+ of \d+ \| (?:(\d+) min )?(\d+) s", output, re.M)
    peak = re.search(r"^peak +([\d.]+)([GT])FLOP", output, re.M)
    assert done is not None
    assert peak is not None
    total = 60 * int(done[1] or 0) + int(done[2])
    tokens = config["num_iterations"] * config["total_batch_size"]
    train = {name: [record[name] for record in of["train"]] for name in COLUMNS}
    typical = median(train["seconds"])
    model, parameters = sizes(run)
    return {
        "config": {name: value for name, value in config.items() if name != "cache_dir"},
        "model": model,
        "parameters": parameters,
        "data": data_sizes(config) | {"tokens_read": tokens},
        "steps": config["num_iterations"],
        "tokens_per_step": config["total_batch_size"],
        "train": train,
        "last": {name: sum(train[name][-LAST:]) / LAST for name in ("loss", "bpb")},
        "validation": [{name: record[name] for name in ("step", "loss", "bpb")} for record in of["val"]],
        "first": {name: of["val"][0][name] for name in ("loss", "bpb")} | {"train_bpb": train["bpb"][0]},
        "final": {name: of["val"][-1][name] for name in ("loss", "bpb")},
        "samples": [{name: record[name] for name in ("step", "prompt", "text")} for record in of["sample"]],
        "seconds": {"total": total, "steps": sum(train["seconds"]), "median_step": typical},
        "tokens_per_second": {"run": tokens / total, "median_step": config["total_batch_size"] / typical},
        "peak_flops": float(peak[1]) * {"G": 1e9, "T": 1e12}[peak[2]],
        "diagnosis": diagnosis(of["diagnosis"]),
        "files": {
            re.sub(r"\W", "_", path.name): path.stat().st_size
            for path in sorted(run.rglob("*"))
            if path.is_file() and "tfevents" not in path.name
        },
        "output": output,
    }


def diagnosis(records: Sequence[Values]) -> Values:
    """Return the records of --diagnose as lists by quantity and part of the model: gradient_norm.h_0, for example."""
    found: Values = {"step": [record["step"] for record in records]}
    for name in records[0]:
        quantity, separator, part = name.partition("/")
        if separator:
            found.setdefault(quantity, {})[re.sub(r"\W", "_", part)] = [record[name] for record in records]
    return found


def sizes(run: Path) -> tuple[Values, Values]:
    """Return the shape of a run's model, and the numbers of its parameters."""
    import torch

    from nanochat_native.model import GPT, GPTConfig

    meta = json.loads((sorted((run / "checkpoints").iterdir())[-1] / "meta.json").read_text())
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    wte, head, total = counts["transformer.wte.weight"], counts["lm_head.weight"], sum(counts.values())
    shape = meta["model_config"] | {"flops_per_token": model.estimate_flops()}
    parameters = {"total": total, "wte": wte, "lm_head": head, "matrices": total - wte - head}
    return shape, parameters | {"number_of_matrices": len(counts) - 2}


def data_sizes(config: Values) -> Values:
    """Return the sizes of the built-in data."""
    from nanochat_native.data import prepare

    corpus = prepare(None, vocab_size=config["vocab_size"], cache_dir=config["cache_dir"])
    tokens = config["num_iterations"] * config["total_batch_size"]
    return {
        "description": corpus.description,
        "bytes_per_token": corpus.bytes_per_token,
        "training_tokens": len(corpus.train),
        "validation_tokens": len(corpus.val),
        "epochs": tokens / len(corpus.train),
    }


def measured(output: str) -> Values:
    """Return the numbers that `evaluate` prints."""
    bpb, nats, tokens, size = (
        float(text.replace(",", ""))
        for text in re.findall(r"([\d.,]+) (?:bits per byte|nats per token|tokens|bytes)", output)
    )
    return {"bpb": bpb, "loss": nats, "tokens": int(tokens), "bytes": int(size)}


def two_depths(result: Values) -> Values:
    """Return the rows of exercise 1.5 by case, and by how much three layers are better with each seed."""
    final = {(run["case"], run["seed"]): run["curve"][-1]["value"] for run in result["runs"]}
    seeds = sorted({seed for _, seed in final})
    found = {row["case"]: {name: row[name] for name in ("value", "spread")} for row in result["rows"]}
    return found | {"difference": [final["two", seed] - final["three", seed] for seed in seeds]}


RESULTS = {
    "train_d4": own(TRAIN, train_d4),
    "evaluate_d4": command("evaluate --checkpoint runs/d4", keep=measured),
    "generate_d4": command(
        "generate --checkpoint runs/d4 --prompt 'def read(self' --temperature 0.6 --seed 2 --max-tokens 90"
    ),
    "exercise_1_5": lab(
        'compare --recipe october --cases "two: --depth 2" "three: --depth 3" --rates 1 --seeds 2', keep=two_depths
    ),
    "surprise": demonstration("surprise", trained=True),
    "frequency_baselines": demonstration("frequency-baselines", trained=True),
}


# --- figures ---

LOGGED_STEP = 217  # the step whose line is explained
FIELDS = (  # of that line, in its order: a color, and what it means in three lines
    ("black", "how far the run is", "", ""),
    ("blue", "nats a token:", "mean over the", "2,048 targets"),
    ("blue", "the same loss in", "bits per byte", "of text"),
    ("blue", "length of the", "gradient, before", "clipping to 1"),
    ("green", "factor on all", "learning rates", "(schedule)"),
    ("green", "momentum of", "Muon, which rises", "in 300 steps"),
    ("orange", "time of the step", "", ""),
    ("orange", "tokens of the step", "by its time", ""),
    ("orange", "FLOP/s, as a share", "of torch's fastest", "product here"),
    ("purple", "largest use by the", "process, and what", "the machine has"),
    ("purple", "share of the time", "spent waiting", "for data"),
    ("black", "time to the end", "at recent speed", ""),
)


def draw_log_line(train: Values) -> Any:
    """Draw the fields of one line of the log with their meanings."""
    line = next(text for text in train["output"].splitlines() if text.startswith(f"step {LOGGED_STEP}/"))
    fields = line.split(" | ")
    assert len(fields) == len(FIELDS)
    figure, axes = style.new_diagram(7.0, 2.1)
    columns, width = 6, 1.145
    for number, (field, (color, *meaning)) in enumerate(zip(fields, FIELDS, strict=True)):
        row, column = divmod(number, columns)
        x, y = 0.07 + column * width, 1.73 - row * 1.08
        tint = COLORS[color] + "18"
        style.box(axes, x, y, width - 0.08, 0.32, facecolor=tint, edgecolor=COLORS[color])
        text = field.replace(" 60%", "")
        axes.text(
            x + (width - 0.08) / 2, y + 0.15, text, ha="center", va="center", fontsize=8, family="DejaVu Sans Mono"
        )
        for place, words in enumerate(meaning):
            axes.text(x + 0.03, y - 0.13 - 0.165 * place, words, fontsize=8, va="center", color=COLORS["black"])
    return figure


def draw_surprise(surprise: Values) -> Any:
    """Draw a text with each token on a ground that is darker the more bits it cost."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("surprise", ["#ffffff", "#cfe4f2", COLORS["sky"], COLORS["blue"]])
    figure, axes = style.new_diagram(7.0, 2.4)
    letter, line_height = 0.0965, 0.235
    left, most = 0.2, 12.0
    x, y = left, 2.18
    for token, bits in zip(surprise["tokens"], surprise["bits"], strict=True):
        color = colors(min(bits, most) / most)
        text_color = "white" if bits > 0.72 * most else COLORS["black"]
        for number, part in enumerate(re.split(r"(\n)", token)):
            if part == "\n":
                x, y = left, y - line_height
                continue
            width = letter * len(part)
            if part and (part.strip() or number == 0):
                _rectangle(axes, x, y - 0.1, width, line_height - 0.03, facecolor=color, edgecolor="#ffffff")
            for place, character in enumerate(part):
                if character.strip():
                    axes.text(
                        x + letter * (place + 0.5),
                        y,
                        character,
                        family="DejaVu Sans Mono",
                        fontsize=10.8,
                        ha="center",
                        va="center_baseline",
                        color=text_color,
                    )
            x += width
    axes.text(5.2, 2.18, "bits that a token cost", fontsize=8.5, va="center")
    for place, bits in enumerate((0, 2, 4, 6, 8, 10, 12)):
        low = 1.83 - 0.2 * place
        _rectangle(axes, 5.2, low, 0.5, 0.2, facecolor=colors(bits / most), edgecolor="#999999")
        words = f"{bits}" if bits < most else "12 +"
        axes.text(5.45, low + 0.1, words, fontsize=8, ha="center", va="center", color="white" if bits > 8 else "black")
    per_byte = f"{surprise['bits_per_byte']:.2f} bits per byte"
    note = f"{surprise['total_bits']:.0f} bits for {surprise['bytes']} bytes:\n{per_byte}"
    axes.text(5.2, 0.32, note, fontsize=8.5, va="center")
    return figure


def _rectangle(axes: Any, x: float, y: float, width: float, height: float, **look: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, **({"linewidth": 0.6} | look)))


def draw_loss(train: Values, tables: Values) -> Any:
    """Draw the loss of the run with five things to see, and the levels of three tables of frequencies."""
    figure, axes = style.new_figure(7.0, 3.9)
    steps = range(1, train["steps"] + 1)
    axes.plot(steps, train["train"]["bpb"], color=COLORS["sky"], linewidth=0.8)
    validation = train["validation"]
    axes.plot(
        [v["step"] for v in validation], [v["bpb"] for v in validation], color=COLORS["blue"], marker="o", markersize=4
    )
    last = train["steps"]
    names = {"uniform": "all tokens alike", "frequencies": "frequencies of tokens", "pairs": "frequencies of pairs"}
    for name, words in names.items():
        level = tables[name]["bits_per_byte"]
        axes.plot([0, last], [level, level], color=COLORS["gray"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{words}  {level:.2f}",
            (last, level),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#555555",
        )
    warmdown = last * (1 - train["config"]["warmdown_ratio"])
    axes.axvspan(warmdown, last, color=COLORS["yellow"], alpha=0.12, linewidth=0)
    axes.text(warmdown + 3, 3.08, "rates fall to 0", fontsize=8, color="#8a6200")
    marks = (
        ("1", (4, train["first"]["train_bpb"]), (22, 3.1)),
        ("2", (12, 2.38), (36, 2.47)),
        ("3", (64, train["train"]["bpb"][63]), (84, 2.36)),
        ("4", (216, (validation[3]["bpb"] + 1.66) / 2), (238, 2.1)),
        ("5", (330, 1.63), (318, 1.3)),
    )
    for text, target, place in marks:
        axes.annotate(
            text,
            target,
            place,
            fontsize=9,
            fontweight="bold",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": COLORS["black"], "linewidth": 0.7, "shrinkB": 2},
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": COLORS["black"], "linewidth": 0.8},
        )
    axes.annotate("validation", (144, validation[2]["bpb"]), (150, 2.02), fontsize=8.5, color=COLORS["blue"])
    axes.text(112, 1.44, "training, each step", fontsize=8.5, color=COLORS["sky"])
    axes.set(xlabel="step", ylabel="loss (bits per byte)", xlim=(-6, last + 4), ylim=(1.2, 3.4))
    return figure


HOUSE = {  # package: (what it is, chapters that explain it, place: inches from the left, row from below)
    "ops": ("operators and kernels", "6, 7, 12", (3.6, 0)),
    "runtime": ("ranks, devices, console", "11", (1.2, 1)),
    "model": ("the transformer", "4, 5", (3.2, 1)),
    "data": ("tokens and batches", "3, 8", (1.2, 2)),
    "runs": ("a run on disk", "1, 8", (1.6, 3)),
    "inference": ("sampling, serving", "13", (3.9, 3)),
    "evaluation": ("bits per byte, CORE", "13", (1.2, 4)),
    "interop": ("other formats", "13", (3.9, 4)),
    "optim": ("Muon, AdamW", "9, 10", (6.0, 4)),
    "training": ("the loop", "8", (2.2, 5)),
    "bench": ("timings", "12", (5.0, 5)),
    "lab": ("experiments", "9, 10, 11", (2.2, 6)),
}
ROW = 0.62  # inches


def draw_house() -> Any:
    """Draw the packages by the table of tests/test_layering.py, each above what it may depend on."""
    allowed = _dependencies()
    rows = 1 + max(row for _, _, (_, row) in HOUSE.values())
    figure, axes = style.new_diagram(7.0, ROW * (rows + 1) - 0.1)
    wide, high = 1.66, 0.4
    place = {name: (x, 0.24 + ROW * row) for name, (_, _, (x, row)) in HOUSE.items()}
    for name, others in allowed.items():
        for other in others:
            assert place[name][1] > place[other][1], f"{name} must stand above {other}"
            if not any(other in allowed[via] for via in others):
                (x1, y1), (x2, y2) = place[name], place[other]
                shift = max(-0.55, min(0.55, 0.3 * (x2 - x1)))
                start, end = (x1 + shift, y1 - high / 2), (x2 - shift, y2 + high / 2)
                style.arrow(axes, start, end, color="#8f8f8f", linewidth=0.8, mutation_scale=7)
    for name, (x, y) in place.items():
        what, numbers, _ = HOUSE[name]
        style.box(axes, x - wide / 2, y - high / 2, wide, high, facecolor="#eef4fa", edgecolor=COLORS["blue"])
        axes.text(x - wide / 2 + 0.07, y + 0.09, name, fontsize=8.5, fontweight="bold", va="center")
        axes.text(x + wide / 2 - 0.07, y + 0.09, numbers, fontsize=8, va="center", ha="right", color=COLORS["orange"])
        axes.text(x - wide / 2 + 0.07, y - 0.1, what, fontsize=8, va="center")
    top = 0.24 + ROW * rows
    style.box(axes, 0.15, top - high / 2, 6.7, high, facecolor="#fff6e8", edgecolor=COLORS["yellow"])
    words = "commands: train  generate  evaluate  finetune  chat  serve  compare  lr_find  memory  bench ..."
    axes.text(3.5, top, words, fontsize=8.3, ha="center", va="center")
    return figure


def _dependencies() -> dict[str, list[str]]:
    """Return what each package may depend on, from the table of the test, without the packages of the guide itself."""
    tree = ast.parse((ROOT / "tests/test_layering.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MAY_DEPEND_ON":
            table: dict[str, str] = ast.literal_eval(node.value)
            return {name: others.split() for name, others in table.items() if name in HOUSE}
    raise ValueError("tests/test_layering.py has no MAY_DEPEND_ON")


FIGURES = {
    "01-log-line": Figure(draw_log_line, "train_d4"),
    "01-surprise": Figure(draw_surprise, "surprise"),
    "01-loss": Figure(draw_loss, "train_d4", "frequency_baselines"),
    "01-house": Figure(draw_house),
}
REFERENCES = {"2204.02311": reference("Chowdhery et al.", "PaLM: Scaling Language Modeling with Pathways", 2022)}
