"""PackedConv2d: torch.nn.Conv2d with its weight in 1 to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_instance
from pyrobust.nn.packed_module import PackedModule
from pyrobust.ops.packed_conv import packed_conv2d

__all__ = ["PackedConv2d"]

_Pair = int | tuple[int, int]


class PackedConv2d(PackedModule):
    """Two-dimensional convolution with a packed weight; a drop-in for ``torch.nn.Conv2d``.

    The weight is packed as the matrix ``(out_channels, in_channels / groups * kh * kw)``; groups of
    weights run along it. A freshly constructed layer packs torch's default initialisation, rounded
    to nearest. Gradients flow to the input (and to the bias where it asks for them).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: ``kh, kw`` or one number for both, like the next three.
        stride: steps of the window.
        padding: pixels on both sides, ``"same"`` or ``"valid"``.
        dilation: steps inside the window.
        groups: divides both numbers of channels.
        bias: whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``.
        group_dim: 1 groups along inputs, 0 along output channels.
        symmetric: no zero-points.
        activations: None multiplies in float; ``"int8"`` rounds each patch to 8 bits first.
        device: where the buffers live; ``"meta"`` makes a layer without data.

    Shape:
        Input ``(B, in_channels, H, W)`` or unbatched; output ``(B, out_channels, H', W')``.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> layer = PackedConv2d(3, 8, 3, padding="same", bits=2, group_size=9)
        >>> layer(torch.ones(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    kind = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bits: float = 4,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = False,
        activations: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layer = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
        )
        super().__init__(
            tuple(layer.weight.shape),
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            symmetric=symmetric,
            activations=activations,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self._padding_around = list(layer._reversed_padding_repeated_twice)
        self._start_from(layer)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        *,
        bits: float = 4,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = False,
        activations: str | None = None,
    ) -> Self:
        """Pack the weight of ``conv``, rounded to nearest; its bias is copied.

        Raises:
            ValueError: the weight holds NaN or infinite values, or an argument is out of range.
        """
        return cls._from_layer(
            conv,
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            symmetric=symmetric,
            activations=activations,
        )

    @classmethod
    def like(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of the ``torch.nn.Conv2d`` ``layer`` without data, on the meta device."""
        check_instance(cls.__name__, "layer", layer, nn.Conv2d)
        assert isinstance(layer, nn.Conv2d)
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
            **weight_format,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` -> ``(B, out_channels, H', W')``, dtype of ``x``."""
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._padding_around, mode=self.padding_mode), (0, 0)
        return packed_conv2d(
            x,
            self.codes,
            self.scale,
            self.zero,
            self.bias,
            in_channels=self.in_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
            activations=self.activations,
            extras=self.extras,
        )

    def extra_repr(self) -> str:
        """Sizes, options that differ from torch's defaults, and format."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        for name, default in (defaults | {"padding_mode": "zeros"}).items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}")
        parts.append(f"bias={self.bias is not None}")
        return ", ".join([*parts, self._format_repr()])
