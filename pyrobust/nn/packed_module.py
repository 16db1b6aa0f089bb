"""What the packed layers share: the buffers of a packed weight, and how they survive every move.

A packed layer holds its weight as a :class:`~pyrobust.quantize.QTensor` in buffers: ``codes``,
``scale``, ``zero`` (absent when symmetric) and those of the optional parts. A change of dtype never
touches them: a scale has at most 15 significant bits, which makes the decoded weight exact, and
rounding it to another dtype would change the network that was certified. The bias follows
``.to(dtype)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from pyrobust.nn._descriptor import ACTIVATIONS, describe, read_descriptor
from pyrobust.ops import dequantize_codes
from pyrobust.ops.formats import check_bits, levels_of, row_bytes
from pyrobust.ops.packed_weight import WeightExtras
from pyrobust.quantize import QTensor, SparseRemainder, round_to_nearest
from pyrobust.quantize.qtensor import WeightLayout, grouped_shape

__all__ = ["PackedModule"]

_REMAINDER = ("remainder_values", "remainder_columns", "remainder_offsets")
_EXTRAS = ("row_scale", "codebook", *_REMAINDER)  # in the order of WeightExtras
_STORED = ("codes", "scale", "zero", *_EXTRAS)


class PackedModule(nn.Module):
    """Base of the packed layers: a weight of torch shape ``weight_shape``, held as low-bit codes.

    ``state_dict`` holds ``codes``, ``scale``, ``zero`` (unless symmetric), ``row_scale``,
    ``codebook`` and ``remainder_*`` (where the weight has them), ``bias`` (if any) and
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
    packed_buffers: ClassVar[tuple[str, ...]] = _STORED  # no change of dtype touches them
    free_floats: ClassVar[tuple[str, ...]] = ("scale", "remainder_values")  # a state brings its own
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    row_scale: Tensor | None
    codebook: Tensor | None
    remainder_values: Tensor | None
    remainder_columns: Tensor | None
    remainder_offsets: Tensor | None
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
        check_choice(subject, "activations", activations, ACTIVATIONS)
        self.weight_shape = tuple(weight_shape)
        self.bits = bits
        self.group_size = group_size
        self.group_dim = group_dim
        self.symmetric = bool(symmetric) or bits < 2
        self.activations = activations
        self.layout = WeightLayout()
        self.weight_dtype = torch.float32
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
        for name in _EXTRAS:
            self.register_buffer(name, None)
        self.register_parameter("bias", None)

    def extend(self, layout: WeightLayout, storage: Sequence[int] = ()) -> Self:
        """Make room for the optional parts that ``layout`` names, without data; returns itself.

        ``storage`` is what :meth:`_storage` tells, for the layers that have a storage of their own.
        """
        rows = self._matrix_shape[0]
        self.layout = layout
        if layout.two_level:
            self.scale = self.scale.to(torch.uint8)
            self.row_scale = torch.empty(rows, device="meta")
        if layout.codebook:
            entries = levels_of(self.bits)
            self.codebook = torch.empty(entries, dtype=torch.uint8, device="meta")
        if layout.nonzeros >= 0:
            count = layout.nonzeros
            self.remainder_values = torch.empty(count, dtype=torch.float16, device="meta")
            self.remainder_columns = torch.empty(count, dtype=torch.int32, device="meta")
            self.remainder_offsets = torch.empty(rows + 1, dtype=torch.int64, device="meta")
        return self

    def finish_loading(self) -> None:
        """Called when all saved buffers have been filled: for layers that derive others."""

    def _storage(self) -> tuple[int, ...]:
        """What else a state dict depends on, in layers with a storage of their own."""
        return ()

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
        twin.weight_dtype = cast(Tensor, layer.weight).dtype
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
        seen: tuple[Any, ...] = (tuple(qtensor.shape), qtensor.bits)
        seen += (qtensor.group_size, qtensor.group_dim, tuple(qtensor.layout))
        wanted: tuple[Any, ...] = (self._matrix_shape, self.bits)
        wanted += (self.group_size, self.group_dim, tuple(self.layout))
        if seen != wanted or (qtensor.zero is None) != self.symmetric:
            raise ValueError(
                f"{subject}: qtensor must have (shape, bits, group_size, group_dim, layout) "
                f"{wanted} and "
                f"{'no' if self.symmetric else 'a'} zero-point; got {seen} and "
                f"{'none' if qtensor.zero is None else 'one'}."
            )
        self.codes, self.scale, self.zero = qtensor.codes, qtensor.scale, qtensor.zero
        for name, part in zip(_EXTRAS, qtensor.extras, strict=True):
            setattr(self, name, part)
        self._absent_last()
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
    def extras(self) -> WeightExtras | None:
        """The optional parts as the operators take them; None where there are none."""
        if self.layout == (False, False, -1):
            return None
        return WeightExtras(*(self._buffers[name] for name in _EXTRAS))

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scale, zero and bias, as attributes of these names would give them.

        From the dictionaries of ``nn.Module``: attribute access takes 0.5 us a tensor, half of what
        a small product takes.
        """
        if "parametrizations" in self._modules:  # moves tensors out of the dictionaries
            return self.codes, self.scale, self.zero, self.bias
        buffers: Any = self._buffers
        return buffers["codes"], buffers["scale"], buffers["zero"], self._parameters["bias"]

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
            row_scale=self.row_scale,
            codebook=self.codebook,
            remainder=self._remainder(),
        )

    def _remainder(self) -> SparseRemainder | None:
        values, columns, offsets = (self._buffers[name] for name in _REMAINDER)
        if values is None or columns is None or offsets is None:
            return None
        return SparseRemainder(values, columns, offsets)

    def dequantize(self) -> Tensor:
        """The weight that this layer computes with, exactly: float32, in torch's layout, a copy."""
        weight = dequantize_codes(
            self.codes,
            self.scale,
            self.zero,
            in_features=self._matrix_shape[1],
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
            extras=self.extras,
        )
        return weight.reshape(self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """:meth:`dequantize` in the dtype that a float layer here would have.

        A fresh copy on each access, for foreign code that reads weights, or their dtype. The layer
        holds codes only: what is written into the copy never reaches it, and no tensor could tell.

        Raises:
            AttributeError: on assignment. To change the weight, pack the float layer anew, or hand
                codes over with :meth:`adopt`.
        """
        return self.dequantize().to(self.weight_dtype)

    @weight.setter
    def weight(self, value: object) -> None:
        raise self._weight_is_read_only()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, which calls it for ``layer.weight = parameter`` too; that is refused."""
        if name == "weight":
            raise self._weight_is_read_only()
        super().register_parameter(name, param)

    def _weight_is_read_only(self) -> AttributeError:
        return AttributeError(
            f"{type(self).__name__}: weight cannot be set, it is decoded from the packed codes on "
            "each access; change the float layer and pack it anew (pyrobust.pack), or hand codes "
            "over with adopt(qtensor)."
        )

    def __prepare_scriptable__(self) -> Self:
        """Called by ``torch.jit.script``, which cannot compile what a packed layer runs."""
        raise NotImplementedError(
            f"{type(self).__name__}: packed layers cannot be compiled by torch.jit.script; use "
            "torch.compile or torch.export (or torch.jit.trace)."
        )

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the weight as it is saved, all its parts; the bias is not counted."""
        names = [n for n in self.packed_buffers if n not in self._non_persistent_buffers_set]
        tensors = [self._buffers[name] for name in names]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the packed weight without converting it; convert and move everything else.

        Buffers are moved in place where torch moves parameters in place, so that two layers that
        share a packed weight still share it on the new device.
        """
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.codes.device)
        self.weight_dtype = fn(probe).dtype
        stored = {name: self._buffers.pop(name) for name in self.packed_buffers}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, buffer in stored.items():
                stored[name] = _moved(buffer, fn)
        finally:
            self._buffers.update(stored)
            self._absent_last()
        return self

    def _absent_last(self) -> None:
        """Order the buffers: torch.export counts on none being absent before others."""
        for name in [name for name, buffer in self._buffers.items() if buffer is None]:
            self._buffers[name] = self._buffers.pop(name)

    # -- saving and loading --------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The format as int64 (:mod:`pyrobust.nn._descriptor`)."""
        return torch.tensor(self._descriptor(), dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to restore: the format was compared before anything was copied."""

    def _descriptor(self) -> list[int]:
        """What the state dict tells about the format."""
        return describe(
            kind=self.kind,
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
            symmetric=self.symmetric,
            activations=self.activations,
            layout=self.layout,
            storage=self._storage(),
            weight_shape=self.weight_shape,
        )

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
        for name in self.free_floats:
            stored, own = state_dict.get(f"{prefix}{name}"), self._buffers[name]
            if isinstance(stored, Tensor) and own is not None and stored.dtype != own.dtype:
                # copying into the old buffer would round; in place, so that ties survive
                own.data = torch.empty_like(own, dtype=stored.dtype)
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
        values = found.flatten().tolist() if isinstance(found, Tensor) else [found]
        own = read_descriptor(self._descriptor())
        try:
            other = read_descriptor(values)
        except ValueError:
            return f"the state is of another format, {values}."
        differing = [
            f"{name} {other.get(name)} (this layer: {own.get(name)})"
            for name in dict.fromkeys((*own, *other))
            if other.get(name) != own.get(name) and name != "activations"
        ]
        return f"the state was packed with {', '.join(differing)}." if differing else None

    def _format_repr(self) -> str:
        """The part of ``extra_repr`` that all packed layers share."""
        parts = [f"bits={self.bits:g}", f"group_size={self.group_size}"]
        if self.group_dim != 1:
            parts.append(f"group_dim={self.group_dim}")
        if self.symmetric:
            parts.append("symmetric=True")
        if self.layout.two_level:
            parts.append("two_level=True")
        if self.layout.codebook:
            parts.append("codebook=True")
        if self.layout.nonzeros >= 0:
            parts.append(f"remainder={self.layout.nonzeros}")
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
