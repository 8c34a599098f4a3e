"""The fits of both experiments to the losses of their runs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat_native.lab.scaling import fits
from nanochat_native.lab.scaling.fits import Parabola

Run = dict[str, Any]


def usable(runs: Sequence[Run], study: str | None = None) -> list[Run]:
    """Return the runs of an experiment, or of both, whose loss is a number: they have not diverged."""
    return [
        run
        for run in runs
        if study in (None, run["study"]) and run["value"] is not None and math.isfinite(run["value"])
    ]


def analyse(runs: Sequence[Run]) -> dict[str, Any]:
    """Return all fits of the finished runs, each either its figures, or {"not_fitted": the reason}.

    The keys are "miniseries", a power law of the loss over FLOPs; "budgets", the minimum at each budget of isoflop;
    "size", "tokens" and "loss", power laws of these minima over the budgets; and "loss_law", the loss by size and
    tokens over all runs.
    """
    found: dict[str, Any] = {}
    series, isoflop = ([run for run in runs if run["study"] == study] for study in ("miniseries", "isoflop"))
    if series:
        points = usable(series)
        found["miniseries"] = _power_law([run["flops"] for run in points], [run["value"] for run in points])
    if isoflop:
        found |= _isoflop(isoflop)
    points = usable(runs)
    try:
        law = fits.fit_loss_law(*([run[name] for run in points] for name in ("size", "tokens", "value")))
        found["loss_law"] = dataclasses.asdict(law) | {"determined": law.determined}
    except ValueError as error:
        found["loss_law"] = {"not_fitted": str(error)}
    return found


def _power_law(
    x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None = None, dof: int = 0
) -> dict[str, Any]:
    try:
        return dataclasses.asdict(fits.fit_power_law(x, y, errors, dof))
    except ValueError as error:
        return {"not_fitted": str(error)}


def _isoflop(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the minimum at each budget, and the power laws of the minima inside the range of the sizes."""
    parabolas: dict[float, Parabola] = {}
    budgets: list[dict[str, Any]] = []
    for budget in sorted({run["budget"] for run in runs}):
        points = usable([run for run in runs if run["budget"] == budget])
        row: dict[str, Any] = {"budget": budget, "points": len(points)}
        try:
            parabolas[budget] = fits.fit_parabola([r["size"] for r in points], [r["value"] for r in points])
        except ValueError as error:
            row["not_fitted"] = str(error)
        budgets.append(row)
    variance, dof = fits.pooled_variance(list(parabolas.values()))
    # Between two depths, the FLOPs of a token are interpolated by a power law of the size.
    shapes = sorted({(run["size"], run["flops_per_token"]) for run in runs})
    log_sizes, log_costs = (np.log([shape[i] for shape in shapes]) for i in (0, 1))

    for row in budgets:
        if row["budget"] not in parabolas:
            continue
        parabola = parabolas[row["budget"]]
        minimum = fits.minimum_of(parabola, variance, dof)
        row |= {"where": minimum.where, "centre": parabola.centre, "coefficients": list(parabola.coefficients)}
        row["sizes"] = [math.exp(parabola.low), math.exp(parabola.high)]
        if minimum.log_size is None:
            continue
        cost = math.exp(float(np.interp(minimum.log_size, log_sizes, log_costs)))
        i = min(max(int(np.searchsorted(log_sizes, minimum.log_size)), 1), len(shapes) - 1)
        slope = (log_costs[i] - log_costs[i - 1]) / (log_sizes[i] - log_sizes[i - 1])
        row |= {
            "size": math.exp(minimum.log_size),
            "interval": None if minimum.interval is None else [math.exp(end) for end in minimum.interval],
            "tokens": row["budget"] / cost,
            "loss": minimum.loss,
            "size_error": minimum.error,
            "tokens_error": None if minimum.error is None else minimum.error * abs(slope),
        }
    inside = [row for row in budgets if "size" in row]
    laws: dict[str, Any] = {}
    for name in ("size", "tokens", "loss"):
        if len(inside) < 2:
            laws[name] = {
                "not_fitted": f"{len(inside)} of {len(budgets)} budgets have a minimum among the sizes, 2 are needed"
            }
            continue
        errors = [row.get(f"{name}_error") for row in inside]
        known = all(error is not None for error in errors)
        x, y = [row["budget"] for row in inside], [row[name] for row in inside]
        # The scatter of the two or three minima says less of their errors than the residuals of all runs.
        laws[name] = _power_law(x, y, errors if known else None, dof)  # type: ignore[arg-type]
    return {"budgets": budgets, "noise": None if variance is None else math.sqrt(variance), "dof": dof, **laws}
