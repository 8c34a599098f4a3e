"""Results and figures of chapter 10, rates, schedules, batches."""

from __future__ import annotations

import math
import re
from typing import Any

import style

from chapters import Figure, Values, demonstration, lab, reference
from nanochat_native.lab import noise_scale

SIZE = "--depth 2 --vocab-size 1024 --max-seq-len 128 --total-batch-size 1024 --eval-tokens 16384 --num-iterations 240"


def key(name: str) -> str:
    """Return a case's name as a key of a results file."""
    slug = re.sub(r"\W+", "_", name).strip("_")
    return f"case_{slug}" if slug[0].isdigit() else slug


def keep_comparison(record: Values) -> Values:
    """Return the table of a comparison, the search for the rates, and the curves at the best rates."""
    found: Values = {"seeds": record["options"]["seeds"], "unit": record["unit"]}
    for row in record["rows"]:
        runs = [run for run in record["runs"] if run["case"] == row["case"]]
        first = min(run["seed"] for run in runs)
        best = [run for run in runs if run["factor"] == row["factor"]]
        curves = [[point["value"] for point in run["curve"]] for run in best]
        found[key(row["case"])] = {
            "name": row["case"],
            "factor": row["factor"],
            "value": row["value"],
            "spread": row["spread"],
            "finals": [curve[-1] for curve in curves],
            "searched": sorted(
                [run["factor"], run["curve"][-1]["value"]] for run in runs if run["seed"] == first and run["curve"]
            ),
            "steps": [point["step"] for point in best[0]["curve"]],
            "curve": [sum(values) / len(values) for values in zip(*curves, strict=True)],
        }
    return found


def keep_range_test(record: Values) -> Values:
    found: Values = {}
    for test in record["tests"]:
        names = ("factors", "smoothed", "steepest", "lowest", "suggestion", "diverged")
        found[test["group"]] = {name: test[name] for name in names}
    return found


def keep_noise(record: Values) -> Values:
    length = record["sequence_len"]
    tokens = {
        part: {name: None if value is None else value * length for name, value in noise.items()}
        for part, noise in record["noise"].items()
    }
    sizes = {name: record[name] for name in ("small_batch", "large_batch")}
    firsts = range(0, len(record["steps"]) - 9, 10)  # the first steps too, which the command does not count
    points = [noise_scale.noise_by_part(record["steps"][first : first + 10], **sizes) for first in firsts]
    series = {
        part: [None if point[part].scale is None else point[part].scale * length for point in points]
        for part in record["noise"]
    }
    return {
        "batch": record["large_batch"] * length,
        "tokens": tokens,
        "steps": [first + 5 for first in firsts],
        "series": series,
        "steps_at_256": 1 + tokens["all"]["scale"] / 256,
        "steps_at_1024": 1 + tokens["all"]["scale"] / 1024,
        "steps_at_4096": 1 + tokens["all"]["scale"] / 4096,
        "tokens_at_256": 1 + 256 / tokens["all"]["scale"],
        "tokens_at_1024": 1 + 1024 / tokens["all"]["scale"],
        "tokens_at_4096": 1 + 4096 / tokens["all"]["scale"],
    }


RESULTS = {
    "clip_ranks": demonstration("clip-ranks"),
    "first_step": demonstration("first-step"),
    "gradient_scale": demonstration("gradient-scale"),
    "noise_floor": demonstration("noise-floor"),
    "range_test": demonstration("range-test"),
    "schedule_shapes": demonstration("schedule-shapes"),
    "lr_find": lab(f"lr_find --recipe october --group each {SIZE}", keep=keep_range_test),
    "lr_find_all": lab(f"lr_find --recipe october {SIZE}", keep=keep_range_test),
    "compare_rates": lab(f'compare --recipe october {SIZE} --cases "x1:" --rates 5 --seeds 2', keep=keep_comparison),
    "compare_schedules": lab(
        f'compare --recipe october {SIZE} --rates 1 --seeds 1 --cases "no warmdown: --warmdown-ratio 0" '
        '"warmdown 20%: --warmdown-ratio 0.2" "warmdown 65%: --warmdown-ratio 0.65" "warmup 10%: --warmup-ratio 0.1"',
        keep=keep_comparison,
    ),
    "compare_batches": lab(
        f'compare --recipe october {SIZE} --rates 1 --seeds 1 --cases "1024 tokens:" '
        '"4096 tokens: --total-batch-size 4096 --num-iterations 60" '
        '"256 tokens: --total-batch-size 256 --device-batch-size 2 --num-iterations 960" --eval-every 60',
        keep=keep_comparison,
    ),
    "fork_warmdown": lab(
        'compare --fork runs/d4 --fork-step 270 --cases "none: --warmdown-ratio 0" "20%: --warmdown-ratio 0.2"',
        keep=keep_comparison,
    ),
    "batch_size": lab(
        "batch_size --recipe october --depth 2 --vocab-size 1024 --max-seq-len 128 --total-batch-size 8192 "
        "--steps 150 --skip 30",
        keep=keep_noise,
    ),
}


