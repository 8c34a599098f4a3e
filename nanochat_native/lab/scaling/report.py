"""The result of a scaling experiment as text."""

from collections.abc import Sequence
from typing import Any

from nanochat_native.runtime.console import compact, duration

DISCLAIMER = "Intervals are of 95%, from the scatter of the runs about the fit (Student's t)."


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the names, as a Markdown table."""
    head, *rest = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rest))


def _interval(ends: Sequence[float] | None, form: str) -> str:
    return "" if ends is None else f" ({' to '.join(format(end, form) for end in ends)})"


def plan_table(plan: Sequence[dict[str, Any]], estimates: Sequence[tuple[float, int]] = ()) -> str:
    """Return the runs of a plan as a Markdown table.

    Args:
        plan: as PlannedRun.described returns them.
        estimates: seconds and bytes on the disk of each run, if known.
    """
    names = ["run", "parameters", "of them in the laws", "FLOP a token", "batch", "steps", "tokens", "FLOP"]
    rows = [[*names, "of budget", *(["time", "disk"] if estimates else [])]]
    for i, run in enumerate(plan):
        share = "" if run["budget"] is None else f"{run['flops'] / run['budget']:.1%}"
        numbers = [f"{run[name]:,}" for name in ("params", "size", "flops_per_token", "batch", "steps", "tokens")]
        row = [run["name"], *numbers, f"{run['flops']:.3e}", share]
        if estimates:
            seconds, size = estimates[i]
            row += [duration(seconds), f"{size / 1e6:.1f} MB"]
        rows.append(row)
    return _lines(rows)


def runs_table(runs: Sequence[dict[str, Any]], unit: str) -> str:
    """Return the finished runs as a Markdown table."""
    rows = [["run", "parameters in the laws", "tokens", "tokens a parameter", "FLOP", f"final {unit}", "training, s"]]
    for run in runs:
        value = "diverged" if run["value"] is None else f"{run['value']:.4f}"
        size, tokens = run["size"], run["tokens"]
        ratio, flops = f"{tokens / size:.3g}", f"{run['flops']:.3e}"
        rows.append([run["name"], f"{size:,}", f"{tokens:,}", ratio, flops, value, f"{run['seconds']:.1f}"])
    return _lines(rows)


def budgets_table(budgets: Sequence[dict[str, Any]], unit: str) -> str:
    """Return the minima at the budgets of isoflop as a Markdown table, with a note where there is none."""
    rows = [["budget, FLOP", "runs", "best parameters", "tokens", "tokens a parameter", unit, "note"]]
    for row in budgets:
        start = [f"{row['budget']:g}", str(row["points"])]
        if "not_fitted" in row:
            rows.append([*start, "", "", "", "", f"not fitted: {row['not_fitted']}"])
        elif "size" not in row:
            note = {
                "below": f"best at the smallest size, {compact(row['sizes'][0])}: not extrapolated",
                "above": f"best at the largest size, {compact(row['sizes'][1])}: not extrapolated",
                "flat": "the parabola has no minimum among the sizes",
            }[row["where"]]
            rows.append([*start, "", "", "", "", note])
        else:
            note = "" if row["interval"] else "interval unbounded" if row["size_error"] is not None else "no interval"
            size = f"{compact(row['size'])}{_compact_interval(row['interval'])}"
            ratio = f"{row['tokens'] / row['size']:.3g}"
            rows.append([*start, size, compact(row["tokens"]), ratio, f"{row['loss']:.4f}", note])
    return _lines(rows)


def _compact_interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({' to '.join(map(compact, ends))})"


def laws_text(fits: dict[str, Any]) -> str:
    """Return the laws, a line each."""
    lines = []
    names = {
        "miniseries": "loss of the miniseries",
        "size": "best parameters",
        "tokens": "tokens at the best size",
        "loss": "loss at the best size",
    }
    for key, name in names.items():
        law = fits.get(key)
        if law is None:
            continue
        if "not_fitted" in law:
            lines.append(f"- {name}: not fitted: {law['not_fitted']}")
            continue
        interval = _interval(law["interval"], ".3f") or " (no interval)"
        formula = f"{law['factor']:.4g} C^{law['exponent']:.3f}{interval}"
        lines.append(f"- {name} = {formula}, C in FLOP, {law['points']} points")
    law = fits.get("loss_law")
    if law is not None and "not_fitted" in law:
        lines.append(f"- loss by parameters N and tokens D: not fitted: {law['not_fitted']}")
    elif law is not None:
        exponents = [
            f"{law[f'{name}_exponent']:.3f}{_interval(law[f'{name}_interval'], '.3f') or ' (no interval)'}"
            for name in ("size", "data")
        ]
        doubt = "" if law["determined"] else "; the runs do not determine its exponents"
        floor = f"{law['floor']:.3f}{_interval(law['floor_interval'], '.3f')}"
        lines.append(
            f"- loss = {floor} + {law['size_factor']:.4g} / N^{exponents[0]} + {law['data_factor']:.4g} / "
            f"D^{exponents[1]}, {law['points']} runs, residuals {law['scatter']:.4f}{doubt}"
        )
    return "\n".join(lines) + "\n"


def result_text(record: dict[str, Any]) -> str:
    """Return the tables and laws of a result."""
    parts = [runs_table(record["runs"], record["unit"])]
    if "budgets" in record["fits"]:
        parts.append(budgets_table(record["fits"]["budgets"], record["unit"]))
    parts.append(laws_text(record["fits"]) + DISCLAIMER + "\n")
    return "\n".join(parts)
