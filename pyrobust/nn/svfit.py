"""SVFit: fine-tune only the singular values of frozen weights.

Each weight is split by a singular value decomposition; singular vectors stay frozen and the
leading r singular values are trained, r numbers per matrix, starting exactly at the pretrained
function. The leading directions need not be the best subspace for a given shift (a random one of
equal size can do better: ``subspace="random"`` is the control), so prefer full length where the
budget allows.

Source: Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using
Singular Values", 2024, arXiv 2409.05926.
Departures: the default stores no residual matrix but trains the change of the singular values
beside the intact weight (``mode="delta"``; the same function, exact start); ``mode="split"`` is the
paper's form. Both readings of "99% of the information" are offered (``measure``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from pyrobust._checks import check_choice, check_integer
from pyrobust.nn.adapter import Adapter
from pyrobust.weights.svd_split import SVDSplit, svd_split

__all__ = ["SVFitConv2d", "SVFitLinear"]


class _SVFit(Adapter):
    """Singular-value adapter over a weight seen as a matrix.

    Args:
        base: the layer, frozen.
        rank: number of trained singular values per block, in ``[1, min(shape)]``; None chooses by
            ``energy``.
        energy: share of the spectrum to reach, in ``(0, 1]``.
        measure: "sum" of singular values or "squares".
        mode: "delta" (weight intact, change trained; exact start) or "split" (the paper's form).
        subspace: "top" or "random" (control).
        positive: train ``s exp(a)`` instead of ``s + ds``.
        row_blocks: equal blocks of rows with a decomposition each (3 for fused q, k, v).
        adapt_blocks: which blocks to adapt; None means all.
        generator: source of the random subspace.
    Shape:
        As the base layer.

    Raises:
        TypeError: another kind of layer.
        ValueError: an argument out of range, NaN weights, or the layer is adapted already.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int | None = None,
        *,
        energy: float = 0.99,
        measure: str = "sum",
        mode: str = "delta",
        subspace: str = "top",
        positive: bool = False,
        row_blocks: int = 1,
        adapt_blocks: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        subject = type(self).__name__
        check_choice(subject, "mode", mode, ["delta", "split"])
        check_choice(subject, "subspace", subspace, ["top", "random"])
        check_integer(subject, "row_blocks", row_blocks, 1)
        if isinstance(base, nn.Conv2d) and base.groups != 1:
            raise ValueError(f"{subject}: groups must be 1; got {base.groups}.")
        if base.weight.shape[0] % row_blocks:
            raise ValueError(
                f"{subject}: row_blocks must divide {base.weight.shape[0]} rows; got {row_blocks}."
            )
        if positive and subspace == "random":
            raise ValueError(f"{subject}: positive=True needs subspace='top'.")
        blocks = range(row_blocks) if adapt_blocks is None else adapt_blocks
        self.mode, self.subspace, self.positive = mode, subspace, positive
        self.row_blocks, self.blocks = row_blocks, tuple(blocks)
        self._decompose(rank, energy, measure, generator)

    def _decompose(
        self, rank: int | None, energy: float, measure: str, generator: torch.Generator | None
    ) -> None:
        weight = self.base.weight
        matrix = weight.detach().flatten(1)
        rows = matrix.shape[0] // self.row_blocks
        residual = matrix.float().clone()
        us, ss, vs, owners = [], [], [], []
        for block in self.blocks:
            part = slice(block * rows, (block + 1) * rows)
            split = svd_split(matrix[part], rank=rank, energy=energy, measure=measure)
            if self.subspace == "random":
                split = _random_subspace(matrix[part], split.rank, generator)
            residual[part] = split.residual
            padded = matrix.new_zeros((matrix.shape[0], split.rank), dtype=split.u.dtype)
            padded[part] = split.u
            us.append(padded)
            ss.append(split.s)
            vs.append(split.vh)
            owners.append(split.rank)
        self.register_buffer("u", torch.cat(us, 1).to(weight))
        self.register_buffer("vh", torch.cat(vs).to(weight))
        self.register_buffer("s0", torch.cat(ss))  # float32 also under half-precision weights
        self.u: Tensor
        self.vh: Tensor
        self.s0: Tensor
        if self.mode == "split":
            self.register_buffer("residual", residual.reshape(weight.shape).to(weight))
            self.residual: Tensor
        self.change = nn.Parameter(torch.zeros_like(self.s0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # singular values and their change stay float32 under .half() and .bfloat16()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.s0.dtype in (torch.float16, torch.bfloat16):
            self.s0 = self.s0.float()
            self.change.data = self.change.data.float()
        return self

    @property
    def singular_values(self) -> Tensor:
        """Present values of the trained part, ``(r,)``."""
        return self.s0 * self.change.exp() if self.positive else self.s0 + self.change

    def _difference(self) -> Tensor:
        return self.s0 * self.change.expm1() if self.positive else self.change

    def delta_weight(self) -> Tensor:
        """``U diag(ds) V^T`` in the shape of the weight."""
        wide = self.u.float() * self._difference().float()
        return (wide @ self.vh.float()).reshape(self.base.weight.shape)

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (r, columns) and ``B`` (rows, r) whose product ``B A`` is the update."""
        return self.vh.detach(), (self.u.float() * self._difference()).to(self.u).detach()

    def _through(self, x: Tensor, scale: Tensor) -> Tensor:
        if isinstance(self.base, nn.Conv2d):
            kernel = self.vh.reshape(-1, *self.base.weight.shape[1:])
            narrow = self.base_product(x, kernel) * scale.to(x.dtype)[:, None, None]
            return F.conv2d(narrow, self.u[:, :, None, None])
        return F.linear(F.linear(x, self.vh) * scale.to(x.dtype), self.u)

    def delta_forward(self, x: Tensor) -> Tensor:
        """Two thin products with the change of the singular values between them."""
        return self._through(x, self._difference())

    def forward(self, x: Tensor) -> Tensor:
        """Output of the adapted layer."""
        if self.mode == "delta" or self.merged or not self.enabled:
            return super().forward(x)
        output = self.base_product(x, self.residual) + self._through(x, self.singular_values)
        if self.base.bias is None:
            return output
        shape = (-1, 1, 1) if isinstance(self.base, nn.Conv2d) else (-1,)
        return output + self.base.bias.reshape(shape)

    def extra_repr(self) -> str:
        """Rank and form."""
        return f"rank={self.change.numel()}, mode={self.mode}, subspace={self.subspace}"


def _random_subspace(matrix: Tensor, rank: int, generator: torch.Generator | None) -> SVDSplit:
    """Control: random orthonormal pairs; ``s`` holds the matrix's coefficients on them."""
    wide = matrix.detach().float()
    q_u = torch.linalg.qr(torch.randn(wide.shape[0], rank, generator=generator))[0]
    q_v = torch.linalg.qr(torch.randn(wide.shape[1], rank, generator=generator))[0]
    u, vh = q_u.to(wide), q_v.T.to(wide)
    s = ((u.T @ wide) * vh).sum(1)
    return SVDSplit(u, s, vh, wide - (u * s) @ vh)


class SVFitLinear(_SVFit):
    """Singular-value adapter over a linear layer; arguments of the class it extends.

    Example:
        >>> layer = SVFitLinear(nn.Linear(6, 6), 6)
        >>> [tuple(p.shape) for p in layer.trainable_parameters()]
        [(6,)]
    """

    layer_types = (nn.Linear,)


class SVFitConv2d(_SVFit):
    """Singular-value adapter over an ungrouped convolution seen as ``(C_out, C_in k k)``."""

    layer_types = (nn.Conv2d,)
