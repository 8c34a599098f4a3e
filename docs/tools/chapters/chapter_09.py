"""Results and figures of chapter 9, optimizers."""

from __future__ import annotations

import json
import math
import re
import statistics
from typing import Any

import style

from chapters import ROOT, Figure, Values, command, demonstration, lab, own, reference

MUON = "Muon + AdamW"
COMPARE_GUIDE = (
    "compare --suite guide --depth 3 --vocab-size 2048 --max-seq-len 256 --total-batch-size 1024 --device-batch-size 4 "
    "--num-iterations 240 --eval-tokens 32768 --seeds 3"
)
AT_ONE_RATE = (
    'compare --recipe october --cases "momentum after: --muon-form momentum_after" '
    '"momentum after, 0.006: --muon-form momentum_after --matrix-lr 0.006" '
    '"original guide: --muon-form original_guide --ns-coefficients cubic" --rates 1 --seeds 3 --depth 3 '
    "--vocab-size 2048 --max-seq-len 256 --total-batch-size 1024 --device-batch-size 4 --num-iterations 240 "
    "--eval-tokens 32768"
)


def final(run: Values) -> float:
    """Return the final loss of a run, infinite if it diverged."""
    value = run["curve"][-1]["value"] if run["curve"] else None
    return math.inf if run["diverged"] or value is None else float(value)


def case_key(case: str) -> str:
    """Return a key of a results file for a case."""
    return re.sub(r"\W+", "_", case.lower())


def above(runs: list[Values], others: list[Values]) -> Values:
    """Return by how much the final losses of runs are above those of others, seed by seed.

    Runs of one seed start from the same weights and see the same data.
    """
    losses = {run["seed"]: final(run) for run in others}
    differences = [final(run) - losses[run["seed"]] for run in sorted(runs, key=lambda run: run["seed"])]
    return {
        "mean": statistics.mean(differences),
        "smallest": min(differences),
        "largest": max(differences),
        "by_seed": differences,
    }


def keep_comparison(record: Values) -> Values:
    """Reduce the result of compare to its rows, the search for the rates, and the mean curves of the best runs.

    "above_muon" compares a case with Muon + AdamW seed by seed, if that is one of the cases.
    """
    factors = {row["case"]: row["factor"] for row in record["rows"]}
    muon = [run for run in record["runs"] if run["case"] == MUON and run["factor"] == factors.get(MUON)]
    found: Values = {"unit": record["unit"], "seeds": record["rows"][0]["seeds"], "cases": {}}
    for row in record["rows"]:
        runs = [run for run in record["runs"] if run["case"] == row["case"]]
        best = [run for run in runs if run["factor"] == row["factor"]]
        first = min(run["seed"] for run in runs)
        search = sorted((run["factor"], final(run)) for run in runs if run["seed"] == first)
        curves = list(zip(*([point["value"] for point in run["curve"]] for run in best), strict=True))
        rate = row["rates"]["matrix_lr"] / row["factor"]
        found["cases"][case_key(row["case"])] = {
            "case": row["case"],
            "value": row["value"],
            "spread": row["spread"],
            "matrix_lr": row["rates"]["matrix_lr"],
            "embedding_lr": row["rates"]["embedding_lr"],
            "unembedding_lr": row["rates"]["unembedding_lr"],
            "steps_to_baseline": row["steps_to_baseline"] or 0,
            "optimizer_ms": row["optimizer_ms"],
            "state_bytes": row["state_bytes"],
            "run_seconds": row["seconds"],
            "finals": [final(run) for run in best],
            "search_matrix_lr": [factor * rate for factor, _ in search],
            "search_value": [value if math.isfinite(value) else None for _, value in search],
            "steps": [point["step"] for point in best[0]["curve"]],
            "curve": [sum(values) / len(values) for values in curves],
            "lowest": [min(values) for values in curves],
            "highest": [max(values) for values in curves],
        } | ({"above_muon": above(best, muon)} if muon else {})
    found["order"] = list(found["cases"])
    return found


def six_optimizers() -> Values:
    """Reduce the committed comparison, which was made on another machine."""
    record = json.loads((ROOT / "benchmarks/laboratory/compare-optimizers-d3/result.json").read_text())
    return keep_comparison(record) | {"made_on": record["versions"]["machine"]}


# --- figures ---


