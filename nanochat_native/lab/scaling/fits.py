"""Least-squares fits of scaling laws, and what the scatter of the data says about their parameters.

All intervals are for a confidence of 95%. They hold for independent normal errors of equal variance, which is estimated
from the residuals, so their quantiles are those of Student's t. With as many points as parameters there is no residual,
and no interval.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
EXPONENTS = (0.02, 3.0)  # range in which the exponents of a loss law are searched
GRID = 24  # values of each exponent in the first search
ZOOMS = 5  # searches around the best value, each in steps that are 5 times smaller
FARTHEST = 10.0  # end of an interval of a minimum, in ranges of ln(size) beyond the range
SMALLEST_PIVOT = 1e-10  # relative size below which a direction of the parameters is not determined

Interval = tuple[float, float]


@functools.cache
def student_t(dof: int) -> float:
    """Return the quantile of Student's t for a two-sided interval of CONFIDENCE with `dof` degrees of freedom.

    With t = sqrt(dof) tan(u), the density of u in [0, pi/2] is proportional to cos(u)^(dof - 1).
    """
    if dof < 1:
        raise ValueError(f"dof must be a whole number >= 1, got {dof}")
    angle = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (dof - 1)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return float(np.sqrt(dof) * np.tan(np.interp(CONFIDENCE * area[-1], area, angle)))


def _arrays(*series: Sequence[float]) -> list[np.ndarray]:
    """Return the series as arrays. Raises ValueError unless they are finite and of one length."""
    arrays = [np.asarray(values, dtype=np.float64) for values in series]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"the points need as many values of each kind, got {[array.shape for array in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("all values of the points must be finite")
    return arrays


def _positive(*series: Sequence[float]) -> list[np.ndarray]:
    arrays = _arrays(*series)
    if not all((array > 0).all() for array in arrays):
        raise ValueError("all values of the points must be > 0, because their logarithms are fitted")
    return arrays


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 u + c2 u^2 with u = ln(size) - centre: the losses at one budget (approach 2 of Hoffmann et al.,
    arXiv:2203.15556).

    Attributes:
        centre: the mean of ln(size).
        coefficients: c0, c1, c2.
        inverse: (3, 3), the covariance of the coefficients for errors of variance 1.
        rss: the sum of the squared residuals.
        dof: the number of points beyond the three parameters.
        low, high: the range of ln(size) of the points.
        lowest: which size has the lowest mean loss: the smallest ("below"), the largest ("above"), or another
            ("inside").
    """

    centre: float
    coefficients: tuple[float, float, float]
    inverse: np.ndarray
    rss: float
    dof: int
    low: float
    high: float
    lowest: Literal["inside", "below", "above"]

    def at(self, log_size: float) -> float:
        """Return the loss at ln(size)."""
        u = log_size - self.centre
        c0, c1, c2 = self.coefficients
        return c0 + c1 * u + c2 * u * u


def fit_parabola(sizes: Sequence[float], losses: Sequence[float]) -> Parabola:
    """Fit the losses at one budget. Raises ValueError for fewer than three different sizes."""
    x, y = np.log(_positive(sizes)[0]), _arrays(sizes, losses)[1]
    different = np.unique(x)
    if len(different) < 3:
        raise ValueError(f"a parabola needs at least 3 different sizes, got {len(different)}")
    centre = float(x.mean())
    u = x - centre
    design = np.stack((np.ones_like(u), u, u * u), axis=1)
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    rss = float(((y - design @ coefficients) ** 2).sum())
    lowest = int(np.argmin([y[x == size].mean() for size in different]))
    c0, c1, c2 = map(float, coefficients)
    return Parabola(
        centre,
        (c0, c1, c2),
        np.linalg.inv(design.T @ design),
        rss,
        len(x) - 3,
        float(different[0]),
        float(different[-1]),
        "below" if lowest == 0 else "above" if lowest == len(different) - 1 else "inside",
    )


def pooled_variance(parabolas: Sequence[Parabola]) -> tuple[float | None, int]:
    """Return the variance of the errors, from the residuals of all budgets together, and its degrees of freedom.

    The variance is None without a degree of freedom.
    """
    dof = sum(parabola.dof for parabola in parabolas)
    return (sum(parabola.rss for parabola in parabolas) / dof if dof else None), dof


@dataclass(frozen=True)
class Minimum:
    """The minimum of a parabola.

    Attributes:
        where: "inside" the range of the sizes; or "below" or "above" it: the mean loss is lowest at this end of the
            range, so no two sizes enclose the minimum; or "flat": the parabola has no minimum in the range. Only a
            minimum inside has the other attributes.
        log_size, loss: the minimum.
        error: the standard error of log_size to first order; None without a variance.
        interval: of log_size, by Fieller's theorem (1954); None without a variance, or if it is unbounded or
            reaches FARTHEST times the range of the sizes beyond this range.
    """

    where: Literal["inside", "below", "above", "flat"]
    log_size: float | None = None
    loss: float | None = None
    error: float | None = None
    interval: Interval | None = None


