"""The fits of scaling laws: exact data is recovered, and intervals hold the truth as often as they say."""

import math

import numpy as np
import pytest

from nanochat_native.lab.scaling import analysis, fits

SIZES = (1e5, 5e5, 1.5e6, 3.5e6)
BUDGETS = (1e12, 3e12, 1e13, 3e13)
DRAWS = 400


def within(hits, draws):
    """Whether a rate is that of an interval of 95%, by three and a half standard deviations of its count."""
    return abs(hits / draws - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / draws)


@pytest.mark.parametrize(("dof", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (100, 1.984)])
def test_quantiles_are_those_of_tables(dof, quantile):
    assert fits.student_t(dof) == pytest.approx(quantile, abs=6e-4)


def test_an_exact_parabola_is_recovered():
    losses = [2.0 + 0.05 * (math.log(size) - math.log(7e5)) ** 2 for size in SIZES]
    parabola = fits.fit_parabola(SIZES, losses)
    variance, dof = fits.pooled_variance([parabola])
    minimum = fits.minimum_of(parabola, variance, dof)
    assert (dof, minimum.where) == (1, "inside")
    assert math.exp(minimum.log_size) == pytest.approx(7e5, rel=1e-6)
    assert minimum.loss == pytest.approx(2.0)
    assert minimum.interval == pytest.approx((minimum.log_size, minimum.log_size), abs=1e-5)
    assert [parabola.at(math.log(size)) for size in SIZES] == pytest.approx(losses)


def test_the_interval_of_a_minimum_holds_it_in_95_of_100_draws():
    rng = np.random.default_rng(0)
    place, hits, bounded = math.log(6e5), 0, 0
    for _ in range(DRAWS):
        parabolas = [
            fits.fit_parabola(SIZES, [2 + 0.05 * (math.log(n) - place) ** 2 + rng.normal(0, 0.01) for n in SIZES])
            for _ in range(3)
        ]
        minimum = fits.minimum_of(parabolas[0], *fits.pooled_variance(parabolas))
        if minimum.interval is not None:
            bounded += 1
            hits += minimum.interval[0] <= place <= minimum.interval[1]
    assert bounded == DRAWS
    assert within(hits, DRAWS), hits


def test_a_minimum_that_the_noise_hides_has_no_bounded_interval():
    losses = [2.03, 2.0, 1.99, 2.03, 1.99, 1.97, 2.02, 2.0]
    sizes = [*SIZES, *SIZES]
    parabola = fits.fit_parabola(sizes, losses)
    minimum = fits.minimum_of(parabola, *fits.pooled_variance([parabola]))
    assert minimum.where == "inside"
    assert minimum.interval is None
    assert minimum.error > 0


def test_an_interval_that_is_far_wider_than_the_sizes_is_unbounded():
    sizes = np.repeat(SIZES, 2)
    noise = np.tile([0.001, -0.001], len(SIZES))
    parabola = fits.fit_parabola(sizes, 3 + 0.05 * np.log(sizes / 6e5) ** 2 + noise)
    found = {v: fits.minimum_of(parabola, v, 4).interval for v in np.geomspace(1e-8, 1, 400)}
    bounded = [interval for interval in found.values() if interval is not None]
    reach = (1 + fits.FARTHEST) * (parabola.high - parabola.low)
    assert 0 < len(bounded) < len(found)
    assert all(abs(end - parabola.centre) <= reach for interval in bounded for end in interval)
    variances = list(found)
    last = max(variances.index(v) for v, interval in found.items() if interval is not None)
    between = np.linspace(variances[last], variances[last + 1], 4000)
    assert all(
        interval is None or abs(end - parabola.centre) <= reach
        for interval in (fits.minimum_of(parabola, v, 4).interval for v in between)
        for end in (interval or [0])
    )


def test_three_points_have_a_minimum_and_no_interval():
    parabola = fits.fit_parabola(SIZES[:3], [2.1, 2.0, 2.05])
    variance, dof = fits.pooled_variance([parabola])
    assert (variance, dof) == (None, 0)
    minimum = fits.minimum_of(parabola, variance, dof)
    assert (minimum.where, minimum.interval, minimum.error) == ("inside", None, None)


