"""HessianAccumulator: second moments of a layer's inputs, the curvature of its output error.

For a row ``w`` of the weight and its change ``d``, the squared error of the outputs, averaged over
the inputs, is ``d H d^T / 2`` with ``H = (2 / n) sum x^T x``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_finite, check_float_tensor, check_integer, check_shape

__all__ = ["CONVOLUTIONS", "HessianAccumulator", "layer_columns", "relative_output_error"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
"""The convolutions whose inputs can be accumulated, and that have packed twins."""

_UNFOLDED_ELEMENTS = 1 << 24  # of a convolution's patches at a time: 64 MiB of float32


class HessianAccumulator:
    """Sums ``x^T x`` over batches of inputs; needs ``in_features ** 2`` numbers and no more.

    Args:
        in_features: columns of the weight (of one group of a grouped convolution).
        groups: independent parts of the outputs with inputs of their own, as in convolutions.
        dtype: of the sums; float32 or float64.
        device: where the sums live.

    Attributes:
        count: rows of input seen so far.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> accumulator = HessianAccumulator(2)
        >>> accumulator.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> accumulator.hessian()
        tensor([[2., 2.],
                [2., 4.]])
    """

    def __init__(
        self,
        in_features: int,
        *,
        groups: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_integer("HessianAccumulator", "in_features", in_features, 1)
        check_integer("HessianAccumulator", "groups", groups, 1)
        self.in_features = in_features
        self.groups = groups
        self.count = 0
        self._sum = torch.zeros(groups, in_features, in_features, dtype=dtype, device=device)

    @classmethod
    def of(cls, layer: nn.Module) -> HessianAccumulator:
        """An empty accumulator for the inputs of a ``Linear``, ``Conv1d`` or ``Conv2d``."""
        weight = _weight_of(layer)
        groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(weight[0].numel(), groups=groups, dtype=dtype, device=weight.device)

    def add(self, x: Tensor) -> None:
        """Add inputs ``(..., in_features)``, or ``(groups, n, in_features)`` with groups.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: the shape disagrees, or ``x`` holds NaN or infinite values.
        """
        check_float_tensor("HessianAccumulator", "x", x)
        if self.groups == 1:
            x = x.reshape(1, -1, x.shape[-1]) if x.ndim else x
        check_shape("HessianAccumulator", "x", x, (self.groups, None, self.in_features))
        check_finite("HessianAccumulator", "x", x)
        x = x.detach().to(self._sum)
        for group in range(self.groups):  # in place: no second matrix of the size of the sum
            self._sum[group].addmm_(x[group].t(), x[group])
        self.count += x.shape[1]

    def add_inputs(self, layer: nn.Module, x: Tensor) -> None:
        """Add the inputs of a layer as :func:`layer_columns` takes them."""
        for part in layer_columns(layer, x):
            self.add(part)

    def hessian(self) -> Tensor:
        """``(2 / count) sum x^T x``: ``(in_features, in_features)``, ``(groups, ...)`` with groups.

        Raises:
            ValueError: nothing was added.
        """
        if self.count == 0:
            raise ValueError("HessianAccumulator: add must be called with inputs first; got none.")
        scaled = self._sum * (2.0 / self.count)
        return scaled[0] if self.groups == 1 else scaled


def layer_columns(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The rows that multiply the columns of a layer's weight, in parts.

    Args:
        layer: a ``Linear``, ``Conv1d`` or ``Conv2d``.
        x: its input.

    Yields:
        ``(n, in_features)`` for a linear layer (all at once), ``(groups, n, columns)`` for a
        convolution (some images at a time), in the order of ``weight.flatten(1)``.
    """
    if isinstance(layer, nn.Linear):
        yield x.reshape(-1, x.shape[-1])
        return
    if not isinstance(layer, CONVOLUTIONS):
        raise TypeError(f"layer must be a Linear, Conv1d or Conv2d; got {type(layer).__name__}.")
    x = x if x.ndim == _weight_of(layer).ndim else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):  # a line is an image of height 1
        x = x.unsqueeze(-2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    columns = _weight_of(layer)[0].numel() * layer.groups
    images = max(1, _UNFOLDED_ELEMENTS // max(1, columns * x.shape[-1] * x.shape[-2]))
    for part in x.split(images):
        patches = F.unfold(part, kernel, dilation=dilation, stride=stride)
        patches = patches.transpose(1, 2).reshape(-1, layer.groups, columns // layer.groups)
        yield patches.transpose(0, 1)


def relative_output_error(hessian: Tensor, weight: Tensor, quantized: Tensor) -> float:
    """Root mean square change of a layer's output over that of the output, bias aside.

    Args:
        hessian: as :meth:`HessianAccumulator.hessian` gives it.
        weight: ``(rows, columns)``.
        quantized: the same shape.
    """
    parts = hessian if hessian.ndim == 3 else hessian[None]
    change, total = 0.0, 0.0
    for part, old, new in zip(
        parts, weight.chunk(len(parts)), quantized.chunk(len(parts)), strict=True
    ):
        old, new = old.to(part), new.to(part)
        change += float((((old - new) @ part) * (old - new)).sum(dtype=torch.float64))
        total += float(((old @ part) * old).sum(dtype=torch.float64))
    return (max(change, 0.0) / total) ** 0.5 if total > 0 else 0.0


def _weight_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight
