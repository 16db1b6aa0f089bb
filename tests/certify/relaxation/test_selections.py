"""Picks and averages by constants: exact in a linear model, enclosed in others, or cut."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.certify import bound
from pyrobust.certify.relaxation.graph import step_of, trace_graph

CHOSEN = torch.tensor([[True, False, True, True], [False, True, False, True]])
INDEX = torch.tensor([[[[3, 0, 0, 2], [1, 1, 3, 0]]]]).expand(2, 2, 2, 4)


def resized(**options):
    return lambda x: F.interpolate(x, **options)


OPERATIONS = {
    "where": lambda x: torch.where(CHOSEN, x, -0.7),
    "where, two boxes": lambda x: torch.where(CHOSEN, x, 2 * x.flip(-1)),
    "where, method": lambda x: x.where(CHOSEN, torch.full((4,), 1.5)),
    "masked_fill": lambda x: x.masked_fill(CHOSEN, -3.0),
    "gather": lambda x: torch.gather(x, 3, INDEX),
    "gather, one image": lambda x: torch.gather(x.flatten(1), 1, INDEX.flatten(1)),
    "take_along_dim": lambda x: torch.take_along_dim(x, INDEX[:1], -1),
    "nearest": resized(scale_factor=2),
    "nearest-exact": resized(size=(3, 7), mode="nearest-exact"),
    "bilinear": resized(size=(5, 9), mode="bilinear"),
    "bilinear, corners": resized(scale_factor=(2, 1.5), mode="bilinear", align_corners=True),
    "smaller": resized(size=(1, 3), mode="bilinear"),
    "area": resized(size=(1, 3), mode="area"),
    "linear": lambda x: F.interpolate(x.flatten(2), size=11, mode="linear"),
    "trilinear": lambda x: F.interpolate(x.unsqueeze(1), size=(3, 3, 5), mode="trilinear"),
    "upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "upsampling of copies": nn.UpsamplingNearest2d(size=(4, 4)),
}


class Model(nn.Module):
    """The operation between two layers; a smooth bend in front where wanted."""

    def __init__(self, name, bent):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 2, (1, 2), bias=True)
        self.operation, self.bent = OPERATIONS[name], bent
        with torch.no_grad():
            size = self.operation(torch.zeros(2, 2, 2, 4)).flatten(1).shape[1]
        self.last = nn.Linear(size, 3)

    def forward(self, x):
        x = self.first(x)
        x = self.operation(torch.tanh(x) if self.bent else x)
        return self.last(x.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_linear_models_are_bounded_exactly(name, dtype):
    model = Model(name, False).eval().to(dtype)
    box = Interval.ball(torch.randn(2, 1, 2, 5, dtype=dtype), 0.3)
    found, plain = bound(model, box, method="crown"), bound(model, box)
    wide = model.double()
    low, high = box.lower.double(), box.upper.double()
    with torch.enable_grad():
        slopes = torch.autograd.functional.jacobian(lambda x: wide(x).sum(0), (low + high) / 2)
    slopes = slopes.transpose(0, 1).flatten(2)  # (B, outputs, inputs)
    middle = wide((low + high) / 2)
    reach = (slopes.abs() @ ((high - low) / 2).flatten(1).unsqueeze(-1)).squeeze(-1)
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    assert (found.lower.double() <= middle - reach + 1e-14).all()
    assert (found.upper.double() >= middle + reach - 1e-14).all()
    width = (found.upper - found.lower).double()
    assert (width <= 2 * reach + 20 * slack).all()
    assert (width <= (plain.upper - plain.lower).double() + slack).all()


@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_bent_models_are_enclosed(name, method):
    model = Model(name, True).eval()
    box = Interval.ball(torch.randn(2, 1, 2, 5), 0.4)
    found, plain = bound(model, box, method=method, iterations=3), bound(model, box)
    assert (found.lower >= plain.lower).all()
    assert (found.upper - found.lower).mean() < 0.95 * (plain.upper - plain.lower).mean()
    model = model.double()
    low, high = box.lower.double(), box.upper.double()
    for i in range(200):
        share = torch.rand(low.shape, dtype=torch.float64)
        y = model(low + (share if i % 2 else share.round()) * (high - low))
        assert found.contains(y).all()


class Deep(nn.Module):
    """Resized between convolutions whose neurons are pulled back in windows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.c = nn.Conv2d(2, 2, 3)
        self.register_buffer("chosen", torch.rand(2, 12, 12) < 0.7)

    def forward(self, x):
        x = F.interpolate(torch.relu(self.a(x)), scale_factor=2, mode="bilinear")
        x = torch.relu(self.b(x).where(self.chosen, torch.zeros(())))
        return self.c(x).flatten(1)[:, :6]


@torch.no_grad()
def test_between_convolutions():
    torch.manual_seed(1)
    model = Deep().eval()
    box = Interval.ball(torch.rand(3, 1, 6, 6), 0.05)
    plain = bound(model, box)
    found = bound(model, box, method="crown")
    assert (found.upper - found.lower).mean() < 0.8 * (plain.upper - plain.lower).mean()
    one = bound(model, box[1:2], method="crown")
    torch.testing.assert_close(one.lower, found.lower[1:2], rtol=1e-5, atol=1e-6)
    for _ in range(100):
        y = model.double()(
            box.lower + torch.rand(3, 1, 6, 6).double().round() * (box.upper - box.lower)
        )
        assert found.contains(y).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(CHOSEN, x, -math.inf),
        lambda x: x.masked_fill(CHOSEN, math.inf),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
        lambda x: torch.gather(x, 0, torch.zeros(1, 2, 2, 4, dtype=torch.int64)),
    ],
)
def test_what_is_not_affine_stays_with_intervals(function):
    class Alone(nn.Module):
        def forward(self, x):
            return function(x)

    graph, root = trace_graph(Alone(), "test")
    box = Interval.ball(torch.randn(2, 2, 2, 4), 0.1)
    values = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = box
        elif node.op == "get_attr":
            values[node] = getattr(root, node.target)
        elif node.op != "output":
            step = step_of(node, root, values, torch.float64)
            assert step.affine is None
            assert step.planes is None