def draw_range_test(each: Values, together: Values, whole: Values) -> Any:
    """Draw the range tests, and the final loss of whole runs with all rates multiplied by a factor."""
    figure, (left, right) = style.new_figure(7.0, 3.1, ncols=2, width_ratios=(5, 4))
    tests = {**together, **each}
    names = {"all": "all groups", "matrix": "matrix", "embedding": "embedding", "unembedding": "unembedding"}
    for number, (group, name) in enumerate(names.items()):
        test, color = tests[group], style.CYCLE[number]
        left.plot(test["factors"], test["smoothed"], color=color, label=name)
        at = min(range(len(test["factors"])), key=lambda i: abs(math.log(test["factors"][i] / test["suggestion"])))
        left.plot(test["factors"][at], test["smoothed"][at], marker="o", markersize=5, color=color)
        right.axvline(test["suggestion"], color=color, linestyle="--", linewidth=1)
    left.set(xscale="log", xlabel="factor of the default rate", ylabel="loss, nats a token", title="range tests")
    left.legend(loc="upper right")
    points = whole["x1"]["searched"]
    right.plot(*zip(*points, strict=True), color=style.COLORS["black"], marker="o", markersize=4)
    right.plot(
        *min(points, key=lambda point: point[1]),
        marker="o",
        markersize=9,
        markerfacecolor="none",
        color=style.COLORS["black"],
    )
    right.set(
        xscale="log", xlabel="factor of all default rates", ylabel="final bits per byte", title="whole runs, 240 steps"
    )
    return figure


def draw_schedules(found: Values) -> Any:
    """Draw the shapes of the schedule, and Muon's momentum as a horizon."""
    figure, (left, right) = style.new_figure(7.0, 2.8, ncols=2, width_ratios=(3, 2))
    labels = {"linear": (84, 0.44), "cosine": (74, 0.82), "step": (47, 0.44), "constant": (62, 1.04)}
    for number, (shape, curve) in enumerate(found["shapes"].items()):
        color = style.CYCLE[number]
        left.plot(range(found["steps"]), curve["values"], color=color)
        if shape in labels:
            left.text(*labels[shape], shape, color=color, fontsize=8.5)
        else:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": color}
            left.annotate(shape, (63.5, 0.82), xytext=(34, 0.68), fontsize=8.5, color=color, arrowprops=line)
    left.annotate("warmup", (5, 0.5), xytext=(14, 0.45), fontsize=8.5, arrowprops={"arrowstyle": "-", "linewidth": 0.6})
    left.annotate("", (60, 0.04), xytext=(100, 0.04), arrowprops={"arrowstyle": "<->", "linewidth": 0.6})
    left.text(62, 0.06, "warmdown", fontsize=8.5)
    left.set(xlabel="step of 100", ylabel="multiplier of the rates", ylim=(0, 1.15), xlim=(0, 100))
    steps = list(range(0, 501, 5))
    momentum = [0.85 + 0.10 * min(step / 300, 1) for step in steps]
    right.plot(steps, [1 / (1 - value) for value in momentum], color=style.COLORS["green"])
    right.set(xlabel="step", ylabel="steps that Muon averages over", ylim=(0, 22), xlim=(0, 500))
    right.text(25, 5.4, "momentum 0.85", fontsize=8.5)
    right.text(310, 18.2, "momentum 0.95", fontsize=8.5)
    return figure


def draw_warmdown(floor: Values, fork: Values) -> Any:
    """Draw the expected loss of a noisy quadratic under four schedules, and two continuations of d4."""
    figure, (left, right) = style.new_figure(7.0, 3.0, ncols=2)
    steps = range(0, floor["steps"] + 1, 4)
    for number, (name, curve) in enumerate(floor["curves"].items()):
        label = name if name.startswith("constant") else f"0.4, warmdown {name}"
        left.plot(steps, curve, color=style.CYCLE[number], label=label)
    left.set(
        ylim=(0.05, 0.5),
        xlabel="step",
        ylabel="expected loss",
        title="noisy quadratic, exact",
        xlim=(0, floor["steps"]),
    )
    left.legend(loc="upper right")
    for name, color in (("none", "orange"), ("case_20", "blue")):
        label = "no warmdown" if name == "none" else "warmdown of 20%"
        right.plot(
            fork[name]["steps"], fork[name]["curve"], color=style.COLORS[color], marker="o", markersize=3, label=label
        )
    right.axvline(286, color=style.COLORS["gray"], linestyle="--", linewidth=1)
    right.text(
        285,
        min(fork["case_20"]["curve"]),
        "warmdown begins ",
        fontsize=8.5,
        ha="right",
        rotation=90,
        va="bottom",
        color=style.COLORS["gray"],
    )
    right.set(xlabel="step of d4", ylabel="validation, bits per byte", title="d4, forked at step 270")
    right.legend(loc="lower left" if fork["none"]["curve"][-1] > fork["none"]["curve"][0] else "upper right")
    return figure


