"""CROWN and its kin: sound, in order of tightness, equal to a reference implementation."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrobust
from pyrobust import Interval
from pyrobust.certify import bound, margin_specification, verified
from pyrobust.certify.relaxation import crown_bound

METHODS = ["ibp", "crown-ibp", "crown", "alpha-crown"]
ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Softplus, nn.LogSigmoid, nn.Sigmoid, nn.Tanh, nn.Softsign, nn.Hardswish,
    nn.Hardsigmoid,
]  # fmt: skip


def mlp(act, seed=0, sizes=(5, 14, 12, 3)):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).eval()


def points(box, count):
    low, high = box.lower.double(), box.upper.double()
    inside = low + torch.rand(count, *low.shape, dtype=torch.float64) * (high - low)
    corners = torch.where(torch.rand(count, *low.shape) < 0.5, low, high)
    return torch.cat([inside, corners, low[None], high[None]])


def escapes(model, box, bounds, count=200):
    """How far any sampled point or corner lies outside, evaluated in float64."""
    import copy

    wide = copy.deepcopy(model).double()
    x = points(box, count)
    with torch.no_grad():
        y = wide(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    below, above = bounds.lower.double() - y, y - bounds.upper.double()
    return float(torch.maximum(below, above).max())


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.__name__)
@pytest.mark.parametrize("eps", [0.02, 0.4])
def test_every_activation_is_enclosed_and_ordered(act, eps):
    widths = []
    model = mlp(act)
    box = Interval.ball(torch.randn(2, 5), eps)
    for method in METHODS:
        bounds = bound(model, box, method=method, iterations=3)
        assert escapes(model, box, bounds) <= 1e-12
        widths.append(bounds)
    for tight in widths[1:]:
        assert bool((tight.lower >= widths[0].lower).all())
        assert bool((tight.upper <= widths[0].upper).all())
    crown, alpha = widths[2], widths[3]
    assert bool((alpha.lower >= crown.lower).all())
    assert bool((alpha.upper <= crown.upper).all())
    assert float(crown.width().mean()) < float(widths[0].width().mean())


@pytest.mark.parametrize("seed", range(18))
@pytest.mark.parametrize("method", METHODS[1:])
def test_random_networks_and_attacks(seed, method):
    """Random depth, width, activation: samples, corners and gradient attacks stay inside."""
    act = ACTIVATIONS[seed % len(ACTIVATIONS)]
    torch.manual_seed(seed)
    sizes = [4, *torch.randint(3, 16, (1 + seed % 3,)).tolist(), 2]
    model = mlp(act, seed, sizes)
    box = Interval.ball(torch.randn(1, 4), float(10 ** (torch.rand(()) * 2 - 2)))
    spec = torch.tensor([[1.0, -1.0]])
    bounds = bound(model, box, spec, method, iterations=2)
    wide = model.double()
    x = points(box, 40)[:, 0]
    for _ in range(30):
        x.requires_grad_(True)
        value = wide(x)[:, 0] - wide(x)[:, 1]
        (gradient,) = torch.autograd.grad(value.sum(), x)
        with torch.no_grad():
            step = 0.1 * (box.upper - box.lower).double() * gradient.sign()
            sign = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)[:, None]
            x = torch.maximum(torch.minimum(x + sign * step, box.upper), box.lower)
    with torch.no_grad():
        value = wide(x) @ spec.double().T[:, 0]
    assert float(value.max()) <= float(bounds.upper) + 1e-13
    assert float(value.min()) >= float(bounds.lower) - 1e-13


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.skip = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x - 0.1) * 2.0))
        z = F.gelu(self.second(y)) + self.skip(y)
        pooled = F.avg_pool2d(torch.cat([z, -y / 3], dim=1), 2)
        return self.out(pooled.flatten(1)[:, :16] + 0.5)


def residual():
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.normal_()
        model.norm.bias.normal_()
    return model


def test_a_residual_convolutional_network():
    model = residual()
    box = Interval.ball(torch.rand(3, 2, 8, 8), 0.03, clamp=(0, 1))
    plain = bound(model, box)
    for method in METHODS[1:]:
        bounds = bound(model, box, method=method, iterations=4)
        assert escapes(model, box, bounds) <= 1e-12
        assert float(bounds.width().mean()) < 0.5 * float(plain.width().mean())


def test_an_affine_model_is_exact():
    """Pads, permutes, means, sums, slices and norms alone: the exact range, up to rounding."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose2d(2, 3, 2, stride=2)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.norm(self.conv(F.pad(x, (1, 0, 0, 1))))
            y = y.permute(0, 2, 3, 1).mean(2) - y.sum(dim=(2, 3)).unsqueeze(1)
            return torch.stack([y[:, 0], -y[:, 2] * 3], 1).reshape(y.size(0), -1)

    torch.manual_seed(0)
    model = Affine().eval()
    x = torch.randn(2, 2, 3, 3)
    bounds = bound(model, Interval.ball(x, 0.25), method="crown")
    wide = model.double()
    jacobian = torch.autograd.functional.jacobian(lambda v: wide(v[None])[0], x[0].double())
    reach = 0.25 * jacobian.abs().flatten(1).sum(1)
    centre = wide(x.double())[0]
    torch.testing.assert_close(bounds.lower[0].double(), centre - reach, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bounds.upper[0].double(), centre + reach, rtol=1e-5, atol=1e-5)


