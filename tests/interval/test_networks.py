"""Whole networks: random small ones, float and packed, a ResNet, a ViT, public counterexamples."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval, pack
from pyrobust import nn as rnn
from pyrobust.certify import bound


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.block = Block(width)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.pool(self.block(F.relu(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ViT(nn.Module):
    def __init__(self, width=8, depth=2):
        super().__init__()
        self.embed = nn.Conv2d(2, width, 3, stride=3)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 16, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def random_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.01, 2)
            module.weight.data.normal_()
            module.bias.data.normal_()
    return model.eval()


def random_network(seed):
    """A small network of linear, convolution, batch norm, residual and pooling layers."""
    torch.manual_seed(seed)
    width = 1 + seed % 3
    if seed % 4 == 0:
        model = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        return model.eval(), (1, 6)
    if seed % 4 == 1:
        pool = nn.AvgPool2d(2) if seed % 8 == 1 else nn.MaxPool2d(2, 1, 1)
        model = nn.Sequential(
            nn.Conv2d(2, width, 3, stride=1 + seed % 2), nn.BatchNorm2d(width), nn.LeakyReLU(),
            pool, nn.Flatten(), nn.LazyLinear(3),
        )  # fmt: skip
        model.eval()(torch.zeros(1, 2, 6, 6))
        return random_statistics(model), (1, 2, 6, 6)
    if seed % 4 == 2:
        return random_statistics(ResNet(width)), (1, 2, 6, 6)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(100, 3), nn.Softmax(1)
    )
    return model.eval(), (1, 2, 6, 6)


def packed_twin(model, bits):
    """The model with packed layers, and the float model of the same stored weights."""
    layers = {nn.Linear: rnn.PackedLinear.from_linear, nn.Conv2d: rnn.PackedConv2d.from_conv2d}
    for name, module in list(model.named_modules()):
        make = layers.get(type(module))
        if make is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], make(module, bits=bits, group_size=16))
    return model


def unpacked(model):
    """Float64 twin of a packed model, with the exact stored weights."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, (rnn.PackedLinear, rnn.PackedConv2d)):
            continue
        weight = module.dequantize().double()
        if isinstance(module, rnn.PackedLinear):
            twin = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
        else:
            twin = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride,
                module.padding, module.dilation, module.groups, module.bias is not None,
            )  # fmt: skip
        twin = twin.double()
        twin.weight.data = weight
        if module.bias is not None:
            twin.bias.data = module.bias.data.double()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], twin)
    return model.double()


