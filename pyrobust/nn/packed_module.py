"""What the packed layers share: the buffers of a packed weight, and how they survive every move.

A packed layer holds its weight as a :class:`~pyrobust.quantize.QTensor` in three buffers:
``codes``, ``scale`` and ``zero`` (absent when symmetric). A change of dtype never touches them: a
scale has at most 15 significant bits, which makes the decoded weight exact, and rounding it to
another dtype would change the network that was certified. The bias follows ``.to(dtype)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_integer,
    check_shape,
)
from pyrobust.ops.formats import check_bits, row_bytes
from pyrobust.quantize import QTensor, round_to_nearest
from pyrobust.quantize.qtensor import grouped_shape

__all__ = ["PackedModule"]

_STORED = ("codes", "scale", "zero")
_ACTIVATIONS = (None, "int8")
_DESCRIPTOR_VERSION = 1


class PackedModule(nn.Module):
    """Base of the packed layers: a weight of torch shape ``weight_shape``, held as low-bit codes.

    ``state_dict`` holds ``codes``, ``scale``, ``zero`` (unless symmetric), ``bias`` (if any) and
    ``_extra_state``, a small int64 tensor that describes the format, so that ``load_state_dict``
    refuses codes of another format instead of reading them wrongly. The bias is a Parameter with
    ``requires_grad=False``: optimizers pass over it unless it is asked to train, and
    ``next(model.parameters())`` still tells device and dtype.

    Args:
        weight_shape: shape of the float weight in torch's layout; rows are ``weight_shape[0]``.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``; the last group may be shorter.
        group_dim: 1 groups along a row (input features), 0 along a column (output features).
        symmetric: no zero-points; always so at 1 and 1.58 bits.
        activations: None (float) or ``"int8"`` (rounded per row while running).

    Raises:
        ValueError: an argument is outside what is listed above.
    """

    kind: ClassVar[int]  # number of the layer type in the format descriptor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        *,
        bits: float,
        group_size: int,
        group_dim: int,
        symmetric: bool,
        activations: str | None,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        check_bits(subject, bits)
        check_integer(subject, "group_size", group_size, 1)
        check_choice(subject, "group_dim", group_dim, (0, 1))
        check_choice(subject, "activations", activations, _ACTIVATIONS)
        self.weight_shape = tuple(weight_shape)
        self.bits = bits
        self.group_size = group_size
        self.group_dim = group_dim
        self.symmetric = bool(symmetric) or bits < 2
        self.activations = activations
        self._register_empty()

    def _register_empty(self) -> None:
        """Buffers of the right shapes without data, on the meta device."""
        rows, cols = self._matrix_shape
        scales = grouped_shape((rows, cols), self.group_size, self.group_dim)
        codes = torch.empty(rows, row_bytes(cols, self.bits), dtype=torch.uint8, device="meta")
        scale = torch.empty(scales, dtype=torch.float32, device="meta")
        zero = None if self.symmetric else torch.empty(scales, dtype=torch.uint8, device="meta")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_parameter("bias", None)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        """The weight as the kernels see it: rows are outputs (or entries of an embedding)."""
        rows = self.weight_shape[0]
        cols = 1
        for size in self.weight_shape[1:]:
            cols *= size
        return rows, cols

    @classmethod
    def like(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of the float ``layer`` without data, on the meta device.

        Args:
            layer: the float layer whose sizes and options are taken.
            weight_format: bits, group_size, group_dim, symmetric and activations.
        """
        raise NotImplementedError(f"{cls.__name__}.like")

    @classmethod
    def _from_layer(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of ``layer`` with its weight rounded to nearest."""
        twin = cls.like(layer, **weight_format)
        twin.train(layer.training)
        return twin.pack_weight(layer)

    def pack_weight(self, layer: nn.Module) -> Self:
        """Round the weight of ``layer`` to nearest into this layer's format; copy its bias."""
        weight = cast(Tensor, layer.weight)
        check_finite(type(self).__name__, "weight", weight)
        qtensor = round_to_nearest(
            weight.detach().reshape(self._matrix_shape).float(),
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
            symmetric=self.symmetric,
        )
        return self.adopt(qtensor, getattr(layer, "bias", None))

    def adopt(self, qtensor: QTensor, bias: Tensor | None = None) -> Self:
        """Take the codes of ``qtensor`` (shared, not copied) and a copy of ``bias``.

        Raises:
            ValueError: shape or format of ``qtensor`` is not this layer's.
        """
        subject = type(self).__name__
        seen = (tuple(qtensor.shape), qtensor.bits, qtensor.group_size, qtensor.group_dim)
        wanted = (self._matrix_shape, self.bits, self.group_size, self.group_dim)
        if seen != wanted or (qtensor.zero is None) != self.symmetric:
            raise ValueError(
                f"{subject}: qtensor must have (shape, bits, group_size, group_dim) {wanted} and "
                f"{'no' if self.symmetric else 'a'} zero-point; got {seen} and "
                f"{'none' if qtensor.zero is None else 'one'}."
            )
        self.codes, self.scale, self.zero = qtensor.codes, qtensor.scale, qtensor.zero
        if bias is not None:
            check_float_tensor(subject, "bias", bias)
            check_shape(subject, "bias", bias, (self.weight_shape[0],))
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return self

    def _start_from(self, layer: nn.Module) -> None:
        """Pack a freshly initialised float layer; one without data gives one without data."""
        bias = getattr(layer, "bias", None)
        if cast(Tensor, layer.weight).is_meta:
            self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        else:
            self.pack_weight(layer)

    @property
    def qtensor(self) -> QTensor:
        """The packed weight, sharing memory with the buffers; ``(rows, columns)`` as multiplied."""
        return QTensor(
            codes=self.codes,
            scale=self.scale,
            zero=self.zero,
            bits=self.bits,
            shape=self._matrix_shape,
            group_size=self.group_size,
            group_dim=self.group_dim,
        )

    def dequantize(self) -> Tensor:
        """The weight that this layer computes with, exactly: float32, in torch's layout."""
        return self.qtensor.dequantize().reshape(self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """:meth:`dequantize`, decoded anew on each access: for foreign code that reads weights."""
        return self.dequantize()

    @property
    def nbytes_packed(self) -> int:
        """Bytes of codes, scales and zero-points; the bias is not counted."""
        tensors = (self.codes, self.scale, self.zero)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the packed weight without converting it; convert and move everything else.

        Buffers are moved in place where torch moves parameters in place, so that two layers that
        share a packed weight still share it on the new device.
        """
        stored = {name: self._buffers.pop(name) for name in _STORED}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, buffer in stored.items():
                stored[name] = _moved(buffer, fn)
        finally:
            self._buffers.update(stored)
        return self

    # -- saving and loading --------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The format as int64: see :meth:`_descriptor`."""
        return torch.tensor(list(self._descriptor().values()), dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to restore: the format was compared before anything was copied."""

    def _descriptor(self) -> dict[str, int]:
        """What the state dict tells about the format; ``bits`` in hundredths.

        All of it must agree for codes to mean the same weight, but for ``activations``.
        """
        fields = {
            "version": _DESCRIPTOR_VERSION,
            "kind": self.kind,
            "bits": round(100 * self.bits),
            "group_size": self.group_size,
            "group_dim": self.group_dim,
            "symmetric": int(self.symmetric),
            "activations": _ACTIVATIONS.index(self.activations),
        }
        return fields | {f"weight.shape[{i}]": size for i, size in enumerate(self.weight_shape)}

    @staticmethod
    def read_descriptor(values: list[int]) -> dict[str, Any]:
        """The ``_extra_state`` of a packed layer as options: kind, weight_shape, bits and so on.

        Raises:
            ValueError: ``values`` is not a descriptor of this version.
        """
        if len(values) < 9 or values[0] != _DESCRIPTOR_VERSION or values[6] not in (0, 1):
            raise ValueError(f"PackedModule: unknown description of a packed weight, {values}.")
        kind, bits, group_size, group_dim, symmetric, activations = values[1:7]
        return {
            "kind": kind,
            "weight_shape": tuple(values[7:]),
            "bits": bits / 100 if bits % 100 else bits // 100,
            "group_size": group_size,
            "group_dim": group_dim,
            "symmetric": bool(symmetric),
            "activations": _ACTIVATIONS[activations],
        }

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._format_problem(state_dict, prefix)
        if problem is not None:
            error_msgs.append(f"{type(self).__name__} '{prefix.rstrip('.')}': {problem}")
            return
        scale = state_dict.get(f"{prefix}scale")
        if isinstance(scale, Tensor) and scale.dtype != self.scale.dtype:
            # copying into the old buffer would round the scales; in place, so that ties survive
            self.scale.data = torch.empty_like(self.scale, dtype=scale.dtype)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _format_problem(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why the state cannot be read by this layer, or None."""
        if f"{prefix}codes" not in state_dict and f"{prefix}weight" in state_dict:
            return "the state holds a float weight; load it into the float model, then pack that."
        found = state_dict.get(f"{prefix}_extra_state")
        if found is None:
            return None  # torch itself reports missing keys
        expected = self._descriptor()
        values = found.tolist() if isinstance(found, Tensor) else [found]
        if len(values) != len(expected):
            return f"the state is of another format, {values}; expected {list(expected.values())}."
        differing = [
            f"{name} {value / 100 if name == 'bits' else value:g} (this layer: "
            f"{expected[name] / 100 if name == 'bits' else expected[name]:g})"
            for name, value in zip(expected, values, strict=True)
            if value != expected[name] and name != "activations"
        ]
        return f"the state was packed with {', '.join(differing)}." if differing else None

    def _format_repr(self) -> str:
        """The part of ``extra_repr`` that all packed layers share."""
        parts = [f"bits={self.bits:g}", f"group_size={self.group_size}"]
        if self.group_dim != 1:
            parts.append(f"group_dim={self.group_dim}")
        if self.symmetric:
            parts.append("symmetric=True")
        if self.activations is not None:
            parts.append(f"activations={self.activations!r}")
        return ", ".join(parts)


def _moved(buffer: Tensor | None, fn: Callable[[Tensor], Tensor]) -> Tensor | None:
    """``fn`` applied to ``buffer`` with its dtype undone, in place where torch allows that."""
    if buffer is None:
        return None
    moved = fn(buffer)
    if moved.dtype != buffer.dtype:
        moved = buffer.to(moved.device)
    if moved is buffer or buffer.is_meta or moved.is_meta:
        return moved
    if type(moved) is not Tensor or type(buffer) is not Tensor:
        return moved
    buffer.data = moved
    return buffer
