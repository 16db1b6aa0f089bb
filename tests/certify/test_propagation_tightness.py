"""Tightness against explicit matrices, the theory at initialisation, and interval training."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.certify import (
    certified_margin,
    expected_init_tightness,
    interval_bounds,
    is_propagation_invariant,
    propagation_tightness,
    tightness_by_layer,
)
from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, IBPLoss, SmoothEpsSchedule, fit, ibp_init_


def mlp(*widths, relu=True, dtype=torch.float32):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, dtype=dtype), nn.ReLU()] if relu else [nn.Linear(a, b)]
    return nn.Sequential(*layers[: -1 if relu else None]).eval()


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    ).eval()


def explicit(model, x, eps):
    """Both ranges by explicit matrices for an MLP, one input at a time."""
    rows = []
    for point in x:
        product = torch.eye(len(point), dtype=x.dtype)
        wide, value = product.clone(), point
        for layer in model:
            if isinstance(layer, nn.Linear):
                product, wide = layer.weight @ product, layer.weight.abs() @ wide
                value = layer(value)
            else:
                mask = (value > 0).to(x.dtype).diag()
                product, wide, value = mask @ product, mask @ wide, value.relu()
        radius = ((point + eps).clamp(0, 1) - (point - eps).clamp(0, 1)) / 2
        rows.append((product.abs() @ radius) / (wide @ radius))
    return torch.stack(rows)


def test_it_is_the_ratio_of_explicit_products():
    model = mlp(6, 9, 8, 4, dtype=torch.float64)
    x = torch.rand(5, 6, dtype=torch.float64)
    ratio = propagation_tightness(model, x, 0.3)
    torch.testing.assert_close(ratio, explicit(model, x, 0.3), rtol=1e-10, atol=0)
    assert bool(((ratio > 0) & (ratio <= 1 + 1e-12)).all())


@pytest.mark.parametrize("make", [lambda: mlp(6, 9, 8, 4), convnet])
def test_signs_and_forward_passes_give_the_same_range(make):
    """The other way to the true range: the corner that the gradient's signs choose, evaluated."""
    model = make()
    x = torch.rand(3, 6) if len(model) == 5 else torch.rand(3, 2, 8, 8)
    linear = linearised_at(model, x)
    low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    slopes = torch.autograd.functional.jacobian(lambda v: linear(v).sum(0), x)
    for k, slope in enumerate(slopes):
        best, worst = torch.where(slope > 0, high, low), torch.where(slope > 0, low, high)
        true = (linear(best) - linear(worst))[:, k] / 2
        ratio = propagation_tightness(model, x, 0.1)[:, k]
        torch.testing.assert_close(ratio * interval_radius(model, x, 0.1)[:, k], true, **CLOSE)


CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def masks_at(model, x):
    masks, value = [], x
    for layer in model:
        masks.append((value > 0).float() if isinstance(layer, nn.ReLU) else None)
        value = layer(value)
    return masks


def linearised_at(model, x):
    """The network with each ReLU replaced by the mask of its activation at ``x``."""
    masks = masks_at(model, x)

    def forward(value):
        for layer, mask in zip(model, masks, strict=True):
            value = layer(value) if mask is None else value * mask
        return value

    return forward


def interval_radius(model, x, eps):
    """The interval radius of the linearised network by the Interval rules, layer by layer."""
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    for layer, mask in zip(model, masks_at(model, x), strict=True):
        if mask is None:
            low, high = interval_bounds(layer, low, high)
        else:
            low, high = low * mask, high * mask
    return (high - low) / 2


@pytest.mark.parametrize("relu", ["local", "center", "identity"])
def test_convolutions_agree_with_their_matrices(relu):
    model = convnet()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1, 1)
    x = torch.rand(3, 2, 8, 8)
    ratio = propagation_tightness(model, x, 0.1, relu=relu)
    assert ratio.shape == (3, 3)
    assert bool(((ratio > 0) & (ratio <= 1 + 1e-5)).all())
    # The interval range of the network without ReLUs and biases, from the Interval rules.
    if relu == "identity":
        linear = nn.Sequential(*(m for m in model if not isinstance(m, nn.ReLU))).eval()
        low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
        lower, upper = interval_bounds(linear, low, high)
        jacobian = torch.autograd.functional.jacobian(lambda v: linear(v).sum(0), x)
        true = (jacobian.abs() * (high - low) / 2).flatten(2).sum(2).T
        torch.testing.assert_close(ratio, true / ((upper - lower) / 2), rtol=1e-4, atol=0)