def inside(lower, upper, count):
    """Points of a box in float64, corners first."""
    share = torch.rand(count, *lower.shape[1:], dtype=torch.float64)
    share[: count // 2] = (share[: count // 2] > 0.5).double()
    share[0], share[1] = 0.0, 1.0
    return lower.double() + (upper.double() - lower.double()) * share


@torch.no_grad()
def exceptions(model, exact, shape, eps, rounding="real"):
    x = torch.rand(shape)
    ball = Interval.ball(x, eps, rounding=rounding)
    bounds = model(ball)
    values = exact(inside(ball.lower, ball.upper, 1000))
    slack = 1e-13 * (1 + values.abs())
    low, high = bounds.lower.double(), bounds.upper.double()
    return int(((values < low - slack) | (values > high + slack)).sum())


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_two_hundred_random_networks_float_and_packed(first):
    for seed in range(first, first + 25):
        model, shape = random_network(seed)
        eps = (1e-6, 1e-3, 0.05)[seed % 3]
        rounding = ("real", "deployed")[seed % 2]
        exact = copy.deepcopy(model).double()
        assert exceptions(model, exact, shape, eps, rounding) == 0, seed
        packed = packed_twin(copy.deepcopy(model), (2, 3, 4, 8)[seed // 4 % 4])
        assert exceptions(packed, unpacked(copy.deepcopy(packed)), shape, eps, rounding) == 0, seed


@pytest.mark.parametrize("model", [ResNet(3), ViT()], ids=["resnet", "vit"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_residual_networks_and_transformers_run_unchanged(model, eps):
    random_statistics(model)
    exact = copy.deepcopy(model).double()
    for rounding in ("real", "deployed"):
        assert exceptions(model, exact, (1, 2, 6, 6), eps, rounding) == 0


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_packed_convolutions_of_lines_bound_what_they_compute(mode, activations):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2, padding_mode=mode), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7, 3),
    ).eval()  # fmt: skip
    random_statistics(model)
    packed = pack(model, bits=3, group_size=4, activations=activations)
    ball = Interval.ball(torch.rand(1, 2, 16), 0.02, rounding="deployed")
    points = inside(ball.lower, ball.upper, 500).float()
    points = torch.minimum(torch.maximum(points, ball.lower), ball.upper)
    with torch.no_grad():
        values = packed(points)
    bounds = packed(ball)
    assert bool(bounds.contains(values).all())
    if activations is None:
        for method in ("crown", "alpha-crown"):
            tighter = bound(packed, Interval(ball.lower, ball.upper), method=method)
            assert bool(tighter.contains(values).all())
            assert tighter.width().sum() < bounds.width().sum()
    alone = packed[0](Interval(ball.lower[0], ball.upper[0], rounding="deployed"))
    assert torch.equal(alone.upper, packed[0](ball).upper[0])


def test_layers_with_8_bit_activations_bound_what_they_compute():
    torch.manual_seed(0)
    model = nn.Sequential(
        rnn.PackedConv2d(2, 3, 3, bits=4, group_size=9, activations="int8"),
        nn.ReLU(),
        nn.Flatten(),
        rnn.PackedLinear(48, 3, bits=4, group_size=16, activations="int8"),
    ).eval()
    ball = Interval.ball(torch.rand(1, 2, 6, 6), 0.02, rounding="deployed")
    bounds = model(ball)
    points = inside(ball.lower, ball.upper, 500).float()
    points = torch.minimum(torch.maximum(points, ball.lower), ball.upper)
    assert bool(bounds.contains(model(points)).all())


# -- three public counterexamples to bounds in plain floating point --------------------------


def first_layer(seed):
    """A first layer with generic weights: its bounds are attained at corners of the box."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 64, generator=generator) / 8
    x = torch.rand(64, generator=generator)
    return x, weight, torch.randn(64, generator=generator)


def attained(ball, weight, bias):
    """The greatest attained value of each output, in float64 (error below 1e-14)."""
    corner = torch.where(weight > 0, ball.upper, ball.lower).double()
    return (corner * weight.double()).sum(1) + bias.double()


def test_nearest_bounds_of_a_first_layer_exclude_attained_values():
    excluded = total = 0
    for seed in range(10):
        x, weight, bias = first_layer(seed)
        for eps in (1e-3, 2 / 255, 0.1):
            for rounding in ("nearest", "real", "deployed"):
                ball = Interval.ball(x, eps, rounding=rounding)
                upper = F.linear(ball, weight, bias).upper.double()
                missed = int((upper < attained(ball, weight, bias) - 1e-13).sum())
                if rounding == "nearest":
                    excluded, total = excluded + missed, total + 64
                else:
                    assert missed == 0
    assert excluded > 0.2 * total  # about half, at rounding size


def test_nearest_verifies_linear_classifiers_at_a_radius_with_an_adversarial_point():
    """At the first float radii above the exact one a plain bound may still say "verified"."""
    wrong = 0
    for seed in range(60):
        x, weight, bias = first_layer(seed)
        row, shift = weight[:1] - weight[1:2], bias[:1] - bias[1:2]
        margin = row.double() @ x.double() + shift.double()
        row, shift = row * margin.sign().float(), shift * margin.sign().float()
        radii = [torch.abs(margin / row.double().abs().sum()).float()]
        for _ in range(63):
            radii.append(torch.nextafter(radii[-1], torch.ones(1)))
        eps = torch.stack(radii)
        ball = Interval.ball(x.expand(64, -1), eps)
        corner = torch.where(row > 0, ball.lower, ball.upper).double()
        fooled = corner @ row.double().squeeze(0) + shift.double() < -1e-13  # exact to 1e-15
        assert bool(fooled.any())
        for rounding in ("nearest", "real", "deployed"):
            ball = Interval.ball(x.expand(64, -1), eps, rounding=rounding)
            claimed = F.linear(ball, row, shift).lower.squeeze(1) > 0
            false_claims = int((claimed & fooled).sum())
            if rounding == "nearest":
                wrong += false_claims > 0
            else:
                assert false_claims == 0
    assert wrong >= 5


def test_huge_biases_do_not_hide_the_true_range():
    """A 1-3-2 network whose biases of 2^25 swallow the input: the logit is in [0.4, 0.6]."""
    first, second = nn.Linear(1, 3).requires_grad_(False), nn.Linear(3, 2).requires_grad_(False)
    first.weight.data = torch.tensor([[1.0], [0.0], [0.0]])
    first.bias.data = torch.tensor([2.0**25, 2.0**25, 0.0])
    second.weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    second.bias.data = torch.tensor([0.0, 0.3])
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.tensor([[0.5]])
    nearest = model(Interval.ball(x, 0.1, rounding="nearest"))
    true_low, true_high = 0.4, 0.6
    missed = (
        float(nearest.upper[0, 0]) < true_high - 0.01
        or float(nearest.lower[0, 0]) > true_low + 0.01
    )
    assert missed
    for rounding in ("real", "deployed"):
        sound = model(Interval.ball(x, 0.1, rounding=rounding))
        assert float(sound.lower[0, 0]) <= true_low
        assert float(sound.upper[0, 0]) >= true_high