def draw_noise_scale(found: Values) -> Any:
    """Draw the noise scale of the parts of the model over a run."""
    figure, axes = style.new_figure(7.0, 2.9)
    for number, (part, values) in enumerate(found["series"].items()):
        points = [(s, v) for s, v in zip(found["steps"], values, strict=True) if v is not None and v > 0]
        label = "all parameters" if part == "all" else part
        axes.plot(*zip(*points, strict=True), color=style.CYCLE[number], marker="o", markersize=3, label=label)
    for size in (256, 1024, 4096):
        axes.axhline(size, color=style.COLORS["gray"], linewidth=0.8, linestyle=":")
        axes.text(96, size * 1.08, f"batch {size:,}", fontsize=8, color=style.COLORS["gray"])
    axes.set(yscale="log", xlabel="step", ylabel="noise scale, tokens", xlim=(0, found["steps"][-1] + 28))
    style.label_lines(axes)
    return figure


def draw_clipping(found: Values) -> Any:
    """Draw the gradients of two ranks in their plane, clipped after and before the average."""
    figure, (left, right) = style.new_figure(7.0, 3.0, ncols=2, width_ratios=(3, 2))
    small, large = found["norms_of_the_ranks"]
    angle = math.acos(found["cosine_of_the_ranks"])
    first, second = (small * math.cos(angle), small * math.sin(angle)), (large, 0.0)
    mean = tuple((a + b) / 2 for a, b in zip(first, second, strict=True))
    look = {"arrowstyle": "-|>", "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    for vector, color, text, place in (
        (first, "green", f"rank 1, norm {small:.2f}", (0.4, 1.35)),
        (second, "purple", f"rank 2, norm {large:.1f}", (12.2, -0.55)),
        (mean, "black", "average", (7.0, 1.0)),
    ):
        left.annotate("", xy=vector, xytext=(0, 0), arrowprops=look | {"color": style.COLORS[color]})
        left.text(*place, text, fontsize=8.5, color=style.COLORS[color])
    left.set(xlim=(-1, 19), ylim=(-2, 3.5), title="gradients", xticks=[], yticks=[])
    circle = [(math.cos(t / 100 * math.pi / 2), math.sin(t / 100 * math.pi / 2)) for t in range(-15, 116)]
    right.plot(*zip(*circle, strict=True), color=style.COLORS["gray"], linewidth=0.8)
    length = math.hypot(*mean)
    correct = tuple(x / length for x in mean)
    wrong = ((first[0] / small + 1) / 2, first[1] / small / 2)
    for vector, color, text, place in (
        (correct, "blue", "average, then clip", (0.30, 0.10)),
        (wrong, "orange", "clip on each rank,\nthen average", (0.05, 0.62)),
    ):
        right.annotate("", xy=vector, xytext=(0, 0), arrowprops=look | {"color": style.COLORS[color]})
        right.text(*place, text, fontsize=8.5, color=style.COLORS[color])
    right.text(0.72, 0.76, "norm 1", fontsize=8.5, color=style.COLORS["gray"])
    right.set(
        xlim=(-0.1, 1.25), ylim=(-0.15, 1.1), title="what the optimizer gets", aspect="equal", xticks=[], yticks=[]
    )
    for axes in (left, right):
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
    left.set_aspect("equal")
    return figure


FIGURES = {
    "10-range-test": Figure(draw_range_test, "lr_find", "lr_find_all", "compare_rates"),
    "10-schedules": Figure(draw_schedules, "schedule_shapes"),
    "10-warmdown": Figure(draw_warmdown, "noise_floor", "fork_warmdown"),
    "10-noise-scale": Figure(draw_noise_scale, "batch_size"),
    "10-clipping": Figure(draw_clipping, "clip_ranks"),
}
REFERENCES = {
    "1506.01186": reference("Smith", "Cyclical Learning Rates for Training Neural Networks", 2015),
    "1812.06162": reference("McCandlish et al.", "An Empirical Model of Large-Batch Training", 2018),
    "2405.13698": reference(
        "Wang and Aitchison", "How to set AdamW's weight decay as you scale model and dataset size", 2024
    ),
    "2505.13738": reference(
        "Bergsma et al.", "Power Lines: Scaling Laws for Weight Decay and Batch Size in LLM Pre-training", 2025
    ),
}
