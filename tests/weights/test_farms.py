"""FARMS: shape bias gone, Hill's estimate right, pruning ratios exact, layer-wise rates."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pyrobust.train import TempBalance
from pyrobust.weights import (
    esd,
    farms_esd,
    hill_alpha,
    layer_sparsity,
    prune_,
    spectral_report,
)


def test_spectrum_is_that_of_the_gram_matrix():
    w = torch.randn(12, 7, dtype=torch.float64)
    np.testing.assert_allclose(esd(w), np.linalg.eigvalsh((w.t() @ w).numpy()), rtol=1e-10)
    stack = torch.randn(3, 5, 9)
    for one, row in zip(stack, esd(stack), strict=True):
        torch.testing.assert_close(esd(one), row)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_shape_bias_is_gone(heavy):
    generator = np.random.default_rng(0)
    full, farms = [], []
    for columns in (256, 512, 1024, 4096):
        shape = (256, columns)
        draw = generator.standard_t(3, shape) if heavy else generator.standard_normal(shape)
        w = torch.from_numpy(draw).float()
        full.append(hill_alpha(esd(w)).alpha)
        farms.append(hill_alpha(farms_esd(w, rows=128, windows=5)).alpha)
    assert max(full) - min(full) > (2.5 if heavy else 3), full
    assert max(farms) - min(farms) < (0.15 if heavy else 0.1), farms


def test_one_window_is_the_plain_spectrum():
    w = torch.randn(20, 20)
    assert torch.equal(farms_esd(w, rows=20, windows=1), esd(w))


def test_windows_stay_inside_and_cover_both_ends():
    # a matrix of rank one per entry: the energy of a window tells which entries it holds
    w = torch.arange(1.0, 7 * 11 + 1, dtype=torch.float64).reshape(7, 11)
    for rows, aspect, count in ((3, 1.0, 3), (2, 2.0, 4), (7, 1.5, 2), (5, 4.0, 3)):
        height = min(rows, int(11 / aspect))
        width = int(height * aspect)
        pooled = farms_esd(w, rows=rows, aspect=aspect, windows=count)
        step = [max(1, (n - k) // (count - 1)) for n, k in ((7, height), (11, width))]
        top, left = (
            sorted({min(i * s, n - k) for i in range(count)})
            for s, n, k in zip(step, (7, 11), (height, width), strict=True)
        )
        held = [w[i : i + height, j : j + width] for i in top for j in left]
        energy = sum(float(part.square().sum()) for part in held)
        assert float(pooled.sum()) == pytest.approx(energy)


def test_transposing_changes_nothing():
    w = torch.randn(200, 500)
    alphas = [hill_alpha(farms_esd(v, rows=100)).alpha for v in (w, w.t())]
    assert abs(alphas[0] - alphas[1]) < 0.02


def test_a_convolution_pools_its_kernel_positions():
    w = torch.randn(16, 8, 3, 3)
    expected = [
        torch.linalg.svdvals(w[b * 8 : b * 8 + 8, :, i, j]).square() / 2
        for b in range(2) for i in range(3) for j in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(farms_esd(w), torch.cat(expected).sort().values)


def test_hill_on_pareto_samples_and_its_scale():
    samples = torch.from_numpy((1 - np.random.default_rng(0).random(200_000)) ** (-1 / 1.5))
    fit = hill_alpha(samples)
    assert fit.alpha == pytest.approx(2.5, abs=0.02)
    assert fit.ks < 0.01
    assert hill_alpha(7 * samples).alpha == pytest.approx(fit.alpha, rel=1e-9)


def test_hill_is_the_likeliest_exponent_of_the_tail():
    samples = torch.from_numpy(np.sort(np.random.default_rng(1).pareto(1.5, 400) + 1))
    fit = hill_alpha(samples)
    tail = samples[samples >= fit.xmin].numpy()
    assert len(tail) == 200
    shape, _, _ = stats.pareto.fit(tail, floc=0, fscale=fit.xmin)
    assert fit.alpha == pytest.approx(1 + shape, rel=1e-4)


def test_hill_agrees_with_the_powerlaw_package():
    powerlaw = pytest.importorskip("powerlaw")
    samples = torch.from_numpy(np.sort(np.random.default_rng(1).pareto(1.5, 400) + 1))
    ours = hill_alpha(samples)
    theirs = powerlaw.Fit(samples.numpy(), xmin=ours.xmin, verbose=False).power_law
    assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-6)
    assert ours.ks == pytest.approx(theirs.D, abs=0.01)


@pytest.mark.parametrize("method", ["ks", "peak"])
def test_searched_thresholds_find_where_the_tail_begins(method):
    generator = np.random.default_rng(0)
    tail = (1 - generator.random(1500)) ** (-1 / 1.5)
    samples = torch.from_numpy(np.concatenate([generator.random(300), tail]))
    fit = hill_alpha(samples, method)
    assert fit.alpha == pytest.approx(2.5, abs=0.2)
    assert 0.8 < fit.xmin < 2
    brute = min(
        (abs_distance(samples, i) for i in range(len(samples) - 1)), key=lambda pair: pair[0]
    )
    if method == "ks":
        assert fit.ks == pytest.approx(brute[0], abs=1e-9)


def abs_distance(samples, start):
    values = np.sort(samples.numpy())[start:]
    alpha = 1 + len(values) / np.log(values / values[0]).sum()
    seen = np.arange(len(values)) / len(values)
    return np.abs(1 - (values / values[0]) ** (1 - alpha) - seen).max(), alpha


def test_fresh_layers_of_mixed_shapes_look_alike():
    widths = [64, 512, 64, 512, 64, 64]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])  # noqa: RUF007
    spread = {}
    for estimator in ("full", "farms"):
        alphas = [row.alpha for row in spectral_report(model, estimator, rows=48)]
        spread[estimator] = max(alphas) - min(alphas)
    assert spread["farms"] < 0.15
    assert spread["full"] > 1.5


@pytest.mark.filterwarnings("ignore:layer_sparsity")
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
def test_ratios_meet_the_target(epsilon, target):
    alphas, numel = torch.rand(9) * 4 + 2, torch.randint(100, 10_000, (9,))
    ratios = layer_sparsity(alphas, numel, target, epsilon)
    assert float((ratios * numel).sum() / numel.sum()) == pytest.approx(target, abs=1e-4)
    assert float(ratios.min()) >= 0
    assert float(ratios.max()) < 1
    order = torch.randperm(9)
    torch.testing.assert_close(
        layer_sparsity(alphas[order], numel[order], target, epsilon), ratios[order]
    )
    same = layer_sparsity(torch.full((9,), 3.0), numel, target, epsilon)
    torch.testing.assert_close(same, torch.full((9,), target, dtype=torch.float64))
    assert bool((ratios[alphas.argsort()].diff() >= -1e-12).all())


def test_limited_ratios_warn():
    with pytest.warns(UserWarning, match="were limited"):
        layer_sparsity(torch.tensor([2.0, 5.0]), torch.tensor([100, 100]), 0.9)


def test_pruning_removes_the_least():
    model = nn.Linear(10, 4, bias=False)
    before = model.weight.detach().clone()
    prune_(model, {"weight": 0.5})
    assert int((model.weight == 0).sum()) == 20
    assert float(before[model.weight == 0].abs().max()) <= float(
        before[model.weight != 0].abs().min()
    )
    model.weight.data.copy_(before)
    x = torch.randn(50, 10) * torch.linspace(0.1, 3, 10)
    prune_(model, {"weight": 0.3}, "wanda", {"weight": x})
    assert (model.weight == 0).sum(1).tolist() == [3] * 4
    score = before.abs() * x.square().mean(0).sqrt()
    for row, kept in zip(score, model.weight != 0, strict=True):
        assert float(row[~kept].max()) <= float(row[kept].min())
    with pytest.raises(ValueError, match="such as weight; got 'bias'"):
        prune_(model, {"bias": 0.5})


def test_layer_wise_rates_reach_the_right_parameters():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    balance = TempBalance(model, 0.5, 1.5, exclude=("5.weight",))
    groups = {group["layer"]: group for group in balance.param_groups(0.1)}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates["0"] == rates["1"]
    assert rates["2"] == rates["3"]
    assert rates["5"] == pytest.approx(0.1)
    assert sorted([rates["0"], rates["2"]]) == pytest.approx([0.05, 0.15])
    alphas = {row.name: row.alpha for row in spectral_report(model)}
    assert (alphas["0.weight"] < alphas["2.weight"]) == (rates["0"] < rates["2"])
    assert groups["2"]["params"][0] is model[2].weight
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(balance.param_groups(0.1), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    kept = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    balance.step(optimizer, 0.01)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.015)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], v) for p, v in kept.items())


def test_refusals():
    w = torch.randn(8, 8)
    with pytest.raises(ValueError, match="aspect must be finite and positive"):
        farms_esd(w, aspect=0)
    with pytest.raises(ValueError, match="rows must be at least 2"):
        farms_esd(w, rows=1)
    with pytest.raises(ValueError, match="two or four axes"):
        farms_esd(torch.randn(3, 3, 3))
    with pytest.raises(ValueError, match="must be finite"):
        farms_esd(w / 0)
    with pytest.raises(ValueError, match="target"):
        layer_sparsity(torch.ones(2), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="lr_min"):
        TempBalance(nn.Linear(2, 2), 2.0, 1.0)
    with pytest.warns(UserWarning, match="alpha is NaN"):
        assert math.isnan(hill_alpha(torch.zeros(50)).alpha)
    with pytest.warns(UserWarning, match="no tail exponent"):
        assert math.isnan(spectral_report({"w": torch.zeros(8, 8)})[0].alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_have_the_spectrum_of_their_float32_values(dtype):
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(farms_esd(weight), farms_esd(weight.float()))
    assert esd(weight.double()).dtype == torch.float64
