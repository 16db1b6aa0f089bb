"""WINNER / SIREN²: initialisation, centroid, scale laws, and the spectral bottleneck."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from pyrobust.nn import (
    SIREN,
    Sine,
    activation_spectrum,
    empirical_ntk,
    fit_signal,
    ntk_spectrum,
    siren_uniform_,
    spectral_centroid,
    winner_init_,
    winner_normal_,
    winner_scales,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_base_initialisation():
    net = SIREN(2, 256, 1, hidden_layers=4)
    assert net.linears[0].weight.abs().max() <= 1 / 2
    bound = math.sqrt(6 / 256) / 30
    for layer in [*net.linears[1:], net.output]:
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    x = torch.rand(4000, 2) * 2 - 1
    for layer in (2, 3, 4):
        pre = 30 * net.hidden(x, layer - 1) @ net.linears[layer - 1].weight.T  # without the bias
        assert 0.9 < pre.std() < 1.15
    # arcsine law: half of |sin| lies above sin(pi/4)
    share = (net.hidden(x, 1).abs() > math.sin(math.pi / 4)).double().mean()
    assert 0.45 < share < 0.55


def test_winner_changes_the_first_two_weights_only_and_by_the_stated_scale():
    net = SIREN(1, 400, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    winner_init_(net, 300.0, 2.0, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    after = net.state_dict()
    for name, value in before.items():
        changed = name in ("linears.0.weight", "linears.1.weight", "winner_applied")
        assert torch.equal(after[name], value) != changed
    for index, scale in ((0, 300.0), (1, 2.0)):
        noise = (after[f"linears.{index}.weight"] - before[f"linears.{index}.weight"]) * 30
        error = scale / math.sqrt(2 * noise.numel())
        assert abs(noise.std() - scale) < 3 * error
    again = SIREN(1, 400, 1)
    again.load_state_dict(before)
    winner_init_(again, 300.0, 2.0, generator=generator())
    assert torch.equal(again.linears[0].weight, net.linears[0].weight)


def test_zero_scales_change_nothing_and_a_second_call_is_refused():
    net = SIREN(1, 8, 1)
    before = net.linears[0].weight.clone()
    winner_init_(net, 0.0, 0.0)
    assert torch.equal(net.linears[0].weight, before)
    with pytest.raises(ValueError, match="has its noise already"):
        winner_init_(net, 1.0, 1.0)
    net.reset_parameters()
    winner_init_(net, 1.0, 1.0)


def test_initialisers_of_tensors_make_the_same_network_of_plain_layers():
    net = SIREN(2, 32, 1, hidden_layers=3)
    net.reset_parameters(generator())
    winner_init_(net, 20.0, 0.5, generator=generator(1))
    source, noise, plain = generator(), generator(1), []
    for i, layer in enumerate([*net.linears, net.output]):
        mine = nn.Linear(layer.in_features, layer.out_features)
        assert siren_uniform_(mine.weight, 30.0, first=i == 0, generator=source) is mine.weight
        nn.init.uniform_(mine.bias, -(layer.in_features**-0.5), layer.in_features**-0.5, source)
        plain.append(mine)
    for mine, scale in zip(plain, (20.0, 0.5), strict=False):
        winner_normal_(mine.weight, scale, generator=noise)
    for layer, mine in zip([*net.linears, net.output], plain, strict=True):
        assert torch.equal(layer.weight, mine.weight)
        assert torch.equal(layer.bias, mine.bias)
        assert mine.weight.requires_grad
        assert mine.weight.is_leaf
    for call in (lambda w: siren_uniform_(w), lambda w: winner_normal_(w, 1.0)):
        with pytest.raises(ValueError, match="two axes"):
            call(torch.ones(3))
    with pytest.raises(ValueError, match="scale"):
        winner_normal_(torch.ones(3, 3), -1.0)
    with pytest.raises(ValueError, match="omega"):
        siren_uniform_(torch.ones(3, 3), 0.0)


@pytest.mark.parametrize("k", [3, 100, 511])
def test_centroid_of_a_tone(k):
    n = 1024
    tone = torch.sin(2 * torch.pi * k * torch.arange(n, dtype=torch.float64) / n)
    assert spectral_centroid(tone, 1) == pytest.approx(2 * k / n, abs=1e-6)
    assert spectral_centroid(5 * tone, 1) == pytest.approx(2 * k / n, abs=1e-6)


def test_centroid_of_noise_constant_and_zero():
    noise = torch.randn(20_000, generator=generator())
    assert spectral_centroid(noise, 1) == pytest.approx(0.5, abs=0.02)
    assert spectral_centroid(torch.ones(64), 1) == pytest.approx(0, abs=1e-12)
    with pytest.warns(UserWarning, match="zero everywhere"):
        assert spectral_centroid(torch.zeros(64), 1) == 0


def test_centroid_of_a_colour_image_against_numpy():
    image = torch.rand(12, 16, 3, generator=generator(), dtype=torch.float64)
    image[4] = 0  # a row of zeros counts 0
    rows = []
    for r in range(12):
        for c in range(3):
            s = np.abs(np.fft.rfft(image[r, :, c].numpy()))
            f = np.fft.rfftfreq(16)
            rows.append((f * s).sum() / s.sum() if s.sum() > 0 else 0.0)
    assert spectral_centroid(image, 2) == pytest.approx(2 * np.mean(rows), abs=1e-12)


def test_scale_laws():
    s0, s1 = winner_scales(0.6, 1)
    assert (round(s0, 1), round(s1, 6)) == (3447.5, 1.8)
    assert winner_scales(0.0, 1) == (0.0, 0.0)
    assert winner_scales(0.0, 2) == (0.0, 0.0)
    for features in (1, 2):
        values = [winner_scales(c / 20, features) for c in range(21)]
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(values))
    assert winner_scales(0.6, 2, channels=3) == pytest.approx(winner_scales(0.2, 2))
    assert winner_scales(0.9, 2, channels=3, compat="repo") == pytest.approx(winner_scales(0.1, 2))
    assert winner_scales(0.6, 1, n_samples=75_000)[0] == pytest.approx(s0 / 2)
    assert winner_scales(0.3, 3, preset="image") == winner_scales(0.3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Sine(0.0), ValueError, "omega must be finite and positive"),
        (lambda: SIREN(1, 8, 1, hidden_layers=1), ValueError, "hidden_layers must be at least 2"),
        (lambda: spectral_centroid(torch.ones(1), 1), ValueError, "at least 2 samples"),
        (lambda: spectral_centroid(torch.ones(2, 2, 2), 1), ValueError, "1 sample axes"),
        (lambda: spectral_centroid(torch.tensor([1, float("nan")]), 1), ValueError, "finite"),
        (lambda: spectral_centroid(torch.ones(4) * 1j, 1), TypeError, "must be real"),
        (lambda: winner_scales(1.2, 1), ValueError, r"centroid must lie in \[0, 1\]"),
        (lambda: winner_scales(0.5, 3), ValueError, "no scale law for in_features=3"),
        (lambda: winner_init_(SIREN(1, 4, 1), -1, 0), ValueError, "s0 must be finite and at"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_activation_centroid_grows_with_both_scales():
    coords = torch.linspace(-1, 1, 1024).unsqueeze(1)
    f = torch.linspace(0, 1, 513)

    def centroid(s0, s1, layer):
        net = SIREN(1, 128, 1)
        net.reset_parameters(generator(1))
        spectrum = activation_spectrum(
            winner_init_(net, s0, s1, generator=generator(2)), coords, layer=layer
        )
        return float((f * spectrum).sum() / spectrum.sum())

    first = [centroid(s0, 0.0, 1) for s0 in (0.0, 100.0, 400.0)]
    second = [centroid(20.0, s1, 2) for s1 in (0.0, 1.5, 4.0)]
    assert first == sorted(first)
    assert first[2] > 2 * first[0]
    assert second == sorted(second)
    assert second[2] > second[0]


def test_tangent_kernel_is_psd_and_matches_functional_jacobians():
    net = SIREN(1, 16, 1, hidden_layers=2).double()
    coords = torch.linspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
    kernel = empirical_ntk(net, coords)
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def single(p, x):
        return torch.func.functional_call(net, p, x.unsqueeze(0)).squeeze()

    jacobians = torch.func.vmap(torch.func.jacrev(single), (None, 0))(parameters, coords)
    flat = torch.cat([j.flatten(1) for j in jacobians.values()], 1)
    torch.testing.assert_close(kernel, flat @ flat.T / 64**2, rtol=1e-4, atol=1e-12)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12
    spectrum = ntk_spectrum(net, coords)
    assert spectrum.shape == (33,)
    # Parseval: over all frequencies the spectrum sums to the trace
    total = 2 * spectrum.sum() - spectrum[0] - spectrum[-1]
    torch.testing.assert_close(total, kernel.trace())


def test_best_state_is_kept():
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    coords = torch.linspace(-1, 1, 20).unsqueeze(1)
    history = fit_signal(net, coords, 3 * coords, steps=60, lr=0.4, decay=1.0, max_points=20)
    final = -10 * math.log10((net(coords) - 3 * coords).square().mean().item())
    assert final == pytest.approx(max(history), abs=1e-3)


def test_large_signals_are_fitted_in_random_parts():
    class Counting(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                seen.append(x.flatten().tolist())
            return super().forward(x)

    seen, net = [], Counting(1, 1)
    coords = torch.linspace(-1, 1, 200).unsqueeze(1)
    options = {"steps": 60, "lr": 0.4, "decay": 1.0, "max_points": 32}
    history = fit_signal(net, coords, 3 * coords, generator=generator(), **options)
    assert {len(part) for part in seen} == {32}
    assert len({x for part in seen for x in part}) == 200
    assert max(history) > history[0] + 10


def band_limited(low, high, seed=0, n=2048):
    spectrum = torch.zeros(n // 2 + 1, dtype=torch.complex64)
    band = slice(int(low * n / 2), int(high * n / 2))
    noise = torch.randn(spectrum[band].shape, dtype=torch.complex64, generator=generator(seed))
    spectrum[band] = noise
    signal = torch.fft.irfft(spectrum, n)
    return (signal / signal.abs().max()).unsqueeze(1)


def psnr_after_training(target, *, first_omega=30.0, winner=False, rescale=False, seed=0):
    n = len(target)
    coords = torch.linspace(-1, 1, n).unsqueeze(1)
    net = SIREN(1, 64, 1, hidden_layers=4, first_omega=first_omega)
    net.reset_parameters(generator(seed))
    if winner:
        scales = winner_scales(spectral_centroid(target, 1), 1, n_samples=n if rescale else None)
        winner_init_(net, *scales, generator=generator(seed + 99))
    return max(fit_signal(net, coords, target, steps=250, lr=5e-4, decay=1.0))


def test_breaks_the_spectral_bottleneck():
    target = band_limited(0.4, 0.8)
    collapsed = psnr_after_training(target)
    energy = -10 * math.log10(target.square().mean().item())
    assert collapsed < energy + 1  # the plain network has not started to fit
    assert psnr_after_training(target, winner=True) >= collapsed + 25


@pytest.mark.slow
def test_beats_a_high_first_frequency_in_the_mean_of_three_signals():
    gains = []
    for seed in range(3):
        target = band_limited(0.4, 0.8, seed)
        fast = psnr_after_training(target, first_omega=3000.0, seed=seed)
        paper = psnr_after_training(target, winner=True, seed=seed) - fast
        rescaled = psnr_after_training(target, winner=True, rescale=True, seed=seed) - fast
        gains.append((paper, rescaled))
    paper, rescaled = np.mean(gains, 0)
    print(f"gain over first_omega=3000: {paper:.1f} dB, with the rescaled scale {rescaled:.1f} dB")
    assert paper >= 0
    assert rescaled >= 5


@pytest.mark.slow
def test_stays_usable_on_a_smooth_target():
    target = band_limited(0.005, 0.02)
    noisy = psnr_after_training(target, winner=True)
    assert noisy >= 45
    assert noisy > psnr_after_training(target, first_omega=3000.0)


def test_network_for_a_signal():
    net = SIREN.for_signal(
        torch.rand(8, 16, 3), sample_dims=2, hidden_features=32, generator=generator()
    )
    assert net(torch.rand(5, 2)).shape == (5, 3)
    assert bool(net.winner_applied)