def draw_spectrum(spectrum: Values) -> Any:
    figure, axes = style.new_figure(7.0, 3.1, ncols=2, sharey=True)
    colors = {"before": "gray", "cubic": "orange", "quintic": "blue"}
    titles = {"attn_c_q": "c_q, {} x {}", "mlp_c_fc": "c_fc, {} x {}"}
    for plot, (part, title) in zip(axes, titles.items(), strict=True):
        for name in colors:
            curve = spectrum["spectra"][part][name]
            places = [100 * i / (len(curve) - 1) for i in range(len(curve))]
            label = {"before": "momentum", "cubic": "after 5 cubic steps", "quintic": "after 5 quintic steps"}[name]
            plot.plot(places, curve, color=style.COLORS[colors[name]], label=label)
        plot.set_yscale("log")
        plot.set_ylim(3e-4, 2.2)
        plot.set_title(title.format(*spectrum[part]["shape"]))
        plot.set_xlabel("singular values, from the largest, %")
        plot.axhline(1, color=style.COLORS["black"], linewidth=0.6, linestyle=":")
    axes[0].set_ylabel("singular value")
    axes[1].legend(loc="lower left", frameon=False)
    return figure


def draw_singular_values(found: Values) -> Any:
    figure, axes = style.new_figure(7.0, 2.9, ncols=3, sharey=True)
    names = {"cubic": ("Cubic", "orange"), "quintic": ("Quintic", "blue"), "polar_express": ("Polar Express", "green")}
    for plot, (name, (title, color)) in zip(axes, names.items(), strict=True):
        by_step = found[name]["by_step"]
        steps = range(len(by_step["median"]))
        plot.fill_between(steps, by_step["smallest"], by_step["largest"], color=style.COLORS[color], alpha=0.13, lw=0)
        plot.fill_between(
            steps, by_step["quarter"], by_step["three_quarters"], color=style.COLORS[color], alpha=0.28, lw=0
        )
        plot.plot(steps, by_step["median"], color=style.COLORS[color])
        plot.axhline(1, color=style.COLORS["black"], linewidth=0.6, linestyle=":")
        plot.axvline(5, color=style.COLORS["gray"], linewidth=0.8, linestyle="--")
        plot.set_yscale("log")
        plot.set_ylim(1e-3, 2)
        plot.set_xlim(0, 10)
        plot.set_xticks(range(0, 11, 5))
        plot.set_title(f"{title} ({found[name]['five_steps']['error']:.2f})")
        plot.set_xlabel("steps")
    axes[0].set_ylabel("singular values")
    return figure


def draw_width(found: Values) -> Any:
    figure, axes = style.new_figure(7.0, 2.8, ncols=2, sharex=True)
    widths = found["widths"]
    left, right = axes
    left.plot(widths, found["orthogonal_entry"], "o-", color=style.COLORS["blue"], markersize=3.5)
    left.plot(widths, [1] * len(widths), "s-", color=style.COLORS["orange"], markersize=3.5)
    left.set_title("an entry of the step, RMS")
    left.text(70, 0.044, "singular values of 1", color=style.COLORS["blue"], fontsize=8.5)
    left.text(70, 0.66, "signs", color=style.COLORS["orange"], fontsize=8.5)
    right.plot(widths, found["orthogonal_output"], "o-", color=style.COLORS["blue"], markersize=3.5)
    right.plot(widths, found["signs_output"], "s-", color=style.COLORS["orange"], markersize=3.5)
    right.plot(widths, found["fitting_signs_output"], "s--", color=style.COLORS["orange"], markersize=3.5)
    right.set_title("the change of the outputs, RMS")
    right.text(250, 1.25, "singular values of 1", color=style.COLORS["blue"], fontsize=8.5)
    right.text(260, 9.0, "random signs", color=style.COLORS["orange"], fontsize=8.5)
    right.text(70, 420, "signs that fit the input", color=style.COLORS["orange"], fontsize=8.5)
    for plot in axes:
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_xticks(widths, [str(width) for width in widths])
        plot.minorticks_off()
        plot.set_xlabel("width of the layer")
    left.set_ylim(0.02, 2)
    right.set_ylim(0.6, 2000)
    return figure


def draw_curves(plot: Any, comparison: Values, order: list[str], colors: list[str], *, bands: bool) -> None:
    for name, color in zip(order, colors, strict=True):
        case = comparison["cases"][name]
        plot.plot(case["steps"], case["curve"], color=style.COLORS[color], label=case["case"])
        if bands:
            plot.fill_between(
                case["steps"], case["lowest"], case["highest"], color=style.COLORS[color], alpha=0.2, linewidth=0
            )