@pytest.mark.parametrize(
    ("losses", "where"),
    [
        ((2.0, 2.1, 2.3, 2.6), "below"),
        ((2.6, 2.3, 2.1, 2.0), "above"),
        ((2.0, 1.9999, 2.0, 1.9), "above"),
        ((2.0, 2.3, 2.3, 2.1), "below"),  # curved downwards
        ((2.1, 2.3, 2.3, 2.0), "above"),
        ((2.1, 2.0, 2.4, 2.05), "flat"),
    ],
)
def test_a_minimum_at_the_edge_is_not_extrapolated(losses, where):
    minimum = fits.minimum_of(fits.fit_parabola(SIZES, losses), 1e-4, 1)
    assert (minimum.where, minimum.log_size, minimum.loss, minimum.interval) == (where, None, None, None)


def test_a_power_law_is_recovered_and_its_interval_holds_it():
    x = np.geomspace(1e12, 1e14, 6)
    exact = fits.fit_power_law(x, 40 * x**-0.11)
    assert (exact.exponent, exact.factor) == (pytest.approx(-0.11), pytest.approx(40))
    assert exact.at(3e13) == pytest.approx(40 * 3e13**-0.11)
    assert exact.scatter == pytest.approx(0, abs=1e-12)
    assert fits.fit_power_law(x[:2], 40 * x[:2] ** -0.11).interval is None
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(DRAWS):
        law = fits.fit_power_law(x, 40 * x**-0.11 * np.exp(rng.normal(0, 0.02, 6)))
        hits += law.interval[0] <= -0.11 <= law.interval[1]
    assert within(hits, DRAWS), hits


def loss_law(n, d):
    return 0.8 + 30 * n**-0.3 + 60 * d**-0.35


def grid():
    return np.array([(n, d) for n in (1e5, 4e5, 1e6, 4e6) for d in (1e6, 4e6, 2e7, 1e8)]).T


def test_a_loss_law_is_recovered():
    n, d = grid()
    law = fits.fit_loss_law(n, d, loss_law(n, d))
    found = (law.floor, law.size_factor, law.size_exponent, law.data_factor, law.data_exponent)
    assert found == pytest.approx((0.8, 30, 0.3, 60, 0.35), rel=0.01)
    assert law.at(1e6, 1e7) == pytest.approx(loss_law(1e6, 1e7), rel=1e-4)
    assert law.determined


def test_the_intervals_of_a_loss_law_hold_its_exponents():
    n, d = grid()
    rng = np.random.default_rng(2)
    draws, size_hits, data_hits, floor_hits = 150, 0, 0, 0
    for _ in range(draws):
        law = fits.fit_loss_law(n, d, loss_law(n, d) + rng.normal(0, 0.002, len(n)))
        size_hits += law.size_interval[0] <= 0.3 <= law.size_interval[1]
        data_hits += law.data_interval[0] <= 0.35 <= law.data_interval[1]
        floor_hits += law.floor_interval[0] <= 0.8 <= law.floor_interval[1]
    assert within(size_hits, draws), size_hits
    assert within(data_hits, draws), data_hits
    assert within(floor_hits, draws), floor_hits


def test_noise_does_not_determine_a_loss_law():
    n, d = grid()
    rng = np.random.default_rng(3)
    law = fits.fit_loss_law(n, d, loss_law(n, d) + rng.normal(0, 0.3, len(n)))
    assert not law.determined
    rising = fits.fit_loss_law(n, d, [*range(1, 17)])
    assert (rising.size_interval, rising.determined) == (None, False), "its exponents are at the end of the search"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fits.student_t(0), "dof must be a whole number >= 1, got 0"),
        (lambda: fits.fit_parabola(SIZES[:2], [1, 2]), "at least 3 different sizes, got 2"),
        (lambda: fits.fit_parabola([1e5] * 4, [1, 2, 3, 4]), "at least 3 different sizes, got 1"),
        (lambda: fits.fit_parabola(SIZES, [1, 2, 3, math.nan]), "must be finite"),
        (lambda: fits.fit_parabola(SIZES, [1, 2, 3]), "as many values of each kind"),
        (lambda: fits.fit_power_law([1e12], [2.0]), "at least 2 different values, got 1"),
        (lambda: fits.fit_power_law([1e12, 1e13], [2.0, -1.0]), "must be > 0"),
        (lambda: fits.fit_loss_law(SIZES, SIZES, [4, 3, 2, 1]), "5 parameters .* got 4"),
        (lambda: fits.fit_loss_law([1e5] * 6, range(1, 7), [4, 3, 2, 1, 2, 3]), "at least 3 different sizes"),
        (lambda: fits.fit_loss_law(*grid(), [-1.0] * 16), "no loss law with positive factors"),
    ],
)
def test_points_that_fix_no_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- analysis ---

