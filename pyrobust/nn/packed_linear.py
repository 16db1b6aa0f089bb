"""PackedLinear: torch.nn.Linear with its weight in 1 to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_instance
from pyrobust.nn.packed_module import PackedModule
from pyrobust.ops import packed_linear
from pyrobust.quantize import QTensor

__all__ = ["PackedLinear", "QuantizedLinear"]


class PackedLinear(PackedModule):
    """``y = x W^T + b`` with ``W`` packed; a drop-in for ``torch.nn.Linear``.

    A freshly constructed layer packs torch's default initialisation, rounded to nearest. The weight
    does not train; gradients flow to the input (and to the bias where it asks for them).

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: whether to add a bias.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``.
        group_dim: 1 groups along input features, 0 along output features.
        symmetric: no zero-points.
        activations: None multiplies in float; ``"int8"`` rounds each input row to 8 bits first.
        device: where the buffers live; ``"meta"`` makes a layer without data.

    Shape:
        Input ``(*, in_features)``, float32, bfloat16 or float16 (float64 by torch, on the decoded
        weight); output ``(*, out_features)``.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> layer = PackedLinear(6, 2, bits=4, group_size=3)
        >>> layer(torch.ones(5, 6)).shape, layer.nbytes_packed
        (torch.Size([5, 2]), 18)
    """

    kind = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: float = 4,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = False,
        activations: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            symmetric=symmetric,
            activations=activations,
        )
        self.in_features = in_features
        self.out_features = out_features
        self._start_from(nn.Linear(in_features, out_features, bias, device=device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: float = 4,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = False,
        activations: str | None = None,
    ) -> Self:
        """Pack the weight of ``linear``, rounded to nearest; its bias is copied.

        Raises:
            ValueError: the weight holds NaN or infinite values, or an argument is out of range.
        """
        return cls._from_layer(
            linear,
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            symmetric=symmetric,
            activations=activations,
        )

    @classmethod
    def from_qtensor(
        cls, qtensor: QTensor, bias: Tensor | None = None, *, activations: str | None = None
    ) -> Self:
        """Wrap codes made elsewhere (shared, not copied); ``bias`` is copied.

        Args:
            qtensor: the weight, ``(out_features, in_features)``.
            bias: ``(out_features,)`` float, or None.
            activations: None or ``"int8"``.
        """
        rows, cols = qtensor.shape
        layer = cls(
            cols,
            rows,
            bias=False,
            bits=qtensor.bits,
            group_size=qtensor.group_size,
            group_dim=qtensor.group_dim,
            symmetric=qtensor.zero is None,
            activations=activations,
            device="meta",
        )
        return layer.extend(qtensor.layout).adopt(qtensor, bias)

    @classmethod
    def like(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of the ``torch.nn.Linear`` ``layer`` without data, on the meta device."""
        check_instance(cls.__name__, "layer", layer, nn.Linear)
        assert isinstance(layer, nn.Linear)
        sizes = (layer.in_features, layer.out_features)
        return cls(*sizes, bias=layer.bias is not None, device="meta", **weight_format)

    def forward(self, x: Tensor) -> Tensor:
        """``(*, in_features)`` -> ``(*, out_features)``, dtype of ``x``."""
        codes, scale, zero, bias = self._operands()
        return packed_linear(
            x,
            codes,
            scale,
            zero,
            bias,
            in_features=self.in_features,
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
            activations=self.activations,
            extras=self.extras,
        )

    def extra_repr(self) -> str:
        """Sizes and format."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._format_repr()}"


QuantizedLinear = PackedLinear
"""The name that papers on quantization use."""
