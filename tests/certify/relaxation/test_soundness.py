"""Random networks over every supported operation: nothing escapes, and tighter means tighter.

The default run takes a tenth of the networks; the slow one all two hundred.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.certify import bound

METHODS = ["ibp", "crown-ibp", "crown", "alpha-crown"]
NETWORKS = 200
EVERY = 10


class Call(nn.Module):
    """A function as a layer; those of a limited domain see a sum that stays in it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Normed(nn.Module):
    """Layer norm over the last axis, whatever its size."""

    def forward(self, x):
        d = x - x.mean(-1, keepdim=True)
        return d / torch.sqrt((d * d).mean(-1, keepdim=True) + 0.05)


ACTIVATIONS = {
    "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.1), "prelu": nn.PReLU,
    "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh, "elu": nn.ELU, "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.7), "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU, "mish": nn.Mish, "softplus": lambda: nn.Softplus(2.0),
    "logsigmoid": nn.LogSigmoid, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
    "softsign": nn.Softsign, "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid,
    "abs": lambda: Call(torch.abs), "clamp": lambda: Call(lambda x: x.clamp(-0.5, 1.5)),
    "exp": lambda: Call(lambda x: torch.exp(x * 0.3)),
    "expm1": lambda: Call(lambda x: torch.expm1(x * 0.3)),
    "log": lambda: Call(lambda x: torch.log(torch.sigmoid(x) + 0.1)),
    "log1p": lambda: Call(lambda x: torch.log1p(F.relu(x))),
    "sqrt": lambda: Call(lambda x: torch.sqrt(torch.sigmoid(x))),
    "square": lambda: Call(torch.square), "cube": lambda: Call(lambda x: x**3 * 0.1),
    "atan": lambda: Call(torch.atan), "erf": lambda: Call(torch.erf),
    "softmax": lambda: Call(lambda x: torch.softmax(x, -1)),
    "log_softmax": lambda: Call(lambda x: F.log_softmax(x, -1)),
    "softmin": lambda: Call(lambda x: F.softmin(x, -1)),
    "logsumexp": lambda: Call(lambda x: x - x.logsumexp(-1, True)),
    "product": lambda: Call(lambda x: x * torch.sigmoid(x.flip(-1))),
    "quotient": lambda: Call(lambda x: x / (1 + torch.exp(0.3 * x.flip(-1)))),
    "matmul": lambda: Call(lambda x: (x.unsqueeze(-1) @ x.unsqueeze(-2)).mean(-1)),
    "mean square": lambda: Call(
        lambda x: x * torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + 0.1)
    ),
    "power 1.5": lambda: Call(lambda x: (F.relu(x) + 0.1) ** 1.5),
    "power -1": lambda: Call(lambda x: (F.relu(x) + 0.5) ** -1),
    "maximum": lambda: Call(lambda x: torch.maximum(x, 0.5 * x.flip(-1))),
    "amax": lambda: Call(lambda x: x - 0.5 * x.amax(-1, keepdim=True)),
    "minimum": lambda: Call(lambda x: torch.min(x, 0.5 - x.flip(-1))),
    "max_pool": lambda: Call(
        lambda x: F.max_pool1d(x.flatten(1).unsqueeze(1), 3, 1, 1).reshape(x.shape)
    ),
    "attention": lambda: Call(
        lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(-1)] * 3).squeeze(-1)
    ),
    "layer_norm": Normed,
}  # fmt: skip


def network(seed):
    """A dense network, or every third time a small convolutional one."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    names = list(ACTIVATIONS)
    name = names[seed % len(names)]
    act = ACTIVATIONS[name]
    depth, width = (int(torch.randint(*r, (1,), generator=generator)) for r in ((1, 4), (3, 12)))
    if seed % 3 == 2:
        layers = [nn.Conv2d(1, 2, 3, padding=1), act()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(2, 2, 3, padding=1), act()]
        model = nn.Sequential(
            *layers, nn.Conv2d(2, 3, 3, stride=2, padding=1), act(), nn.Flatten(), nn.Linear(12, 2)
        )
        x = torch.randn(1, 1, 4, 4)
    else:
        sizes = [4, *[width] * depth, 2]
        layers = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), act()]
        model, x = nn.Sequential(*layers[:-1]), torch.randn(1, 4)
    eps = float(10 ** (2 * torch.rand((), generator=generator) - 2))
    return name, model.eval(), Interval.ball(x, eps)


def attacked(model, box):
    """``(N, 2)`` outputs at samples, corners and where gradient steps end, in float64."""
    wide = copy.deepcopy(model).double()
    low, high = box.lower[0].double(), box.upper[0].double()
    inside = low + torch.rand(40, *low.shape, dtype=torch.float64) * (high - low)
    corners = torch.where(torch.rand(40, *low.shape) < 0.5, low, high)
    x = torch.cat([inside, corners, low[None], high[None]])
    with torch.no_grad():
        values = [wide(x)]
    sign = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0).double()
    for step in range(20):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((wide(x)[:, step % 2] * sign).sum(), x)
        with torch.no_grad():
            move = 0.2 * (high - low) * gradient.sign()
            x = torch.maximum(torch.minimum(x + move, high), low)
            values.append(wide(x))
    return torch.cat(values)


def check(seed):
    name, model, box = network(seed)
    values = attacked(model, box)
    found = []
    for method in METHODS:
        bounds = bound(model, box, method=method, iterations=2)
        low, high = bounds.lower.double(), bounds.upper.double()
        # the float64 evaluation of the network itself errs by some units
        slack = 1e-13 * (1 + values.abs())
        assert bool((values >= low - slack).all() & (values <= high + slack).all()), (name, method)
        found.append((low, high))
    for looser, tighter in ((0, 1), (0, 2), (0, 3), (2, 3)):
        assert bool((found[tighter][0] >= found[looser][0]).all()), (name, METHODS[tighter])
        assert bool((found[tighter][1] <= found[looser][1]).all()), (name, METHODS[tighter])


@pytest.mark.parametrize("seed", range(0, NETWORKS, EVERY))
def test_nothing_escapes_and_methods_are_ordered(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(EVERY))
def test_two_hundred_networks(first):
    for seed in range(first, NETWORKS, EVERY):
        check(seed)
