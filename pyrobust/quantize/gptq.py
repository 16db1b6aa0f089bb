"""GPTQ: weights rounded column by column, each error made up for by the columns still to come.

Rounding to nearest ignores what a layer is given; GPTQ knows the second moments of its inputs and
moves the weights that are not rounded yet so that the outputs stay. It needs calibration data and
one Cholesky factor per layer, takes seconds, and is the method to beat below 4 bits.

Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", ICLR 2023, arXiv 2210.17323, algorithm 1;
groups along outputs after J. H. Heo et al., ICLR 2024, arXiv 2309.15531.
Departures: every grid contains 0; scales have at most 15 significant bits (float16 where they fit);
a Cholesky factor that fails is tried again with ten times the damping, three times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_finite,
    check_float_tensor,
    check_instance,
    check_integer,
    check_shape,
)
from pyrobust.ops.formats import levels_of
from pyrobust.quantize.calibration_block import CalibrationBlock, quantize_by_layer
from pyrobust.quantize.grid import covering_grid, divisor, split_groups, store_scale
from pyrobust.quantize.qtensor import QTensor

__all__ = ["GPTQ", "gptq", "gptq_weight"]

BITS = (2, 3, 4, 8)
_DIMS = {"oc": 1, "ic": 0}


def gptq(
    linear: nn.Linear,
    hessian: Tensor,
    bits: float,
    group_size: int = 128,
    dim: str = "oc",
    damp: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    *,
    symmetric: bool = False,
) -> QTensor:
    """Quantize the weight of a linear layer, given the second moments of its inputs.

    Args:
        linear: the float layer.
        hessian: ``(in_features, in_features)``, see
            :class:`~pyrobust.quantize.HessianAccumulator`; its factor does not matter.
        bits: 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``; the last group may be shorter.
        dim: ``"oc"``, groups along the inputs within an output channel, their grids fixed
            beforehand by the weight; ``"ic"``, along the outputs within an input channel, their
            grids fixed when the channel's turn comes.
        damp: share of the mean of the diagonal that is added to it, ``>= 0``.
        act_order: take input channels in the order of falling second moments.
        block: columns between two updates of all columns to come, ``>= 1``; speed only.
        symmetric: no zero-points.

    Returns:
        The packed weight.

    Raises:
        TypeError: ``linear`` is not a ``Linear``, or ``hessian`` is not floating point.
        ValueError: an option is out of range, a shape is wrong, a value is not finite, or
            ``hessian`` is not positive semi-definite.
    """
    check_instance("gptq", "linear", linear, nn.Linear)
    check_choice("gptq", "dim", dim, _DIMS)
    return gptq_weight(
        linear.weight,
        hessian,
        bits=bits,
        group_size=group_size,
        group_dim=_DIMS[dim],
        symmetric=symmetric,
        damp=damp,
        act_order=act_order,
        block=block,
    )


def gptq_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: float,
    group_size: int = 128,
    group_dim: int = 1,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = True,
    block: int = 128,
) -> QTensor:
    """:func:`gptq` for a weight ``(rows, columns)``, also of a grouped convolution.

    Args:
        weight: ``(rows, columns)`` floating point, finite.
        hessian: ``(columns, columns)``; ``(groups, columns, columns)`` where equal parts of the
            rows have inputs of their own. Its dtype is that of the computation.
        bits: 2, 3, 4 or 8.
        group_size: as for :func:`gptq`.
        group_dim: 1 for ``"oc"``, 0 for ``"ic"``.
        symmetric: no zero-points.
        damp: as for :func:`gptq`.
        act_order: as for :func:`gptq`.
        block: as for :func:`gptq`.

    Returns:
        The packed weight, on the device of ``hessian``.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: as for :func:`gptq`.
    """
    _check(weight, hessian, bits, group_size, group_dim, damp, block)
    hessian = hessian[None] if hessian.ndim == 2 else hessian
    parts, columns = hessian.shape[0], weight.shape[1]
    work = weight.detach().to(hessian).reshape(parts, -1, columns).clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    work.masked_fill_(dead[:, None, :], 0.0)
    order = torch.arange(columns, device=hessian.device)
    if act_order:
        order = diagonal.mean(0).argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[:, order][:, :, order], dead[:, order], damp)
    grids = (_StaticGrids if group_dim == 1 else _ColumnGrids)(
        work.flatten(0, 1), levels_of(bits), group_size, symmetric
    )
    codes = _compensated_codes(work[:, :, order], factor, order.tolist(), grids, block)
    return QTensor.from_codes(
        codes[:, order.argsort()],
        grids.scale,
        None if symmetric else grids.zero,
        bits=bits,
        group_size=group_size,
        group_dim=group_dim,
    )


def _check(
    weight: Tensor,
    hessian: Tensor,
    bits: float,
    group_size: int,
    group_dim: int,
    damp: float,
    block: int,
) -> None:
    check_float_tensor("gptq", "weight", weight)
    check_shape("gptq", "weight", weight, (None, None))
    check_finite("gptq", "weight", weight)
    check_float_tensor("gptq", "hessian", hessian)
    columns = weight.shape[1]
    parts = hessian.shape[0] if hessian.ndim == 3 else 1
    expected = (columns, columns) if hessian.ndim != 3 else (parts, columns, columns)
    check_shape("gptq", "hessian", hessian, expected)
    if parts < 1 or weight.shape[0] % parts:
        raise ValueError(
            f"gptq: hessian must have a number of parts that divides the {weight.shape[0]} rows of "
            f"weight; got {parts}."
        )
    check_finite("gptq", "hessian", hessian)
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"gptq: bits must be one of 2, 3, 4, 8; got {bits!r}.")
    check_integer("gptq", "group_size", group_size, 1)
    check_choice("gptq", "group_dim", group_dim, (0, 1))
    check_at_least("gptq", "damp", damp, 0.0)
    check_integer("gptq", "block", block, 1)


def _inverse_factor(hessian: Tensor, dead: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Row i holds, in units of its diagonal, by how much the columns from i on follow column i when
    those before are fixed.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal[dead] = 1.0
    step = damp * diagonal.mean(1, keepdim=True)
    for _ in range(4):
        diagonal += step
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed.any()):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed.any()) and bool(torch.isfinite(upper).all()):
                factor: Tensor = upper
                return factor
        step = 10 * step
    raise ValueError(
        "gptq: hessian must be positive semi-definite, and damp large enough to invert it; "
        f"its Cholesky factor fails at damp {damp:g} and up to 1000 times as much."
    )


def _compensated_codes(
    work: Tensor, factor: Tensor, order: list[int], grids: _Grids, block: int
) -> Tensor:
    """Codes ``(rows, columns)`` in the order of work; ``work`` ``(parts, rows, columns)`` changes.

    Within a block every column is updated at once; the rest follows after each block.
    """
    parts, rows, columns = work.shape
    codes = torch.empty(parts * rows, columns, dtype=torch.uint8, device=work.device)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = torch.empty(parts, rows, end - begin, dtype=work.dtype, device=work.device)
        for i in range(begin, end):
            column = work[:, :, i]
            code, value = grids.quantize(column.reshape(-1), order[i])
            codes[:, i] = code
            error = (column - value.reshape(parts, rows)) / factor[:, i, i, None]
            work[:, :, i:end] -= error[:, :, None] * factor[:, i, None, i:end]
            errors[:, :, i - begin] = error
        if end < columns:
            work[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return codes


class _Grids:
    """Scales and zero-points of a weight, and the nearest codes of one of its columns.

    Args:
        weight: ``(rows, columns)``.
        levels: code values.
        group_size: weights that share a scale.
        symmetric: fix the zero-point in the middle.
    """

    def __init__(self, weight: Tensor, levels: int, group_size: int, symmetric: bool) -> None:
        self.levels = levels
        self.symmetric = symmetric
        self.group_size = group_size
        along = self.along(weight)
        scale, zero = covering_grid(split_groups(along, group_size), levels, symmetric)
        self.scale, self.zero = self.along(scale).contiguous(), self.along(zero).contiguous()
        self.rows = weight.shape[0]

    def along(self, weight: Tensor) -> Tensor:
        """``weight`` with groups along its rows."""
        return weight

    def of_column(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Scale and zero-point for each row of the column of that index."""
        raise NotImplementedError

    def quantize(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Codes of a column and their values."""
        scale, zero = self.of_column(column, index)
        scale, zero = scale.to(column), zero.to(column)
        code = (torch.round(column / divisor(scale)) + zero).clamp(0, self.levels - 1)
        return code.to(torch.uint8), (code - zero) * scale


class _StaticGrids(_Grids):
    """Groups along the inputs, fixed by the weight as it was: any order of columns is possible."""

    def of_column(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        group = index // self.group_size
        return self.scale[:, group], self.zero[:, group]


class _ColumnGrids(_Grids):
    """Groups along the outputs: a column brings grids of its own when its turn comes."""

    def along(self, weight: Tensor) -> Tensor:
        return weight.t()

    def of_column(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        grouped = split_groups(column[None], min(self.group_size, max(1, self.rows)))
        scale, zero = covering_grid(grouped, self.levels, self.symmetric)
        if self.scale.dtype == torch.float16 and scale.dtype != torch.float16:
            # One column left float16's precise range: a scale too fine for it is made coarser.
            finer = store_scale(scale.clamp(min=2.0**-14), up=True).half()
            scale = torch.where(scale > 0, finer, 0.0)
            low = grouped.amin(2).clamp(max=0)
            zero = zero if self.symmetric else _zero_of(low, scale, self.levels)
        self.scale[:, index], self.zero[:, index] = scale[0], zero[0]
        size = self.group_size
        return (
            self.scale[:, index].repeat_interleave(size)[: self.rows],
            self.zero[:, index].repeat_interleave(size)[: self.rows],
        )


def _zero_of(low: Tensor, scale: Tensor, levels: int) -> Tensor:
    steps = torch.round(-low / divisor(scale.to(low)))
    return steps.clamp(0, levels - 1).to(torch.uint8)


@dataclass(frozen=True)
class GPTQ:
    """GPTQ as a quantizer of :func:`pyrobust.pack`.

    Every layer is quantized on the inputs that the layers before it, as already quantized, give.

    Args:
        damp: see :func:`gptq`.
        act_order: see :func:`gptq`.
        block: see :func:`gptq`.
        propagate: ``"quantized"``, or ``"float"`` for inputs of blocks from the float model.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import pyrobust
        >>> model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> packed = pyrobust.pack(
        ...     model, bits=3, quantizer=GPTQ(), calibration=[torch.randn(64, 32)]
        ... )
        >>> packed[0].bits
        3
    """

    damp: float = 0.01
    act_order: bool = True
    block: int = 128
    propagate: str = "quantized"

    def __post_init__(self) -> None:
        check_at_least("GPTQ", "damp", self.damp, 0.0)
        check_integer("GPTQ", "block", self.block, 1)
        check_choice("GPTQ", "propagate", self.propagate, ("quantized", "float"))

    @property
    def float_stream(self) -> bool:
        """The float model's inputs are not needed beside those that are propagated."""
        return False

    def quantize_block(self, block: CalibrationBlock) -> None:
        """Quantize the layers of one block in the order they run."""

        def one(name: str, hessian: Tensor) -> QTensor:
            return gptq_weight(
                block.weight(name),
                hessian,
                **block.formats[name],
                damp=self.damp,
                act_order=self.act_order,
                block=self.block,
            )

        quantize_by_layer(block, one)