def test_operations_without_lines_are_cut_at_their_interval():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 9), nn.Linear(4, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            coarse = F.interpolate(self.a(x).unflatten(-1, (1, 9)), 6, mode="linear").flatten(1)
            return self.out(F.relu(coarse) * self.b(x).cumsum(-1))

    torch.manual_seed(0)
    model = Squeezed().eval()
    box = Interval.ball(torch.randn(2, 4), 0.05)
    bounds = bound(model, box, method="crown")
    assert escapes(model, box, bounds) <= 1e-12


def exact_margins(model, corners):
    """Exact rational outputs of a ReLU network at the corners."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    results = []
    for corner in corners:
        v = [Fraction(float(c)) for c in corner]
        for i, layer in enumerate(layers):
            rows = layer.weight.tolist()
            v = [
                sum(Fraction(w) * a for w, a in zip(row, v, strict=True)) + Fraction(b)
                for row, b in zip(rows, layer.bias.tolist(), strict=True)
            ]
            v = [max(a, Fraction(0)) for a in v] if i + 1 < len(layers) else v
        results.append(v)
    return results


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", [1.0, 2.0**24])
def test_exact_rationals(seed, scale):
    """Bounds of the outputs against exact arithmetic at all corners, huge biases included."""
    model = mlp(nn.ReLU, seed, (3, 8, 6, 2))
    with torch.no_grad():
        model[0].bias.mul_(scale)
        model[2].bias.sub_(scale * model[2].weight.sum(1) * 0.1)
    box = Interval.ball(torch.randn(1, 3), 0.1)
    ends = list(zip(box.lower[0].tolist(), box.upper[0].tolist(), strict=True))
    values = exact_margins(model, itertools.product(*ends))
    for method in METHODS[1:]:
        bounds = bound(model, box, method=method, iterations=3)
        for k in range(2):
            low, high = float(bounds.lower[0, k]), float(bounds.upper[0, k])
            assert Fraction(low) <= min(v[k] for v in values)
            assert Fraction(high) >= max(v[k] for v in values)


def test_a_violated_property_is_never_certified():
    """120 networks whose margin at a known point of the box is -1e-6 to -1e-1."""
    certified = 0
    for seed in range(120):
        model = mlp(nn.ReLU if seed % 2 else nn.Tanh, seed, (4, 10, 8, 2))
        x, eps = torch.randn(1, 4), 0.02
        box = Interval.ball(x, eps)
        inside = points(box, 3)[seed % 3]
        wide = mlp(nn.ReLU if seed % 2 else nn.Tanh, seed, (4, 10, 8, 2)).double()
        with torch.no_grad():
            logits = wide(inside)[0]
            margin = 10.0 ** (-1 - seed % 6)
            model[-1].bias[0] -= logits[0] - logits[1] + margin
            exact = model.double()(inside)[0]
            violated = float(exact[0] - exact[1])
            model.float()
        if violated >= 0:
            continue
        for method in METHODS if seed < 6 else [METHODS[seed % 4]]:
            spec = margin_specification(torch.tensor([0]), 2)
            certified += int(bool((bound(model, box, spec, method, iterations=1).lower > 0).all()))
    assert certified == 0


STORED = json.loads((Path(__file__).parent / "auto_lirpa_bounds.json").read_text())
CASES = [key for key in STORED if key != "source"]


def shared_model(folder, name):
    state = {k: torch.tensor(v) for k, v in np.load(folder / "models" / f"{name}.npz").items()}
    if name == "mnist_fc_3layer":
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10),
        )  # fmt: skip
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_bounds_equal_a_reference_implementation(case, data_folder):
    name, eps, method = case.split()
    model = shared_model(data_folder, name)
    images = pyrobust.data.load_idx(data_folder / "mnist").test_images[:4]
    lower, upper = torch.tensor(STORED[case])
    box = Interval.ball(images, float(eps), clamp=(0, 1), rounding="nearest")
    with torch.no_grad():
        if method == "IBP":
            bounds = model(box)
        else:
            bounds = crown_bound(
                model, box, None, method=method.lower(), max_memory=1 << 28, intersect=False
            )
        torch.testing.assert_close(bounds.lower, lower, rtol=0, atol=1e-4)
        torch.testing.assert_close(bounds.upper, upper, rtol=0, atol=1e-4)
        sound = Interval.ball(images, float(eps), clamp=(0, 1))
        ours = bound(model, sound, method=method.lower())
    # ours is cut by intervals too and rounded outward; on average hardly looser than the reference
    assert float(ours.width().mean()) <= float((upper - lower).mean()) * (1 + 5e-3)


@torch.no_grad()
def test_memory_is_split_without_changing_the_bounds():
    model = mlp(nn.ReLU, 1, (6, 40, 30, 5))
    box = Interval.ball(torch.randn(3, 6), 0.3)
    whole = bound(model, box, method="crown")
    pieces = bound(model, box, method="crown", max_memory=60_000)
    torch.testing.assert_close(pieces.lower, whole.lower, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pieces.upper, whole.upper, rtol=1e-6, atol=1e-6)


def small_convolution(act):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), act(), nn.Conv2d(2, 2, 3, stride=2, padding=1), act(),
        nn.Conv2d(2, 1, 3, padding=1), act(), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_bounds_are_differentiable(kind, act, method):
    linear = kind == "linear"
    model = (mlp(act, 3, (3, 6, 5, 2)) if linear else small_convolution(act)).double()
    x = torch.randn(2, *((3,) if linear else (1, 4, 4)), dtype=torch.float64)
    spec = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def run(*values):
        moved = nn.Sequential(*model)
        for name, value in zip(names, values, strict=True):
            layer, kind = name.split(".")
            del moved[int(layer)]._parameters[kind]
            setattr(moved[int(layer)], kind, value)
        try:
            return bound(moved, Interval.ball(x, 0.1, rounding="nearest"), spec, method).lower
        finally:
            for name, value in zip(names, originals, strict=True):
                layer, kind = name.split(".")
                moved[int(layer)].__dict__.pop(kind, None)
                moved[int(layer)]._parameters[kind] = value

    originals = [p for _, p in model.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in originals]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


def test_packed_networks():
    model = mlp(nn.ReLU, 5, (8, 24, 16, 4))
    packed = pyrobust.pack(model, bits=4, group_size=8)
    box = Interval.ball(torch.randn(2, 8), 0.1)
    plain = bound(packed, box)
    for method in METHODS[1:]:
        bounds = bound(packed, box, method=method, iterations=3)
        with torch.no_grad():
            for x in points(box, 50):
                y = packed(x.float())
                assert bool((y >= bounds.lower - 1e-5).all() & (y <= bounds.upper + 1e-5).all())
        assert float(bounds.width().mean()) < float(plain.width().mean())


def test_verified_certifies_more_with_tighter_bounds():
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 7, (6, 20, 20, 3))
    x = torch.randn(64, 6)
    labels = model(x).argmax(1)
    counts = [
        int((verified(model, x, labels, 0.1, clamp=None, method=m).radius > 0).sum())
        for m in ("ibp", "crown-ibp", "crown")
    ]
    assert counts[0] < counts[1] <= counts[2]


def test_refusals():
    model = mlp(nn.ReLU)
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match='must be "ibp" for a box with rounding="deployed"'):
        bound(model, Interval.ball(x, 0.1, rounding="deployed"), method="crown")
    with pytest.raises(ValueError, match="method must be one of ibp, crown-ibp"):
        bound(model, Interval.ball(x, 0.1), method="fastest")
    with pytest.raises(ValueError, match="max_memory must be at least 1"):
        bound(model, Interval.ball(x, 0.1), method="crown", max_memory=0)

    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.lower.sum() > 0 else x

    with pytest.raises(TypeError, match=r"torch\.fx cannot trace Branching"):
        bound(Branching(), Interval.ball(x, 0.1), method="crown")

    class Mixing(nn.Module):
        def forward(self, x):
            return x + x.flip(0)

    with pytest.raises(NotImplementedError, match="must keep the batch as its first axis"):
        bound(Mixing(), Interval.ball(x, 0.1), method="crown")


# Images among the first 1,000 of MNIST's test set whose margins auto_LiRPA 0.7.1 bounds above 0
# (method="CROWN", C = differences of logits, inputs cut to [0, 1], float32, torch 2.13 on a CPU).
COUNTS = {
    ("mnist_fc_3layer", 0.01): 938,
    ("mnist_fc_3layer", 0.02): 811,
    ("mnist_fc_3layer", 0.03): 467,
    ("mnist_cnn_small", 0.01): 955,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "eps"), COUNTS)
def test_as_many_images_are_certified_as_by_a_reference(name, eps, data_folder):
    data = pyrobust.data.load_idx(data_folder / "mnist")
    images, labels = data.test_images[:1000], data.test_labels[:1000].long()
    model = shared_model(data_folder, name)
    with torch.no_grad():
        proven = verified(model, images, labels, eps, method="crown", batch_size=100)
    assert int((proven.prediction >= 0).sum()) >= COUNTS[name, eps]
