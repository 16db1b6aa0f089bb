"""PackedConv1d, PackedConv2d: torch's convolutions with their weights in 1 to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_instance
from pyrobust.nn.packed_module import PackedModule
from pyrobust.ops.packed_conv import packed_conv1d, packed_conv2d

__all__ = ["PackedConv", "PackedConv1d", "PackedConv2d"]

_Sizes = int | tuple[int, ...]


class PackedConv(PackedModule):
    """What packed convolutions share; the arguments are those of :class:`PackedConv2d`."""

    layer_type: ClassVar[type[nn.Conv1d | nn.Conv2d]]
    convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Sizes,
        stride: _Sizes = 1,
        padding: _Sizes | str = 0,
        dilation: _Sizes = 1,
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
        make: Any = self.layer_type
        layer = make(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
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
        self._reversed_padding_repeated_twice = list(layer._reversed_padding_repeated_twice)
        self._start_from(layer)

    @classmethod
    def like(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of the torch convolution ``layer`` without data, on the meta device."""
        check_instance(cls.__name__, "layer", layer, cls.layer_type)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
            **weight_format,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, ...)`` -> ``(B, out_channels, ...)``, dtype of ``x``."""
        padding: str | tuple[int, ...] | int = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self.convolve(
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
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value not in (default, (default,) * len(self.kernel_size)):
                parts.append(f"{name}={value!r}")
        parts.append(f"bias={self.bias is not None}")
        return ", ".join([*parts, self._format_repr()])


class PackedConv1d(PackedConv):
    """One-dimensional convolution with a packed weight; a drop-in for ``torch.nn.Conv1d``.

    The weight is packed as the matrix ``(out_channels, in_channels / groups * k)``; groups of
    weights run along it. A freshly constructed layer packs torch's default initialisation, rounded
    to nearest. Gradients flow to the input (and to the bias where it asks for them).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one number, like the next three, alone or in a tuple.
        stride: steps of the window.
        padding: places on both sides, ``"same"`` or ``"valid"``.
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
        Input ``(B, in_channels, L)`` or unbatched; output ``(B, out_channels, L')``.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> layer = PackedConv1d(3, 8, 5, padding="same", bits=2, group_size=15)
        >>> layer(torch.ones(1, 3, 20)).shape
        torch.Size([1, 8, 20])
    """

    kind = 6
    layer_type = nn.Conv1d
    convolve = staticmethod(packed_conv1d)

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Conv1d,
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


class PackedConv2d(PackedConv):
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
    layer_type = nn.Conv2d
    convolve = staticmethod(packed_conv2d)

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
