"""Low-rank adapters: LoRA for linear and convolution layers, and its relatives on one interface.

``LoRALinear`` and ``ConvLoRA2d`` add ``(alpha / r) B A`` with ``B`` zero at the start; ``LoHa``
adds the elementwise product of two such terms; ``VeRA`` trains two scaling vectors between frozen
random factors; ``init="pissa"`` starts LoRA from the top singular triples and freezes the rest.

Source: Hu et al., "LoRA", 2021, arXiv 2106.09685; Hyeon-Woo et al., "FedPara" (LoHa), 2021, arXiv
2108.06098; Meng et al., "PiSSA", 2024, arXiv 2404.02948; Kopiczko et al., "VeRA", 2023, arXiv
2310.11454. Convolution form: ``A`` is a k x k convolution to r channels, ``B`` a 1 x 1 one.
Departures: a grouped convolution gets r channels per group, so that the update merges exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_integer, check_positive
from pyrobust.nn.adapter import Adapter
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.weights.svd_split import svd_split

__all__ = ["ConvLoRA2d", "LoHa", "LoRALinear", "VeRA"]


def _check_rank(subject: str, r: int, rows: int, columns: int, full_rank: bool = False) -> None:
    check_integer(subject, "r", r, 1)
    limit = min(rows, columns)
    if r > limit or (r == limit and not full_rank):
        bound = "at most" if full_rank else "below"
        raise ValueError(f"{subject}: r must be {bound} min({columns}, {rows}) = {limit}; got {r}.")


def _uniform_factor(rows: int, columns: int, like: Tensor) -> nn.Parameter:
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound).to(like))


class _LowRank(Adapter):
    """LoRA over the weight seen as ``groups`` matrices ``(rows / groups, columns)``."""

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d | PackedLinear,
        r: int,
        alpha: float,
        init: str,
        full_rank: bool,
    ) -> None:
        super().__init__(base)
        groups = base.groups if isinstance(base, nn.Conv2d) else 1
        subject = type(self).__name__
        check_positive(subject, "alpha", alpha)
        check_choice(subject, "init", init, ["zero", "pissa"])
        if init == "pissa" and isinstance(base, PackedLinear):
            raise ValueError(f"{subject}: init must be 'zero' over a packed layer; got 'pissa'.")
        weight = base.weight
        rows, columns = weight.shape[0], weight[0].numel()
        _check_rank(subject, r, rows // groups, columns, full_rank)
        self.r, self.alpha, self.groups, self.init = r, alpha, groups, init
        self.lora_A = _uniform_factor(groups * r, columns, weight)
        self.lora_B = nn.Parameter(weight.new_zeros(rows, r))
        if init == "pissa":
            self._start_from_singular_triples()

    @torch.no_grad()
    def _start_from_singular_triples(self) -> None:
        if self.groups != 1:
            raise ValueError(f"{type(self).__name__}: init='pissa' needs groups=1.")
        weight = self.base.weight
        split = svd_split(weight.flatten(1), rank=self.r)
        root = split.s.sqrt() / math.sqrt(self.scaling)
        self.lora_A.copy_(root[:, None] * split.vh)
        self.lora_B.copy_(split.u * root)
        # What the factors hold after rounding leaves the frozen weight, so that the start is exact
        # up to one rounding of the sum.
        weight.copy_((weight.float() - self.delta_weight().float()).to(weight))

    @property
    def scaling(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r

    def delta_weight(self) -> Tensor:
        """``(alpha / r) B A`` in the shape of the weight."""
        b = self.lora_B.reshape(self.groups, -1, self.r)
        a = self.lora_A.reshape(self.groups, self.r, -1)
        return (self.scaling * (b @ a)).reshape(self.base.weight.shape)

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"r={self.r}, alpha={self.alpha:g}"


class LoRALinear(_LowRank):
    """LoRA over a linear layer, or over a packed one, beside which the update stays.

    Args:
        base: the layer, frozen.
        r: rank, ``1 <= r < min(in_features, out_features)``.
        alpha: the update is scaled by ``alpha / r``; ``> 0``.
        init: "zero" (the update starts at zero) or "pissa" (the top singular triples move from the
            frozen weight into the factors).
        full_rank: accept ``r = min(in_features, out_features)`` too, which saves nothing but is
            what a checkpoint may hold.

    Raises:
        TypeError: ``base`` is neither an ``nn.Linear`` nor a ``PackedLinear``.
        ValueError: ``r`` or ``alpha`` out of range, or "pissa" over a packed layer.

    Example:
        >>> layer = LoRALinear(nn.Linear(8, 8), r=2)
        >>> sum(p.numel() for p in layer.trainable_parameters())
        32
    """

    layer_types = (nn.Linear, PackedLinear)

    def __init__(
        self,
        base: nn.Linear | PackedLinear,
        *,
        r: int = 8,
        alpha: float = 16.0,
        init: str = "zero",
        full_rank: bool = False,
    ) -> None:
        super().__init__(base, r, alpha, init, full_rank)

    def delta_forward(self, x: Tensor) -> Tensor:
        """Two thin products."""
        return self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


class ConvLoRA2d(_LowRank):
    """LoRA over a convolution: a k x k convolution to ``r`` channels, then a 1 x 1 one.

    Args:
        base: the layer, frozen; any stride, padding, dilation and groups.
        r: rank (per group), below ``min(in_channels / groups * k * k, out_channels / groups)``.
        alpha: the update is scaled by ``alpha / r``; ``> 0``.
        init: "zero" or "pissa" (ungrouped layers only).
        full_rank: accept the least of the two itself too, which saves nothing but is what a
            checkpoint may hold.

    Raises:
        TypeError: ``base`` is not an ``nn.Conv2d``.
        ValueError: ``r`` or ``alpha`` out of range.
    """

    layer_types = (nn.Conv2d,)

    def __init__(
        self,
        base: nn.Conv2d,
        *,
        r: int = 4,
        alpha: float = 32.0,
        init: str = "zero",
        full_rank: bool = False,
    ) -> None:
        super().__init__(base, r, alpha, init, full_rank)

    def delta_forward(self, x: Tensor) -> Tensor:
        """The two small convolutions."""
        kernel = self.lora_A.reshape(self.groups * self.r, *self.base.weight.shape[1:])
        narrow = self.base_product(x, kernel)
        return self.scaling * F.conv2d(narrow, self.lora_B[:, :, None, None], groups=self.groups)


class LoHa(Adapter):
    """Product of two low-rank terms: ``(alpha / r) (B1 A1) * (B2 A2)``, elementwise; ``B2 = 0``.

    Args:
        base: linear or convolution layer, frozen.
        r: rank of both terms.
        alpha: scale, ``> 0``.

    Raises:
        ValueError: ``r`` or ``alpha`` out of range.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, *, r: int = 4, alpha: float = 32.0) -> None:
        super().__init__(base)
        check_positive("LoHa", "alpha", alpha)
        rows, columns = base.weight.shape[0], base.weight[0].numel()
        _check_rank("LoHa", r, rows, columns)
        self.r, self.alpha = r, alpha
        self.hada_A1 = _uniform_factor(r, columns, base.weight)
        self.hada_B1 = _uniform_factor(rows, r, base.weight)
        self.hada_A2 = _uniform_factor(r, columns, base.weight)
        self.hada_B2 = nn.Parameter(base.weight.new_zeros(rows, r))

    def delta_weight(self) -> Tensor:
        """The update in the shape of the weight."""
        product = (self.hada_B1 @ self.hada_A1) * (self.hada_B2 @ self.hada_A2)
        return (self.alpha / self.r * product).reshape(self.base.weight.shape)