def minimum_of(parabola: Parabola, variance: float | None, dof: int) -> Minimum:
    """Return the minimum of a parabola. variance, dof: as pooled_variance returns them."""
    _, b, c = parabola.coefficients
    if parabola.lowest != "inside":
        return Minimum(parabola.lowest)
    u = -b / (2 * c) if c > 0 else np.inf
    place = parabola.centre + float(u)
    if not parabola.low <= place <= parabola.high:
        return Minimum("flat")
    if variance is None:
        return Minimum("inside", place, parabola.at(place))
    bb, bc, cc = (variance * float(parabola.inverse[i, j]) for i, j in ((1, 1), (1, 2), (2, 2)))
    error = np.sqrt(max(0.0, bb + 4 * u * bc + 4 * u * u * cc)) / (2 * c)
    # The interval holds the u at which b + 2 c u, whose variance is bb + 4 u bc + 4 u^2 cc, may be 0.
    q = student_t(dof) ** 2
    square, linear, constant = 4 * (c * c - q * cc), 4 * (b * c - q * bc), b * b - q * bb
    interval = None
    if square > 0:
        root = np.sqrt(max(0.0, linear * linear - 4 * square * constant))
        interval = tuple(float(parabola.centre + (sign * root - linear) / (2 * square)) for sign in (-1, 1))
        far = FARTHEST * (parabola.high - parabola.low)
        if interval[0] < parabola.low - far or interval[1] > parabola.high + far:
            interval = None
    return Minimum("inside", place, parabola.at(place), float(error), interval)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PowerLaw:
    """y = factor x^exponent.

    Attributes:
        interval: of the exponent; None if the data does not say.
        scatter: root of the mean square of the residuals of ln(y).
        points: the number of points.
    """

    exponent: float
    factor: float
    interval: Interval | None
    scatter: float
    points: int

    def at(self, x: float) -> float:
        """Return y at x."""
        return float(self.factor * x**self.exponent)


def fit_power_law(
    x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None = None, dof: int = 0
) -> PowerLaw:
    """Fit a straight line to ln(y) over ln(x), by ordinary least squares.

    Args:
        errors: the standard error of each ln(y), from which that of the exponent follows; None: it follows from the
            scatter of the points about the line.
        dof: the degrees of freedom of `errors`.

    Raises ValueError for fewer than two different values of x.
    """
    log_x, log_y = map(np.log, _positive(x, y))
    if len(np.unique(log_x)) < 2:
        raise ValueError(f"a power law needs at least 2 different values, got {len(np.unique(log_x))}")
    centred = log_x - log_x.mean()
    weights = centred / (centred**2).sum()
    exponent = float(weights @ log_y)
    residuals = log_y - log_y.mean() - exponent * centred
    rss = float((residuals**2).sum())
    interval = None
    if errors is not None:
        error = float(np.sqrt(((weights * _arrays(x, errors)[1]) ** 2).sum()))
    else:
        dof = len(log_x) - 2
        error = float(np.sqrt(rss / dof / (centred**2).sum())) if dof else 0.0
    if dof:
        half = student_t(dof) * error
        interval = (exponent - half, exponent + half)
    factor = float(np.exp(log_y.mean() - exponent * log_x.mean()))
    return PowerLaw(exponent, factor, interval, float(np.sqrt(rss / len(log_x))), len(log_x))


@dataclass(frozen=True)
class LossLaw:
    """loss = floor + size_factor / size^size_exponent + data_factor / tokens^data_exponent (approach 3 of Hoffmann et
    al., by least squares of the loss).

    Attributes:
        size_interval, data_interval, floor_interval: None if the points do not determine the parameter.
        scatter: root of the mean square of the residuals, in the unit of the loss.
        points: the number of points.
    """

    floor: float
    size_factor: float
    size_exponent: float
    data_factor: float
    data_exponent: float
    size_interval: Interval | None
    data_interval: Interval | None
    floor_interval: Interval | None
    scatter: float
    points: int

    @property
    def determined(self) -> bool:
        """Whether the interval of each exponent is known and above 0."""
        return all(found is not None and found[0] > 0 for found in (self.size_interval, self.data_interval))

    def at(self, size: float, tokens: float) -> float:
        """Return the loss of a model of `size` parameters after `tokens` tokens."""
        return float(
            self.floor + self.size_factor * size**-self.size_exponent + self.data_factor * tokens**-self.data_exponent
        )


