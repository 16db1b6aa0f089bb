"""Sequential designs: exact error, against enumeration, simulation and the fixed-sample test."""

import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy import special, stats

from pyrobust.certify import (
    SMOOTHING_POPULATION,
    Population,
    clopper_pearson_lower,
    fixed_design,
    look_schedule,
    optimal_design,
    sequential_design,
    spending_design,
)
from pyrobust.certify.design import finished
from pyrobust.certify.design_cache import cached_design, design_folder

ALPHA = 0.001
DESIGNS = {"optimal": optimal_design, "spending": spending_design}
KINDS = [*DESIGNS, "fixed"]


def exact_claims(p, design, *, binding):
    """Probability of a claim in rational arithmetic."""
    p, state, total, before = Fraction(p), {0: Fraction(1)}, Fraction(0), 0
    for n, upper, lower in zip(design.looks, design.upper, design.lower, strict=True):
        step = int(n) - before
        before = int(n)
        pmf = [comb(step, j) * p**j * (1 - p) ** (step - j) for j in range(step + 1)]
        spread: dict[int, Fraction] = {}
        for k, mass in state.items():
            for j, weight in enumerate(pmf):
                spread[k + j] = spread.get(k + j, Fraction(0)) + mass * weight
        total += sum(mass for k, mass in spread.items() if k >= upper)
        state = {k: m for k, m in spread.items() if k < upper and (k > lower or not binding)}
    return total


@pytest.mark.parametrize("kind", DESIGNS)
@pytest.mark.parametrize("p_null", [0.5, 0.8, 0.97])
def test_error_equals_rational_arithmetic(kind, p_null):
    design = DESIGNS[kind](p_null, 0.05, look_schedule(80))
    binding = kind == "optimal"
    exact = exact_claims(p_null, design, binding=binding)
    assert exact <= Fraction(0.05)
    assert float(exact) == pytest.approx(design.error, rel=1e-9)
    power = design.operating(0.99)[0]
    assert power == pytest.approx(float(exact_claims(0.99, design, binding=True)), rel=1e-9)


