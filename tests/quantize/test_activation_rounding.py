"""Rounded activations: the module, its gradients, and learned rounding of weights and inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.nn import AffineRounding, RoundedInput
from pyrobust.nn.affine_rounding import affine_round
from pyrobust.quantize import LearnedRounding, learned_rounding
from pyrobust.quantize.learned_activation import LearnedActivation

from .small_models import trained_digits_cnn

FAST = {"iterations": 60, "batch_size": 32}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count=128, features=16, seed=1):
    return randn(count, features, seed=seed) @ randn(features, features, seed=2) / 3


def mlp():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).eval()


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    ).eval()  # fmt: skip


def test_values_are_the_nearest_of_equally_spaced_levels():
    for bits in range(1, 9):
        rounding = AffineRounding(bits).set(torch.tensor(0.37), torch.tensor(-0.9))
        x = 3 * randn(500)
        levels = -0.9 + 0.37 * torch.arange(2**bits)
        nearest = levels[(x[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(rounding(x), nearest)
        assert rounding.bits == bits
        assert rounding(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bits must be at most 8; got 9"):
        AffineRounding(9)


def test_gradients_are_those_of_learned_step_sizes():
    x = (2 * randn(200)).requires_grad_()
    step, low = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.7, requires_grad=True)
    weights = randn(200, seed=3)
    (affine_round(x, step, low, 8.0) * weights).sum().backward()
    real = ((x - low) / step).detach()
    q = real.round().clamp(0, 7)
    inside = (real >= 0) & (real <= 7)
    torch.testing.assert_close(x.grad, torch.where(inside, weights, 0.0))
    torch.testing.assert_close(step.grad, ((q - torch.where(inside, real, 0.0)) * weights).sum())
    torch.testing.assert_close(low.grad, torch.where(inside, 0.0, weights).sum())


def test_the_search_beats_the_full_range_where_there_are_outliers_and_keeps_zero():
    x = torch.cat([randn(5000), torch.tensor([30.0])])
    found = LearnedActivation(x, 4, 0.5).module()
    full = AffineRounding(4).set((x.max() - x.min()) / 15, x.min())
    error = [float((each(x) - x).square().mean()) for each in (found, full)]
    assert error[0] < 0.5 * error[1]
    assert float(found(torch.zeros(1)).abs()) < 1e-6


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_dropping_leaves_a_share_of_the_elements_alone(drop):
    x = randn(20_000)
    activation = LearnedActivation(x, 3, drop)
    dropped = activation.dropped(x, torch.Generator().manual_seed(0)).detach()
    share = float((dropped == x).double().mean())
    assert share == pytest.approx(drop, abs=0.02)
    rest = dropped != x
    assert torch.equal(dropped[rest], activation(x).detach()[rest])


@pytest.mark.parametrize("scope", ["layer", "block"])
@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("make", [mlp, convolutional])
def test_inputs_and_weights_are_rounded_packed_saved_and_loaded(scope, start, make, tmp_path):
    net = make()
    x = correlated() if make is mlp else randn(48, 1, 4, 4)
    options = {"scope": scope, "start": start, "activation_bits": 4, **FAST}
    packed = learned_rounding(net, [x], 4, **options)
    wrapped = [module for module in packed.modules() if isinstance(module, RoundedInput)]
    assert len(wrapped) == 3
    assert all(each.activation.bits == 4 for each in wrapped)
    assert not any(p.requires_grad for each in wrapped for p in each.activation.parameters())

    simulated, y = make(), x  # the same network of float layers, rounded by hand
    for layer, twin in zip(simulated, packed, strict=True):
        if isinstance(twin, RoundedInput):
            y = twin.activation(y)
            assert len(y.unique()) <= 16
            layer.weight.data = twin.layer.dequantize().reshape(layer.weight.shape)
            layer.bias.data = twin.layer.bias.data
        y = layer(y)
    torch.testing.assert_close(packed(x), y, rtol=1e-5, atol=1e-5)

    before = (learned_rounding(net, [x], 4, **{**options, "iterations": 0, "descent": 0,
              "start": "nearest"})(x) - net(x)).square().mean()  # fmt: skip
    assert (packed(x) - net(x)).square().mean() <= before
    path = tmp_path / "packed.safetensors"
    pyrobust.save(packed, path)
    assert torch.equal(pyrobust.load(path, make())(x), packed(x))
    assert torch.equal(pyrobust.load(path, packed)(x), packed(x))


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    packed = learned_rounding(mlp(), [correlated()], 4, activation_bits=4, **FAST)
    pyrobust.save(packed, tmp_path / "packed.safetensors")
    other = nn.Sequential(*list(mlp())[:-1], nn.Linear(24, 6)).eval()
    with pytest.raises(ValueError, match="holds"):
        pyrobust.load(tmp_path / "packed.safetensors", other)
    assert [type(layer) for layer in other] == [type(layer) for layer in mlp()]


def test_layers_of_eight_bits_have_inputs_of_eight_bits():
    bits_for = {"0": 8.0}
    packed = learned_rounding(
        mlp(), [correlated()], 4, activation_bits=4, bits_for=bits_for, **FAST
    )
    assert [packed[i].activation.bits for i in (0, 2, 4)] == [8, 4, 4]


def test_a_killed_conversion_keeps_its_roundings(tmp_path):
    x = correlated(64)

    def run(resume=None, quantizer=LearnedRounding):
        return pyrobust.pack(
            mlp(), bits=4, group_size=16, calibration=[x], resume=resume,
            quantizer=quantizer(iterations=20, activation_bits=3, scope="block"),
        )  # fmt: skip

    class Killed(LearnedRounding):
        def quantize_block(self, block):
            if block.index == 2:
                raise KeyboardInterrupt
            super().quantize_block(block)

    Killed.__module__, Killed.__qualname__ = LearnedRounding.__module__, "LearnedRounding"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed)
    first, second = run().state_dict(), run(tmp_path).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_digits_survive_two_bit_weights_and_four_bit_inputs():
    net, data = trained_digits_cnn()

    def loss(**options):
        calibration = [data.train_images[:256]]
        packed = learned_rounding(net, calibration, 2, activation_bits=4, **options)
        with torch.no_grad():
            return float(F.cross_entropy(packed(data.test_images), data.test_labels))

    nearest = loss(iterations=0, descent=0, learn_bias=False, learn_scale=False)
    assert loss(iterations=400) <= 0.6 * nearest  # measured 0.105 against 0.328
