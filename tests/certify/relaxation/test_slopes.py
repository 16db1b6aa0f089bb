"""Optimised slopes: as tight as those of a reference, sound, never worse than fixed ones."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pyrobust import Interval
from pyrobust.certify import bound, margin_specification
from pyrobust.certify.relaxation import crown_bound

from ...interval.shared_models import box, load_images, load_model
from .compared_models import filled

STORED = json.loads(Path(__file__).with_name("auto_lirpa_optimised.json").read_text())
SIZES = (5, 14, 12, 3)


def small(act):
    layers = [layer for a, b in itertools.pairwise(SIZES) for layer in (nn.Linear(a, b), act())]
    return filled(nn.Sequential(*layers[:-1]))


def searched(model, low, high, spec, **options):
    options = {"method": "alpha-crown", "max_memory": 1 << 30, "lower_only": True} | options
    with torch.no_grad():
        return crown_bound(model, Interval(low, high, rounding="nearest"), spec, **options).lower


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: f"{case['model']}-{case['eps']}")
def test_as_tight_as_the_reference_at_equal_iterations(case, request):
    if "images" in case:
        folder = request.getfixturevalue("data_folder")
        model = load_model(folder, case["model"])
        x = load_images(folder, case["model"], case["images"])
        low, high = box(x, case["eps"])
        spec = margin_specification(model(x).argmax(1), 10)
    else:
        model = small(getattr(nn, case["model"]))
        x = torch.cos(2.3 * torch.arange(10, dtype=torch.float64)).reshape(2, 5).float()
        low, high = x - case["eps"], x + case["eps"]
        spec = margin_specification(torch.tensor([0, 1]), 3)
    fixed, optimised = torch.tensor(case["CROWN"]), torch.tensor(case["CROWN-Optimized"])
    gain = (optimised - fixed).mean()
    found = searched(model, low, high, spec)
    curved = case["model"] in ("Tanh", "Sigmoid")
    assert (found - optimised).mean() > -(0.05 if curved else 0.002) * gain
    assert (found - optimised).min() > (-4e-3 if curved else -1e-4)
    # and that is not for want of anything to gain
    only_last = searched(model, low, high, spec, hidden_iterations=0)
    assert (found >= only_last - 1e-4).all()


def networks():
    torch.manual_seed(3)
    residual = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    )
    return {
        "convolutions": nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
            nn.Sigmoid(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3),
        ),
        "residual": nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Residual(residual_of(residual)), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 6), nn.Hardtanh(), nn.Linear(6, 3),
        ),
        "batch": FixedBatch(),
    }  # fmt: skip


def residual_of(layers):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *list(layers)[1:])


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class FixedBatch(nn.Module):
    """Reshapes to the batch that it is called with, so that images cannot be taken apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(128, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.a(x.reshape(2, 128)))
        return self.c(torch.relu(self.b(x.reshape(2, 12))))


@pytest.mark.parametrize("rounding", ["real", "nearest"])
@pytest.mark.parametrize("name", ["convolutions", "residual", "batch"])
def test_hidden_slopes_tighten_and_enclose(name, rounding):
    model = networks()[name].eval().double()
    torch.manual_seed(4)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    ball = Interval.ball(x, 0.1, rounding=rounding)
    with torch.no_grad():
        crown = bound(model, ball, method="crown")
        last = bound(model, ball, method="alpha-crown", iterations=6, hidden_iterations=0)
        whole = bound(model, ball, method="alpha-crown", iterations=6)
        in_parts = bound(model, ball, method="alpha-crown", iterations=6, max_memory=3 << 20)
        width = [(b.upper - b.lower).mean() for b in (crown, last, whole)]
        assert width[2] < width[1] < width[0]
        assert (whole.lower >= crown.lower - 1e-9).all()
        assert (whole.upper <= crown.upper + 1e-9).all()
        torch.testing.assert_close(in_parts.lower, whole.lower, rtol=1e-5, atol=1e-5)
        corners = torch.where(torch.rand(300, *x.shape) < 0.5, ball.lower, ball.upper)
        inside = ball.lower + torch.rand(300, *x.shape, dtype=torch.float64) * (
            ball.upper - ball.lower
        )
        for point in torch.cat([corners, inside]):
            y = model(point)
            assert (whole.lower <= y + 1e-12).all()
            assert (y <= whole.upper + 1e-12).all()
    # a corner that descends the output comes nearest
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    worst = torch.where(gradient > 0, ball.lower, ball.upper)
    assert (whole.lower[:, 0] <= model(worst)[:, 0] + 1e-12).all()


def test_options_are_checked():
    model, ball = small(nn.ReLU), Interval.ball(torch.zeros(1, 5), 0.1)
    with pytest.raises(ValueError, match="hidden_iterations"):
        bound(model, ball, method="alpha-crown", hidden_iterations=-1)


class _Inverse(nn.Module):
    def forward(self, x):
        return x**-1.0


def test_windows_over_the_border_of_a_function_not_defined_at_zero():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(
        conv[0], nn.Softplus(), _Inverse(), conv[1], nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
    )
    x = torch.rand(2, 1, 6, 6)
    box = Interval.ball(x, 0.05)
    found = bound(model, box, method="alpha-crown", iterations=3)
    plain = bound(model, box, method="crown")
    assert bool((found.lower >= plain.lower).all() & (found.upper <= plain.upper).all())
    points = x + 0.05 * (2 * torch.rand(200, *x.shape) - 1)
    values = model(points.flatten(0, 1)).unflatten(0, (200, 2))
    assert bool((found.lower <= values).all() & (values <= found.upper).all())
