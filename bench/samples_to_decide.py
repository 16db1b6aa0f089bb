"""Samples that certification draws, against 100,000 per input, on populations of published logs.

    python bench/samples_to_decide.py

prints, for each population, the samples saved and the loss of certified accuracy (in points) of a
decision at one radius, of a whole table from one run, and of the mean radius of planned numbers of
samples (in percent). Operating characteristics of one radius are exact; tables and plans are
simulated with 12,000 inputs. Selection samples (at most 100, mostly 10 to 20) are not counted for
decisions; pilots are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import special, stats

from pyrobust.certify import (
    clopper_pearson_lower,
    gaussian_radius,
    radius_plan,
    randomised_lower,
    sequential_design,
)
from pyrobust.certify.radii import gaussian_needs
from pyrobust.certify.sequential import table_designs

sys.path.insert(0, str(Path(__file__).parent))
from smoothing_populations import POPULATIONS, draw

BUDGET, ALPHA = 100_000, 1e-3
PRICES = (5e-7, 1e-6, 1.6e-6)
TABLES = ([0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 1.0, 1.5, 2.0])


def fixed_power(p_null, z):
    """Probability that the textbook test with all samples certifies."""
    critical = stats.binom.isf(ALPHA, BUDGET, p_null) + 1
    return stats.binom.sf(critical - 1, BUDGET, special.ndtr(z))


def decision(z_null, z):
    design = sequential_design(gaussian_needs(z_null, 1.0), ALPHA, BUDGET)
    near = z_null + np.concatenate([-np.geomspace(0.005, 0.3, 12), np.geomspace(0.005, 0.3, 12)])
    grid = np.unique(np.concatenate([np.linspace(-2, 7, 91), near, [z_null]]))
    power, mean = np.array([design.operating(float(p)) for p in special.ndtr(grid)]).T
    lost = (fixed_power(design.p_null, z) - np.interp(z, grid, power)).mean()
    return BUDGET / np.interp(z, grid, mean).mean(), 100 * lost, design.error


def table(radii, z, generator):
    designs = table_designs([gaussian_needs(r, 1.0) for r in radii], ALPHA, BUDGET)
    upper, lower = (np.stack([getattr(d, n) for d in designs]) for n in ("upper", "lower"))
    p, count = special.ndtr(z), np.zeros(len(z), np.int64)
    status = np.zeros((len(z), len(radii)), np.int8)
    samples, certified = np.zeros(len(z)), np.zeros(len(z), np.int64)
    live, before = np.arange(len(z)), 0
    for i, n in enumerate(designs[0].looks):
        count[live] += generator.binomial(n - before, p[live])
        before, samples[live] = n, n
        now, seen = status[live], count[live][:, None]
        now = np.where((now == 0) & (seen >= upper[:, i]), 1, now)
        now = np.where((now == 0) & (seen <= lower[:, i]), -1, now)
        status[live] = now
        done = np.cumprod(now == 1, 1).sum(1)
        certified[live] = done
        following = now[np.arange(len(live)), np.minimum(done, len(radii) - 1)]
        live = live[(done < len(radii)) & (following >= 0)]
    lost = [
        100 * (fixed_power(d.p_null, z).mean() - (certified > j).mean())
        for j, d in enumerate(designs)
    ]
    return BUDGET / samples.mean(), max(lost), max(d.error for d in designs)


def radius_of(lower, n):
    return np.where(n > 0, np.maximum(gaussian_radius(lower, 1.0).numpy(), 0), 0)


def planned(z, generator, price):
    """As ``SmoothedClassifier.certify(planned=True)``: a pilot of 100, of 500 where it leads.

    The losses are against 100,000 samples and the bound of Clopper and Pearson, of the same bound
    and of the randomised one.
    """
    plan = radius_plan(lambda p: gaussian_radius(p, 1.0), ALPHA, BUDGET, price=price)
    p = special.ndtr(z)
    votes = generator.binomial(100, p)
    drawn = np.where(votes > 50, 500, 100)
    votes = votes + np.where(votes > 50, generator.binomial(400, p), 0)
    sizes = plan.choose(torch.from_numpy(votes), torch.from_numpy(drawn)).numpy()
    fresh, trials = generator.binomial(sizes, p), np.maximum(sizes, 1)
    shares = generator.uniform(size=len(p))
    whole = clopper_pearson_lower(generator.binomial(BUDGET, p), BUDGET, ALPHA)
    reference = radius_of(whole, np.full(len(p), BUDGET)).mean()
    bounds = (
        clopper_pearson_lower(fresh, trials, ALPHA),
        randomised_lower(fresh, trials, ALPHA, shares),
    )
    losses = [100 * (1 - radius_of(bound, sizes).mean() / reference) for bound in bounds]
    return (BUDGET + 100) / (sizes + drawn).mean(), *losses


def main():
    for name in POPULATIONS:
        z, generator = draw(name, 12_000), np.random.default_rng(0)
        print(name)
        for z_null in (0.5, 1.0, 2.0, 3.0):
            saved, lost, error = decision(z_null, z)
            print(
                f"  radius {z_null:.1f} sigma: {saved:6.1f}x, {lost:.2f} points, error {error:.2e}"
            )
        for radii in TABLES:
            saved, lost, error = table(radii, z, generator)
            shown = ", ".join(f"{r:g}" for r in radii)
            print(f"  table {shown}: {saved:.1f}x, {lost:.2f} points, error {error:.2e}")
        for price in PRICES:
            saved, plain, randomised = planned(z, generator, price)
            print(
                f"  planned radius, price {price:.1e}: {saved:.1f}x, {plain:.2f}% of the mean "
                f"radius, randomised {randomised:.2f}%",
                flush=True,
            )


if __name__ == "__main__":
    main()