EXPONENT = 0.45


def isoflop_runs(rng, noise, budgets=BUDGETS, sizes=SIZES):
    """Runs whose best size is 1e6 (C / 5e12)^EXPONENT, with 6 FLOP a parameter and token."""
    runs = []
    for budget in budgets:
        best = math.log(1e6) + EXPONENT * math.log(budget / 5e12)
        for size in sizes:
            value = 30 * budget**-0.09 + 0.05 * (math.log(size) - best) ** 2 + rng.normal(0, noise)
            run = {"study": "isoflop", "budget": budget, "size": size, "value": value, "flops": budget}
            runs.append(run | {"tokens": budget / (6 * size), "flops_per_token": 6 * size})
    return runs


def test_isoflop_recovers_its_exponents():
    found = analysis.analyse(isoflop_runs(np.random.default_rng(4), 0.0))
    assert found["size"]["exponent"] == pytest.approx(EXPONENT, abs=1e-6)
    assert found["tokens"]["exponent"] == pytest.approx(1 - EXPONENT, abs=1e-6)
    assert found["loss"]["exponent"] == pytest.approx(-0.09, abs=1e-6)
    middle = found["budgets"][1]
    assert middle["size"] * middle["tokens"] * 6 == pytest.approx(middle["budget"])
    assert middle["size"] == pytest.approx(1e6 * (3e12 / 5e12) ** EXPONENT, rel=1e-6)


def test_the_intervals_of_isoflop_hold_its_exponents(monkeypatch):
    monkeypatch.setattr(fits, "fit_loss_law", lambda *args: pytest.fail("not of this test"))
    rng = np.random.default_rng(5)
    size_hits = tokens_hits = 0
    for _ in range(DRAWS):
        found = analysis._isoflop(isoflop_runs(rng, 0.01))
        assert found["dof"] == 4
        low, high = found["size"]["interval"]
        size_hits += low <= EXPONENT <= high
        low, high = found["tokens"]["interval"]
        tokens_hits += low <= 1 - EXPONENT <= high
    assert within(size_hits, DRAWS), size_hits
    assert within(tokens_hits, DRAWS), tokens_hits


def test_runs_without_a_loss_take_part_in_no_fit():
    runs = isoflop_runs(np.random.default_rng(6), 0.0)
    runs[1]["value"] = None
    runs[5]["value"] = math.nan
    runs[6]["value"] = None
    found = analysis.analyse(runs)
    assert [row["points"] for row in found["budgets"]] == [3, 2, 4, 4]
    assert "at least 3 different sizes, got 2" in found["budgets"][1]["not_fitted"]
    assert found["size"]["points"] == 3
    assert found["size"]["exponent"] == pytest.approx(EXPONENT, abs=1e-6)


def test_budgets_without_a_minimum_among_the_sizes_have_no_law():
    runs = isoflop_runs(np.random.default_rng(7), 0.0, budgets=(1e10, 2e10, 3e12))
    found = analysis.analyse(runs)
    assert [row["where"] for row in found["budgets"]] == ["below", "below", "inside"]
    assert "size" not in found["budgets"][0]
    reason = "1 of 3 budgets have a minimum among the sizes, 2 are needed"
    assert found["size"] == found["tokens"] == found["loss"] == {"not_fitted": reason}