def draw_six_optimizers(comparison: Values) -> Any:
    figure, plot = style.new_figure(7.0, 3.2)
    colors = ["blue", "black", "sky", "green", "purple", "orange"]
    draw_curves(plot, comparison, comparison["order"], colors, bands=True)
    plot.set_xlim(0, 240)
    plot.set_ylim(1.95, 3.6)
    plot.set_xlabel("step")
    plot.set_ylabel("validation, bits per byte")
    style.label_lines(plot)
    return figure


def draw_guide_suite(comparison: Values) -> Any:
    figure, axes = style.new_figure(7.0, 3.2, ncols=2, width_ratios=(1.25, 1))
    colors = {
        "adamw": "black",
        "muon_adamw": "blue",
        "cubic": "orange",
        "cropped_to_a_square": "green",
        "momentum_after": "purple",
        "original_guide": "sky",
    }
    left, right = axes
    for name, color in colors.items():
        case = comparison["cases"][name]
        points = [
            (rate, value)
            for rate, value in zip(case["search_matrix_lr"], case["search_value"], strict=True)
            if value is not None
        ]
        left.plot(*zip(*points, strict=True), "o-", color=style.COLORS[color], markersize=3.5, label=case["case"])
    left.set_xscale("log")
    left.set_xlabel("learning rate of the matrices")
    left.set_ylabel("final validation, bits per byte")
    left.axvline(0.02, color=style.COLORS["gray"], linewidth=0.8, linestyle="--")
    left.set_title("the search, first seed")
    right.set_title("three seeds at the best rate")
    for place, name in enumerate(reversed(comparison["order"])):
        case = comparison["cases"][name]
        color = style.COLORS[colors[name]]
        right.plot([place] * len(case["finals"]), case["finals"], "o", color=color, markersize=4)
        right.plot([place - 0.25, place + 0.25], [case["value"]] * 2, color=color)
    names = [comparison["cases"][name]["case"] for name in reversed(comparison["order"])]
    right.set_xticks(range(len(names)), [name.replace(" to a square", "") for name in names], rotation=40, ha="right")
    for label, name in zip(right.get_xticklabels(), reversed(comparison["order"]), strict=True):
        label.set_color(style.COLORS[colors[name]])
    right.set_ylabel("bits per byte")
    return figure


RESULTS = {
    "newton_schulz": demonstration("newton-schulz"),
    "steepest_direction": demonstration("steepest-direction"),
    "cropped_update": demonstration("cropped-update"),
    "frozen_rows": demonstration("frozen-rows"),
    "momentum_order": demonstration("momentum-order"),
    "momentum_horizon": demonstration("momentum-horizon"),
    "momentum_spectrum": demonstration("momentum-spectrum", trained=True),
    "momentum_spectrum_output": command("demonstrate momentum-spectrum"),
    "loss_scale": demonstration("loss-scale"),
    "update_size": demonstration("update-size"),
    "update_by_width": demonstration("update-by-width"),
    "aspect_factor": demonstration("aspect-factor"),
    "adamw_forms": demonstration("adamw-forms"),
    "embedding_rows": demonstration("embedding-rows"),
    "gradient_by_width": demonstration("gradient-by-width"),
    "compare_optimizers": own(
        "python -m nanochat_native.plot benchmarks/laboratory/compare-optimizers-d3", six_optimizers
    ),
    "compare_guide": lab(COMPARE_GUIDE, keep=keep_comparison),
    "compare_guide_rate": lab(AT_ONE_RATE, keep=keep_comparison),
}
FIGURES = {
    "09-spectrum": Figure(draw_spectrum, "momentum_spectrum"),
    "09-singular-values": Figure(draw_singular_values, "newton_schulz"),
    "09-width": Figure(draw_width, "update_by_width"),
    "09-six-optimizers": Figure(draw_six_optimizers, "compare_optimizers"),
    "09-guide-suite": Figure(draw_guide_suite, "compare_guide"),
}
REFERENCES = {
    "1412.6980": reference("Kingma and Ba", "Adam: A Method for Stochastic Optimization", 2014),
    "1711.05101": reference("Loshchilov and Hutter", "Decoupled Weight Decay Regularization", 2017),
    "2505.16932": reference(
        "Amsel et al.",
        "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm",
        2025,
    ),
    "2509.02046": reference("Wen, Hall, Ma, Liang", "Fantastic Pretraining Optimizers and Where to Find Them", 2025),
    "2510.05491": reference("Li et al.", "NorMuon: Making Muon more efficient and scalable", 2025),
    "2510.12402": reference("Chen et al.", "Cautious Weight Decay", 2025),
}
