"""Kinds of smoothing noise: how copies are drawn, and what their votes certify.

Each noise fixes a norm, turns bounds of the top class's probability into a radius, and says which
probability a radius needs. Values are pure functions of seed, image index, sample index and
element, so nothing depends on batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pyrobust import _native, ops
from pyrobust._checks import check_choice, check_integer, check_open_unit, check_positive
from pyrobust.certify.first_layer_noise import after_linear_samples, noise_factor
from pyrobust.certify.radii import (
    ablation_needs,
    ablation_radius,
    gaussian_needs,
    laplace_needs,
    laplace_radius,
    uniform_needs,
    uniform_radius,
)
from pyrobust.certify.statistics import gaussian_radius

__all__ = [
    "AblationNoise",
    "AfterLinearNoise",
    "GaussianNoise",
    "GridGaussianNoise",
    "LaplaceNoise",
    "Noise",
    "UniformNoise",
    "noise_of",
]


class Noise(Protocol):
    """What a smoothed classifier needs of its noise.

    Attributes:
        norm: of the radii: ``"l2"``, ``"l1"`` or ``"l0"``.
        assumption: what a certificate under this noise takes for granted.
    """

    norm: ClassVar[str]
    assumption: ClassVar[str]

    def __hash__(self) -> int:
        """Noises of equal parameters are one key."""

    @property
    def sigma(self) -> float:
        """Its size, as a certificate reports it."""

    def radius(self, p_lower: Any, p_upper: Any = None) -> Tensor:
        """Signed radius from bounds of the probabilities of the top class and the runner-up."""

    def needs(self, radius: float) -> float:
        """The probability above which ``radius`` is certified; 1 or more where none is."""

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """``(B, n, ...)`` noisy copies of CPU inputs."""

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one copy of an input of a shape."""

    def fill(
        self, x: Tensor, out: Tensor, *, seed: int, first_sample: int, first_index: int
    ) -> None:
        """Write copies of one input ``(1, ...)`` into the float32 rows ``out`` ``(n, ...)``."""


class _Noise:
    """What most noises share."""

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        return inputs

    def fill(
        self, x: Tensor, out: Tensor, *, seed: int, first_sample: int, first_index: int
    ) -> None:
        position = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        with torch.no_grad():
            out.copy_(self.samples(x, out.shape[0], **position)[0])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class GaussianNoise(_Noise):
    """Normal noise of standard deviation ``sigma``; l2 radii (Cohen et al. 2019)."""

    sigma: float
    norm: ClassVar[str] = "l2"
    assumption: ClassVar[str] = (
        "the votes are independent draws of the base under exactly Gaussian noise"
    )

    def radius(self, p_lower: Any, p_upper: Any = None) -> Tensor:
        """See :func:`pyrobust.certify.gaussian_radius`."""
        return gaussian_radius(p_lower, self.sigma, p_upper=p_upper)

    def needs(self, radius: float) -> float:
        """``Phi(radius / sigma)``."""
        return gaussian_needs(radius, self.sigma)

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """Copies of float inputs, in their dtype."""
        return ops.gaussian_samples(
            x, self.sigma, n, seed=seed, first_sample=first_sample, first_index=first_index
        )

    def fill(
        self, x: Tensor, out: Tensor, *, seed: int, first_sample: int, first_index: int
    ) -> None:
        """Straight into place, without a copy."""
        flat = x.detach().float().reshape(1, -1).contiguous()
        scale = torch.full((1,), self.sigma, dtype=torch.float32)
        place = out.view(1, out.shape[0], -1)
        threads = torch.get_num_threads()
        _native.gaussian_samples(flat, scale, place, seed, first_sample, first_index, threads)