def fit_loss_law(sizes: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> LossLaw:
    """Fit a loss law by variable projection: the law is linear in all parameters but the exponents, which are searched
    on grids. The floor and the factors are >= 0.

    Raises ValueError for no more points than the law has parameters, 5, or if no such law fits.
    """
    n, d = _positive(sizes, tokens)
    y = _arrays(sizes, losses)[1]
    if len(y) < 6:
        raise ValueError(f"a loss law has 5 parameters and needs at least 6 runs, got {len(y)}")
    if len(np.unique(n)) < 3 or len(np.unique(d)) < 3:
        raise ValueError("a loss law needs at least 3 different sizes and 3 different lengths of the training")
    log_n, log_d = (np.log(values / np.exp(np.log(values).mean())) for values in (n, d))

    best: tuple[float, np.ndarray, float, float] | None = None
    ranges = [EXPONENTS, EXPONENTS]
    for zoom in range(ZOOMS + 1):
        count = GRID if zoom == 0 else 11
        a, b = (grid.ravel() for grid in np.meshgrid(*(np.geomspace(*ends, count) for ends in ranges), indexing="ij"))
        found = _best_of(a, b, log_n, log_d, y)
        if found is not None and (best is None or found[0] <= best[0]):
            best = found
        if best is None:
            raise ValueError("no loss law with positive factors fits the runs")
        ranges = [_around(value, ends, count) for value, ends in zip(best[2:], ranges, strict=True)]
    assert best is not None
    rss, (floor, size_factor, data_factor), a_best, b_best = best

    at_edge = [not EXPONENTS[0] * 1.01 < value < EXPONENTS[1] / 1.01 for value in (a_best, b_best)]
    jacobian = np.stack(
        (
            np.ones_like(y),
            np.exp(-a_best * log_n),
            np.exp(-b_best * log_d),
            -size_factor * log_n * np.exp(-a_best * log_n),
            -data_factor * log_d * np.exp(-b_best * log_d),
        ),
        axis=1,
    )
    kept = [0, 1, 2, 3, 4] if floor > 0 else [1, 2, 3, 4]
    intervals = _intervals(jacobian[:, kept], rss, [(floor, size_factor, data_factor, a_best, b_best)[i] for i in kept])
    by_parameter = dict(zip(kept, intervals, strict=True))
    mean_n, mean_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    return LossLaw(
        floor=float(floor),
        size_factor=float(size_factor * mean_n**a_best),
        size_exponent=a_best,
        data_factor=float(data_factor * mean_d**b_best),
        data_exponent=b_best,
        size_interval=None if at_edge[0] else by_parameter[3],
        data_interval=None if at_edge[1] else by_parameter[4],
        floor_interval=None if any(at_edge) else by_parameter.get(0),
        scatter=float(np.sqrt(rss / len(y))),
        points=len(y),
    )


def _best_of(
    a: np.ndarray, b: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, y: np.ndarray
) -> tuple[float, np.ndarray, float, float] | None:
    """Return the pair of exponents with the smallest sum of squared residuals among those whose factors are positive:
    the sum, (floor, size factor, data factor), and the exponents. None if there is none."""
    best: tuple[float, np.ndarray, float, float] | None = None
    columns = np.stack((np.exp(-np.outer(a, log_n)), np.exp(-np.outer(b, log_d))), axis=2)
    for with_floor in (True, False):
        design = np.concatenate((np.ones_like(columns[..., :1]), columns), axis=2) if with_floor else columns
        coefficients = np.linalg.pinv(design) @ y
        rss = ((y - np.einsum("gnk,gk->gn", design, coefficients)) ** 2).sum(axis=1)
        valid = (coefficients[:, -2:] > 0).all(axis=1) & (coefficients >= 0).all(axis=1)
        if not valid.any():
            continue
        i = int(np.where(valid, rss, np.inf).argmin())
        if best is None or rss[i] < best[0]:
            factors = coefficients[i] if with_floor else np.concatenate(([0.0], coefficients[i]))
            best = (float(rss[i]), factors, float(a[i]), float(b[i]))
    return best


def _around(value: float, ends: Interval, count: int) -> Interval:
    """Return the range from one step of a grid below `value` to one above it, within EXPONENTS."""
    step = (ends[1] / ends[0]) ** (1 / (count - 1))
    return max(EXPONENTS[0], value / step), min(EXPONENTS[1], value * step)


def _intervals(jacobian: np.ndarray, rss: float, values: Sequence[float]) -> list[Interval | None]:
    """Return the interval of each parameter by the covariance of the least squares at the optimum.

    An interval is None if there is no degree of freedom, or if the points do not determine all parameters.
    """
    dof = len(jacobian) - jacobian.shape[1]
    scale = np.linalg.norm(jacobian, axis=0)
    if dof < 1 or not (scale > 0).all():
        return [None] * len(values)
    _, singular, rotation = np.linalg.svd(jacobian / scale, full_matrices=False)
    if singular[-1] < SMALLEST_PIVOT * singular[0]:
        return [None] * len(values)
    errors = np.sqrt(rss / dof * ((rotation / singular[:, None]) ** 2).sum(axis=0)) / scale
    half = student_t(dof) * errors
    return [(float(v - h), float(v + h)) for v, h in zip(values, half, strict=True)]