def test_bounds_are_sound_and_exact_at_radius_zero():
    model = convnet()
    x = torch.rand(1, 2, 8, 8)
    lower, upper = interval_bounds(model, x - 0.05, x + 0.05)
    points = x + 0.05 * (2 * torch.rand(1000, 2, 8, 8) - 1)
    out = model(points)
    assert bool(((out >= lower) & (out <= upper)).all())
    lower, upper = interval_bounds(model, x, x)
    torch.testing.assert_close(lower, model(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(upper, model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [lambda: mlp(6, 20, 20, 4), convnet])
def test_thousands_of_points_of_random_networks_lie_within_their_bounds(make):
    for _ in range(20):
        model = make()
        shape = (1, 6) if len(model) == 5 else (1, 2, 8, 8)
        x, eps = torch.rand(shape), float(10 ** (-3 * torch.rand(())))
        lower, upper = interval_bounds(model, x - eps, x + eps)
        moves = 2 * torch.rand(1000, *shape[1:]) - 1
        moves[500:] = moves[500:].sign()  # corners
        with torch.no_grad():
            out = model((x + eps * moves).clamp(x - eps, x + eps))
        assert bool(((out >= lower - 1e-5) & (out <= upper + 1e-5)).all())


def test_the_collapsed_matrix_gives_the_numerator():
    model = mlp(6, 9, 8, 4, relu=False)
    x = torch.rand(1, 6)
    low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    collapsed = nn.Linear(6, 4).eval()
    with torch.no_grad():
        collapsed.weight.copy_(model[2].weight @ model[1].weight @ model[0].weight)
    narrow, wide = (
        (b - a) / 2 for a, b in (interval_bounds(m, low, high) for m in (collapsed, model))
    )
    ratio = propagation_tightness(model, x, 0.1)
    torch.testing.assert_close(ratio * wide, narrow, rtol=1e-4, atol=0)


def has_no_negative_minor(product):
    """What invariance implies: ``W_ij W_ij' W_i'j W_i'j' >= 0`` for all rows and columns."""
    pairs = product[:, :, None] * product[:, None]
    return bool((pairs[:, None] * pairs[None] >= 0).all())


def test_tight_networks_measure_one():
    def measures_one(network):
        ratio = propagation_tightness(network, x, 0.1)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)

    x = torch.rand(4, 6)
    measures_one(nn.Sequential(nn.Linear(6, 3)).eval())
    model = mlp(6, 7, 5, 3, relu=False)
    for layer in model:
        layer.weight.data.abs_()
    measures_one(model)
    flips = torch.randint(0, 2, (7,)) * 2.0 - 1
    model[0].weight.data.mul_(flips[:, None])
    model[1].weight.data.mul_(flips)
    measures_one(model)
    assert is_propagation_invariant(model[1].weight, model[0].weight)
    assert has_no_negative_minor(model[1].weight @ model[0].weight)
    model[0].weight.data[0, 0].neg_()
    assert not is_propagation_invariant(model[1].weight, model[0].weight)


@pytest.mark.parametrize("widths", [[4], [16], [64], [256], [64] * 2, [64] * 3, [64] * 4])
def test_the_lemma_of_initialisation(widths):
    true = wide = 0.0
    for _ in range(200 if widths[0] < 64 else 40):
        product = size = torch.randn(widths[0], 64)
        for i, width in enumerate(widths):
            after = torch.randn(widths[i + 1] if i + 1 < len(widths) else 64, width)
            product, size = after @ product, after.abs() @ size.abs()
        true, wide = true + float(product.abs().mean()), wide + float(size.mean())
    assert true / wide == pytest.approx(expected_init_tightness(widths), rel=0.03)


def test_a_relu_at_one_hidden_layer_is_tighter_by_the_root_of_two():
    ratios = {"local": 0.0, "identity": 0.0}
    for _ in range(30):
        model = mlp(32, 256, 8)
        for layer in model[::2]:
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        for relu in ratios:
            ratio = propagation_tightness(model, torch.randn(8, 32), 0.1, relu=relu, clamp=None)
            ratios[relu] += float(ratio.mean())
    assert ratios["local"] / ratios["identity"] == pytest.approx(math.sqrt(2), abs=0.03)


def test_elision_is_never_looser():
    model = mlp(6, 20, 4)
    x, y = torch.rand(8, 6), torch.arange(8) % 4
    folded = certified_margin(model, x, y, 0.1)
    lower, upper = interval_bounds(model, (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1))
    others = ~nn.functional.one_hot(y, 4).bool()
    plain = (lower.gather(1, y[:, None]) - upper)[others].reshape(8, 3)
    assert bool((folded >= plain - 1e-6).all())
    assert bool((folded > plain + 1e-4).any())
    assert propagation_tightness(model, x, 0.1, y).shape == (8, 3)


def test_packed_models_are_measured():
    model = mlp(32, 32, 32, 4)
    packed = pyrobust.pack(model, bits=8, group_size=16)
    x = torch.rand(4, 32)
    torch.testing.assert_close(
        propagation_tightness(packed, x, 0.1).mean(),
        propagation_tightness(model, x, 0.1).mean(),
        rtol=0.1,
        atol=0,
    )


@pytest.mark.parametrize("relu", ["local", "identity"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_packed_convolutions_are_measured_as_what_they_stand_for(kind, relu):
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8) if kind is nn.Conv2d else torch.rand(4, 1, 32)
    layers = [kind(1, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).eval()
    packed = pyrobust.pack(copy.deepcopy(model), bits=4, group_size=16)
    plain = copy.deepcopy(model)
    for place in (0, 3):
        plain[place].weight.data = packed[place].dequantize().view_as(plain[place].weight)
    torch.testing.assert_close(
        propagation_tightness(packed, x, 0.1, None, relu),
        propagation_tightness(plain, x, 0.1, None, relu),
    )
    assert tightness_by_layer(packed, x, 0.1, relu).names == ("0", "3")
    rounding = pyrobust.pack(copy.deepcopy(model), bits=4, group_size=16, activations="int8")
    with pytest.raises(
        NotImplementedError, match=r"layer '0' rounds its input \(activations='int8'"
    ):
        propagation_tightness(rounding, x, 0.1, None, relu)


def test_profiles_fall_with_depth_at_initialisation(tmp_path):
    model = mlp(16, 64, 64, 64, 10)
    profile = tightness_by_layer(model, torch.rand(4, 16), 0.1)
    assert len(profile.names) == 4
    assert profile.values[0] == pytest.approx(1, abs=1e-5)
    assert list(profile.values) == sorted(profile.values, reverse=True)
    assert profile.plot().get_ylabel() == "propagation tightness"


class Residual(nn.Module):
    """Blocks ``x + W2 relu(W1 x)`` between two linear layers; one ReLU serves all of them."""

    def __init__(self, width=8, blocks=2, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(6, width, dtype=dtype)
        self.inner = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(2 * blocks))
        self.last = nn.Linear(width, 4, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        for one, two in zip(self.inner[::2], self.inner[1::2], strict=True):
            x = x + two(self.relu(one(x)))
        return self.last(x)


def explicit_residual(model, x, radius, rows=None):
    """True and interval ranges of one input by explicit matrices."""
    value = model.first(x)
    product, wide = model.first.weight, model.first.weight.abs()
    for one, two in zip(model.inner[::2], model.inner[1::2], strict=True):
        mask = (one(value) > 0).to(x.dtype).diag()
        product = product + two.weight @ mask @ one.weight @ product
        wide = wide + two.weight.abs() @ mask @ one.weight.abs() @ wide
        value = value + two(one(value).relu())
    last = model.last.weight if rows is None else rows @ model.last.weight
    return (last @ product).abs() @ radius / (last.abs() @ wide @ radius)


def test_residual_networks_agree_with_their_matrices():
    model = Residual().eval()
    x = 0.3 + 0.4 * torch.rand(5, 6, dtype=torch.float64)
    radius = torch.full((6,), 0.01, dtype=torch.float64)
    expected = torch.stack([explicit_residual(model, point, radius) for point in x]).detach()
    ratio = propagation_tightness(model, x, 0.01)
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)
    assert model.relu.inplace
    assert not model.relu._forward_hooks
    y = torch.arange(5) % 4
    eye = torch.eye(4, dtype=x.dtype)
    rows = [eye[[j for j in range(4) if j != c]] - eye[c] for c in y.tolist()]
    margins = [explicit_residual(model, p, radius, r) for p, r in zip(x, rows, strict=True)]
    ratio = propagation_tightness(model, x, 0.01, y)
    torch.testing.assert_close(ratio, torch.stack(margins), rtol=1e-6, atol=0)
    profile = tightness_by_layer(model, x, 0.01)
    assert profile.names == ("first", "inner.0", "inner.1", "inner.2", "inner.3", "last")
    assert profile.values[0] == pytest.approx(1.0)
    assert profile.values[-1] == pytest.approx(float(expected.mean()), rel=1e-6)


@pytest.mark.parametrize("relu", ["local", "center", "identity"])
def test_a_chain_inside_a_module_is_measured_like_the_chain(relu):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    for model in (mlp(6, 9, 8, 4, dtype=torch.float64), convnet()):
        x = torch.rand(2, 6, dtype=torch.float64) if len(model) == 5 else torch.rand(2, 2, 8, 8)
        y = torch.tensor([0, 2])
        for labels in (None, y):
            torch.testing.assert_close(
                propagation_tightness(Wrapped(model).eval(), x, 0.05, labels, relu),
                propagation_tightness(model, x, 0.05, labels, relu),
                rtol=1e-3,
                atol=0,
            )
    packed = pyrobust.pack(mlp(32, 32, 32, 4), bits=8, group_size=16)
    x = torch.rand(3, 32)
    torch.testing.assert_close(
        propagation_tightness(Wrapped(packed).eval(), x, 0.1, None, relu),
        propagation_tightness(packed, x, 0.1, None, relu),
        rtol=1e-3,
        atol=0,
    )


def test_a_relu_that_is_no_module_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(6, 12, 12, 4)

        def forward(self, x):
            return self.inner[2:](torch.relu(self.inner[0](x) - 1))

    with pytest.raises(NotImplementedError, match="affine"):
        propagation_tightness(Functional().eval(), torch.rand(4, 6), 0.2)


def test_bad_input_is_refused():
    model, x = mlp(6, 5, 3), torch.rand(2, 6)
    with pytest.raises(ValueError, match="eps"):
        propagation_tightness(model, x, -0.1)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        propagation_tightness(model, x, 0.1, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        certified_margin(model, x, torch.tensor([0, -1]), 0.1)
    with pytest.raises(NotImplementedError, match="'1' of type GELU"):
        propagation_tightness(nn.Sequential(nn.Linear(6, 5), nn.GELU()).eval(), x, 0.1)
    with pytest.raises(ValueError, match="training mode"):
        propagation_tightness(convnet().train(), torch.rand(1, 2, 8, 8), 0.1)
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        propagation_tightness(nn.Sequential(nn.Conv2d(2, 1, 3)).eval(), torch.rand(1, 2, 8, 8), 0)
    with pytest.raises(ValueError, match="lower"):
        interval_bounds(model, x, x - 1)


def trained(width, data, interval, seed, epochs=40):
    """Natural and certified accuracy and the mean tightness of the margins."""
    torch.manual_seed(seed)
    model = mlp(64, width, width, 10)
    objective = GaussianCrossEntropy()
    if interval:
        ibp_init_(model)
        objective = IBPLoss(SmoothEpsSchedule(0.0, 0.5, eps=0.1))
    images = data.train_images.flatten(1)
    fit(model, images, data.train_labels, objective=objective, epochs=epochs, learning_rate=2e-3)
    x, y = data.test_images.flatten(1), data.test_labels
    natural = float((model(x).argmax(1) == y).double().mean())
    proven = float((certified_margin(model, x, y, 0.1) > 0).all(1).double().mean())
    return natural, proven, float(propagation_tightness(model, x, 0.1, y).mean())


@pytest.mark.slow
def test_interval_training_tightens_and_width_helps():
    """Means of three seeds: processors round training differently, by an image or two of 360."""
    data = load_digits()
    standard, narrow, wide = (
        torch.tensor([trained(width, data, interval, seed) for seed in range(3)]).mean(0).tolist()
        for width, interval in ((256, False), (64, True), (256, True))
    )
    print(standard, narrow, wide)
    assert wide[2] >= 4 * standard[2]
    assert wide[0] >= narrow[0] + 0.05
    assert wide[1] >= narrow[1] + 0.05