@dataclass(frozen=True, eq=False)
class AfterLinearNoise(GaussianNoise):
    """Gaussian noise on inputs, drawn as what a first linear layer makes of it.

    The copies are outputs of the layer, of the same law; the rest of the network votes on them
    (:mod:`pyrobust.certify.first_layer_noise`).
    """

    linear: nn.Linear = field(default_factory=lambda: nn.Linear(2, 1))
    _factor: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """The outputs of the layer."""
        return (self.linear.out_features,)

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """Outputs of the layer on copies of float inputs, in their dtype."""
        weight, bias = self.linear.weight.detach().cpu().float(), self.linear.bias
        # Compared by value: a weight may be replaced by means that count no change.
        known = self._factor.get("weight")
        if known is None or not torch.equal(known, weight):
            self._factor.update(weight=weight.clone(), factor=noise_factor(weight))
        drawn = after_linear_samples(
            x.float().flatten(1),
            weight,
            None if bias is None else bias.detach().cpu().float(),
            self.sigma,
            n,
            seed=seed,
            first_sample=first_sample,
            first_index=first_index,
            factor=self._factor["factor"],
        )
        return drawn.to(x.dtype)

    def fill(
        self, x: Tensor, out: Tensor, *, seed: int, first_sample: int, first_index: int
    ) -> None:
        """Through :meth:`samples`."""
        position = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        _Noise.fill(self, x, out, **position)


@dataclass(frozen=True)
class GridGaussianNoise(_Noise):
    """Exactly Gaussian noise on 8-bit images, rounded to their grid; l2 radii without a float gap.

    The base sees ``round(grid (x + sigma z)) / grid``, correctly rounded, nothing clamped: it is a
    classifier of rounded inputs under exactly Gaussian noise, so the radius holds as it stands
    (Voracek and Hein 2023, arXiv 2207.07209). Inputs are uint8; radii are in units of ``grid``
    steps, as for images in [0, 1].
    """

    sigma: float
    grid: int = 255
    norm: ClassVar[str] = "l2"
    assumption: ClassVar[str] = (
        "the votes are independent draws of the base under exactly Gaussian noise, rounded "
        "correctly to the grid of the images"
    )

    def radius(self, p_lower: Any, p_upper: Any = None) -> Tensor:
        """See :func:`pyrobust.certify.gaussian_radius`."""
        return gaussian_radius(p_lower, self.sigma, p_upper=p_upper)

    def needs(self, radius: float) -> float:
        """``Phi(radius / sigma)``."""
        return gaussian_needs(radius, self.sigma)

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """float32 copies of uint8 inputs, on the grid."""
        return ops.grid_samples(
            x,
            self.sigma,
            n,
            seed=seed,
            grid=self.grid,
            first_sample=first_sample,
            first_index=first_index,
            dtype=torch.float32,
        )


@dataclass(frozen=True)
class UniformNoise(_Noise):
    """Uniform noise of standard deviation ``sigma``, so on ``+- sqrt(3) sigma``; l1 radii."""

    sigma: float
    norm: ClassVar[str] = "l1"
    assumption: ClassVar[str] = (
        "the votes are independent draws of the base under exactly uniform noise"
    )

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return math.sqrt(3.0) * self.sigma

    def radius(self, p_lower: Any, p_upper: Any = None) -> Tensor:
        """See :func:`pyrobust.certify.uniform_radius`."""
        return uniform_radius(p_lower, self.half_width, p_upper=p_upper)

    def needs(self, radius: float) -> float:
        """Grows linearly with the radius, to 1 at the half width."""
        return uniform_needs(radius, self.half_width)

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """Copies of float inputs, in their dtype."""
        return ops.uniform_samples(
            x, self.half_width, n, seed=seed, first_sample=first_sample, first_index=first_index
        )