@pytest.mark.parametrize("kind", DESIGNS)
@pytest.mark.parametrize("z_null", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_error_uses_nearly_all_of_alpha_and_never_more(kind, z_null):
    design = DESIGNS[kind](float(special.ndtr(z_null)), ALPHA, look_schedule(10_000))
    # Near p = 1 few counts are possible, and each takes a large step of the error.
    assert (0.9 if z_null < 3 else 0.7) * ALPHA < design.error <= ALPHA
    assert (design.lower < design.upper).all()
    assert design.lower[-1] == design.upper[-1] - 1
    claims = [design.operating(float(special.ndtr(z_null + d)))[0] for d in (-0.5, -0.1, 0, 0.1, 1)]
    assert claims == sorted(claims)
    assert claims[2] <= design.error * (1 + 1e-12)


def simulate(design, p, paths, generator):
    count, state, before = np.zeros(paths, np.int64), np.zeros(paths, np.int8), 0
    samples = np.zeros(paths, np.int64)
    for n, upper, lower in zip(design.looks, design.upper, design.lower, strict=True):
        live = np.flatnonzero(state == 0)
        count[live] += generator.binomial(n - before, p, live.size)
        before, samples[live] = n, n
        state[live[count[live] >= upper]] = 1
        state[live[count[live] <= lower]] = -1
    assert (state != 0).all()
    return (state == 1).mean(), samples.mean()


@pytest.mark.parametrize("kind", DESIGNS)
def test_simulated_paths_agree_with_the_recursion(kind):
    design = DESIGNS[kind](0.6, 0.02, look_schedule(2000))
    generator, paths = np.random.default_rng(0), 40_000
    for p in (0.6, 0.64, 0.9):
        claims, samples = simulate(design, p, paths, generator)
        power, mean = design.operating(p)
        assert abs(claims - power) < 5 * (power * (1 - power) / paths) ** 0.5 + 1e-12
        assert samples == pytest.approx(mean, rel=0.05)


def simulate_many(design, p, paths, generator):
    """Share of claims among ``paths`` independent paths, moved from look to look as a histogram of
    their counts: what paths of one count draw together is multinomial.
    """
    counts, numbers, claims, before = np.array([0]), np.array([paths]), 0, 0
    for n, upper, lower in zip(design.looks, design.upper, design.lower, strict=True):
        step = int(n) - before
        before = int(n)
        hits = np.arange(step + 1)
        weights = stats.binom.pmf(hits, step, p)
        kept = weights > 1e-14
        drawn = generator.multinomial(numbers, weights[kept] / weights[kept].sum())
        spread = np.zeros(int(counts[-1]) + step + 1, np.int64)
        for count, row in zip(counts, drawn, strict=True):
            spread[count + hits[kept]] += row
        claims += int(spread[upper:].sum())
        spread[upper:] = 0
        spread[: lower + 1] = 0
        counts = np.flatnonzero(spread)
        numbers = spread[counts]
        if counts.size == 0:
            break
    return claims / paths


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("z_null", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_ten_million_null_paths_keep_the_error(kind, z_null):
    p_null = float(special.ndtr(z_null))
    design = sequential_design(p_null, ALPHA, 100_000, kind=kind)
    paths = 10_000_000
    claims = simulate_many(design, p_null, paths, np.random.default_rng(1))
    null = design.operating(p_null)[0]
    print(f"{kind} z={z_null}: simulated {claims:.3e}, exact {null:.3e}, bound {design.error:.3e}")
    assert abs(claims - null) < 5 * (ALPHA / paths) ** 0.5
    assert claims < ALPHA + 5 * (ALPHA / paths) ** 0.5


def test_fixed_design_claims_where_the_clopper_pearson_bound_does():
    for p_null, alpha, budget in ((0.5, 0.05, 37), (0.9, 0.001, 200), (0.99, 0.001, 50)):
        design = fixed_design(p_null, alpha, budget)
        above = clopper_pearson_lower(np.arange(budget + 1), budget, alpha) > p_null
        assert (np.arange(budget + 1) >= design.upper[0]).tolist() == above.tolist()
        exact = exact_claims(p_null, design, binding=True)
        assert exact <= Fraction(alpha)
        assert float(exact) == pytest.approx(design.error, rel=1e-9)


@pytest.mark.parametrize("kind", DESIGNS)
def test_most_inputs_are_decided_with_a_small_part_of_the_budget(kind):
    budget, p_null = 20_000, float(special.ndtr(1.0))
    design = DESIGNS[kind](p_null, ALPHA, look_schedule(budget))
    z, mass = SMOOTHING_POPULATION.cells(1.0)
    results = np.array([design.operating(float(p)) for p in special.ndtr(z)])
    critical = stats.binom.isf(ALPHA, budget, p_null) + 1
    fixed = stats.binom.sf(critical - 1, budget, special.ndtr(z))
    assert mass @ results[:, 1] < budget / 25
    assert mass @ (fixed - results[:, 0]) < 0.005


def test_optimal_design_costs_less_than_spending():
    looks, p_null, price = look_schedule(5000), 0.7, 4e-6
    z, mass = SMOOTHING_POPULATION.cells(float(special.ndtri(p_null)))
    costs = {}
    for kind, make in DESIGNS.items():
        design = make(p_null, ALPHA, looks)
        results = np.array([design.operating(float(p)) for p in special.ndtr(z)])
        missed = np.where(special.ndtr(z) > p_null, 1 - results[:, 0], 0)
        costs[kind] = mass @ (missed + price * results[:, 1])
    assert costs["optimal"] < costs["spending"]


def test_any_population_gives_a_valid_test():
    hopeless = Population(z=(-3.0, 0.0), survival=(1.0, 0.0))
    easy = Population(z=(3.0, 5.0), survival=(1.0, 0.0))
    for population in (hopeless, easy):
        design = optimal_design(0.75, ALPHA, look_schedule(2000), population=population)
        assert design.error <= ALPHA


def test_budget_too_small_to_decide_never_claims():
    design = sequential_design(0.99, ALPHA, 50)
    assert design.operating(1 - 1e-12)[0] == 0


def test_schedule_ends_with_the_budget():
    for budget in (1, 9, 10, 11, 100_000):
        looks = look_schedule(budget)
        assert looks[-1] == budget
        assert (np.diff(looks) > 0).all()


def test_designs_are_cached_and_read_only():
    design = sequential_design(0.6, 0.01, 200)
    assert sequential_design(0.6, 0.01, 200) is design
    with pytest.raises(ValueError, match="read-only"):
        design.upper[0] = 0


def test_designs_on_disk_are_used_only_where_the_recursion_confirms_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROBUST_CACHE", str(tmp_path))
    calls = []

    def make():
        calls.append(1)
        return optimal_design(0.7, 0.01, look_schedule(150))

    key = {"p_null": 0.7, "alpha": 0.01, "budget": 150}
    made = cached_design(key, make)
    again = cached_design(key, make)
    assert len(calls) == 1
    for name in ("looks", "upper", "lower"):
        assert np.array_equal(getattr(made, name), getattr(again, name))
    assert again.error == made.error
    (place,) = (tmp_path / "designs").iterdir()
    whole = place.read_text()
    kept = json.loads(whole)
    easier = [max(0, n - 3) for n in kept["upper"]]
    for damage in (
        whole[: len(whole) // 2],
        json.dumps(kept | {"upper": easier, "lower": [n - 1 for n in easier]}),
        json.dumps(kept | {"error": kept["error"] / 2}),
        json.dumps(kept | {"looks": kept["looks"][:-1]}),
        json.dumps(kept | {"key": "another"}),
        "[]",
    ):
        place.write_text(damage)
        assert np.array_equal(cached_design(key, make).upper, made.upper)
        assert place.read_text() == whole
    assert len(calls) == 7
    # A folder that cannot be made is no error, and "off" keeps nothing.
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file"), "off"):
        monkeypatch.setenv("PYROBUST_CACHE", name)
        cached_design(key, make)
    assert len(calls) == 9
    assert design_folder() is None


def test_the_folder_of_designs_follows_the_environment(monkeypatch):
    monkeypatch.delenv("PYROBUST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(design_folder()) == "/somewhere/pyrobust/designs"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequential_design(0.5, 0.001, 10, kind="best"), "one of optimal, spending, fixed"),
        (lambda: sequential_design(0.0, 0.001, 10), "p_null must lie in the open interval"),
        (lambda: sequential_design(0.5, 1.0, 10), "alpha must lie in the open interval"),
        (lambda: sequential_design(0.5, 0.1, 0), "budget must be at least 1"),
        (lambda: spending_design(0.5, 0.1, np.array([5, 5])), "positive and increasing"),
        (lambda: optimal_design(0.5, 0.1, look_schedule(9), price=0.0), "price must be finite and"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_fixed_design_uses_the_level_and_no_more():
    draw = np.random.default_rng(0)
    for p, alpha in zip(
        draw.uniform(0.05, 0.99, 150), 10 ** draw.uniform(-4, -0.5, 150), strict=True
    ):
        design = fixed_design(float(p), float(alpha), int(draw.integers(5, 400)))
        claim, budget = int(design.upper[0]), int(design.looks[0])
        assert design.error <= alpha
        assert stats.binom.sf(claim - 1, budget, p) <= alpha
        assert claim == 0 or stats.binom.sf(claim - 2, budget, p) > alpha * (1 - 1e-6)


def test_a_kept_design_that_errs_more_than_alpha_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROBUST_CACHE", str(tmp_path))
    key = {"p_null": 0.6, "alpha": 0.01, "budget": 40}
    made = optimal_design(0.6, 0.01, look_schedule(40))
    cached_design(key, lambda: made)
    (place,) = (tmp_path / "designs").iterdir()
    kept = json.loads(place.read_text())
    upper, lower = made.upper - 3, np.minimum(made.lower, made.upper - 4)
    lower[-1] = upper[-1] - 1
    lax = finished(0.6, 0.01, made.looks.copy(), upper, lower, binding=True)
    assert lax.error > 0.01
    kept |= {"upper": upper.tolist(), "lower": lower.tolist(), "error": lax.error}
    place.write_text(json.dumps(kept))
    assert cached_design(key, lambda: made) is made
