"""Networks and interval passes of other libraries, in one table with ours; absent ones are not.

A pass takes a batch and returns the ends of the output of the box of radius 2/255 around it. A
training step adds the cross-entropy of the worst-case logits and its backward pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrobust import Interval
from pyrobust.ops import radius_precision

EPS = 2 / 255
Ends = tuple[Tensor, Tensor]


def mlp() -> nn.Sequential:
    """784-1024-1024-1024-10: 2.91 million weights."""
    sizes = [784, 1024, 1024, 1024]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def cnn7(width: int = 64) -> nn.Sequential:
    """Seven layers for 3x32x32 images after Shi et al. (2021), no norm: 17.2 million weights."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * 256, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """Six residual blocks of 64 to 256 channels for 3x32x32 images, with statistics of noise."""
    blocks = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        *[ResidualBlock(*block) for block in blocks],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32))
    return model.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP": (mlp, (784,)),
    "CNN7": (cnn7, (3, 32, 32)),
}


def ours(
    model: nn.Module, rounding: str = "real", radius: str = "float32", gradients: str = "float32"
) -> Callable[[Tensor], Ends]:
    """Our interval pass, by calling the model on a box."""

    def run(x: Tensor) -> Ends:
        with radius_precision(radius, gradients=gradients):
            box = model(Interval.ball(x, EPS, rounding=rounding))
        return box.lower, box.upper

    return run


def centre_radius(model: nn.Sequential) -> Callable[[Tensor], Ends]:
    """Two products a layer in plain torch, ends at the ReLUs."""

    def run(x: Tensor) -> Ends:
        lower, upper = x - EPS, x + EPS
        for module in model:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                middle = module((lower + upper) * 0.5)
                half, size = (upper - lower) * 0.5, module.weight.abs()
                if isinstance(module, nn.Linear):
                    reach = F.linear(half, size)
                else:
                    reach = F.conv2d(half, size, None, module.stride, module.padding)
                lower, upper = middle - reach, middle + reach
            else:
                lower, upper = module(lower), module(upper)
        return lower, upper

    return run


def auto_lirpa(model: nn.Module, x: Tensor) -> Callable[[Tensor], Ends] | None:
    """``method="IBP"`` of auto_LiRPA, where it is installed."""
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    except ImportError:
        return None
    bounded = BoundedModule(copy.deepcopy(model), x, device=x.device)

    def run(x: Tensor) -> Ends:
        region = PerturbationLpNorm(norm=float("inf"), x_L=x - EPS, x_U=x + EPS)
        lower, upper = bounded.compute_bounds(x=(BoundedTensor(x, region),), method="IBP")
        return lower, upper

    return run


def jax_passes(model: nn.Sequential) -> dict[str, Callable[[Tensor], Any]]:
    """A plain forward and a compiled centre-radius pass of the MLP in JAX, where installed."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}
    if any(isinstance(module, nn.Conv2d) for module in model):
        return {}
    layers = [
        (jnp.asarray(m.weight.detach().numpy()), jnp.asarray(m.bias.detach().numpy()))
        for m in model
        if isinstance(m, nn.Linear)
    ]

    @jax.jit
    def plain(x: Any) -> Any:
        for index, (weight, bias) in enumerate(layers):
            x = (jax.nn.relu(x) if index else x) @ weight.T + bias
        return x

    @jax.jit
    def interval(x: Any) -> Any:
        lower, upper = x - EPS, x + EPS
        for index, (weight, bias) in enumerate(layers):
            if index:
                lower, upper = jax.nn.relu(lower), jax.nn.relu(upper)
            middle = (lower + upper) * 0.5 @ weight.T + bias
            reach = (upper - lower) * 0.5 @ abs(weight).T
            lower, upper = middle - reach, middle + reach
        return lower, upper

    def on(function: Any) -> Callable[[Tensor], Any]:
        return lambda x: jax.block_until_ready(function(jnp.asarray(x.numpy())))

    return {"JAX, plain forward": on(plain), "JAX jit, centre and radius": on(interval)}


def worst_case_step(
    model: nn.Module, ends: Callable[[Tensor], Ends], target: Tensor
) -> Callable[[Tensor], Any]:
    """A training step without the optimizer: worst-case cross-entropy and all gradients."""

    def run(x: Tensor) -> None:
        model.zero_grad()
        lower, upper = ends(x)
        own = F.one_hot(target, lower.shape[1]).bool()
        F.cross_entropy(torch.where(own, lower, upper), target).backward()

    return run


def plain_step(model: nn.Module, target: Tensor) -> Callable[[Tensor], Any]:
    """The same of the network itself."""

    def run(x: Tensor) -> None:
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()

    return run