@dataclass(frozen=True)
class LaplaceNoise(_Noise):
    """Laplace noise of standard deviation ``sigma``; l1 radii."""

    sigma: float
    norm: ClassVar[str] = "l1"
    assumption: ClassVar[str] = (
        "the votes are independent draws of the base under exactly Laplacian noise"
    )

    @property
    def scale(self) -> float:
        """Mean absolute value."""
        return self.sigma / math.sqrt(2.0)

    def radius(self, p_lower: Any, p_upper: Any = None) -> Tensor:
        """See :func:`pyrobust.certify.laplace_radius`."""
        return laplace_radius(p_lower, self.scale, p_upper=p_upper)

    def needs(self, radius: float) -> float:
        """``1 - exp(-radius / scale) / 2``."""
        return laplace_needs(radius, self.scale)

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """Copies of float inputs, in their dtype."""
        return ops.laplace_samples(
            x, self.scale, n, seed=seed, first_sample=first_sample, first_index=first_index
        )


@dataclass(frozen=True)
class AblationNoise(_Noise):
    """Each pixel is hidden with probability ``sigma``; radii count changed pixels (l0).

    Images ``(B, C, H, W)`` hide all channels of a pixel together, other inputs single elements.
    Hidden ones are set to ``fill``. The coins are exact, so the certificate has no float gap.
    """

    sigma: float
    fill_value: float = 0.0
    norm: ClassVar[str] = "l0"
    assumption: ClassVar[str] = (
        "the votes are independent draws of the base on inputs whose pixels are hidden by coins"
    )

    @property
    def keep(self) -> float:
        """Probability that a pixel is kept."""
        return 1.0 - self.sigma

    def radius(self, p_lower: Any, p_upper: Any = None) -> Tensor:
        """See :func:`pyrobust.certify.ablation_radius`."""
        return ablation_radius(p_lower, self.keep, p_upper=p_upper)

    def needs(self, radius: float) -> float:
        """``1 / 2`` and the probability that a changed pixel is kept."""
        return ablation_needs(radius, self.keep)

    def samples(
        self, x: Tensor, n: int, *, seed: int, first_sample: int = 0, first_index: int = 0
    ) -> Tensor:
        """Copies of float inputs, in their dtype."""
        return ops.masked_samples(
            x,
            self.keep,
            n,
            seed=seed,
            fill=self.fill_value,
            per="pixel" if x.ndim >= 4 else "element",
            first_sample=first_sample,
            first_index=first_index,
        )


def noise_of(
    subject: str, sigma: float, norm: str, kind: str | None = None, grid: int | None = None
) -> Noise:
    """The noise for a norm.

    Args:
        subject: who asks, for error messages.
        sigma: standard deviation, ``> 0``; for ``"l0"`` the probability, in (0, 1), that a pixel is
            hidden.
        norm: ``"l2"``, ``"l1"`` or ``"l0"``.
        kind: ``"gaussian"`` (l2), ``"uniform"`` or ``"laplace"`` (l1), ``"ablation"`` (l0); None
            takes the first of the norm.
        grid: steps per unit of 8-bit inputs (l2); None for float inputs.

    Raises:
        ValueError: a value out of range, a kind of another norm, or a grid with another norm.
    """
    kinds = {"l2": ("gaussian",), "l1": ("uniform", "laplace"), "l0": ("ablation",)}
    check_choice(subject, "norm", norm, kinds)
    kind = kinds[norm][0] if kind is None else kind
    check_choice(subject, f"noise for norm {norm}", kind, kinds[norm])
    if norm == "l0":
        check_open_unit(subject, "sigma", sigma)
    check_positive(subject, "sigma", sigma)
    if grid is not None:
        check_integer(subject, "grid", grid, 1)
        if norm != "l2":
            raise ValueError(f"{subject}: grid must be None for norm {norm}; got {grid}.")
        return GridGaussianNoise(sigma, grid)
    classes: dict[str, Any] = {
        "gaussian": GaussianNoise,
        "uniform": UniformNoise,
        "laplace": LaplaceNoise,
        "ablation": AblationNoise,
    }
    noise: Noise = classes[kind](sigma)
    return noise