class VeRA(Adapter):
    """Two trained scaling vectors between frozen random factors: ``diag(b) B diag(d) A``; b = 0.

    Args:
        base: linear or convolution layer, frozen.
        r: rank of the frozen factors.
        seed: the factors are drawn from this seed, so layers of one shape share them.

    Raises:
        ValueError: ``r`` out of range.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, *, r: int = 64, seed: int = 0) -> None:
        super().__init__(base)
        rows, columns = base.weight.shape[0], base.weight[0].numel()
        _check_rank("VeRA", r, rows, columns)
        self.r = r
        source = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", (r, columns)), ("vera_B", (rows, r))):
            bound = math.sqrt(6 / sum(shape))
            factor = torch.empty(shape).uniform_(-bound, bound, generator=source)
            self.register_buffer(name, factor.to(base.weight))
        self.vera_A: Tensor
        self.vera_B: Tensor
        self.vera_d = nn.Parameter(base.weight.new_full((r,), 0.1))
        self.vera_b = nn.Parameter(base.weight.new_zeros(rows))

    def delta_weight(self) -> Tensor:
        """The update in the shape of the weight."""
        product = self.vera_b[:, None] * (self.vera_B @ (self.vera_d[:, None] * self.vera_A))
        return product.reshape(self.base.weight.shape)
