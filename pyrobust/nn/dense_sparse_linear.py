"""DenseSparseLinear: low-bit codes and a few weights in 16 bits, saved in the fewest bits.

It computes as :class:`~pyrobust.nn.PackedLinear` does on a weight with a remainder, dense and
sparse part in one pass. What differs is the state dict: zero-points in as many bits as the codes,
16-bit column numbers, columns that are kept whole apart, and, where the weight has them, scales and
zero-points as second-level codes. The buffers that the product reads are derived from these when a
state is loaded and are not saved; in memory they cost 6 to 8 bytes more for a kept weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import Self

from pyrobust._checks import check_instance
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.packed_module import PackedModule
from pyrobust.ops.formats import levels_of, row_bytes
from pyrobust.ops.matmul import pack_codes, unpack_codes
from pyrobust.quantize.qtensor import QTensor, WeightLayout
from pyrobust.quantize.second_level import SUPER_GROUP, SecondLevel
from pyrobust.quantize.stored_outliers import StoredOutliers, index_type

__all__ = ["DenseSparseLinear"]

_LEVEL = ("scale_codes", "scale_base", "scale_step", "zero_codes", "zero_base", "zero_step")
_OUTLIERS = ("values", "columns", "counts", "whole_columns", "whole_values")
_SAVED = (*_LEVEL, *(f"outlier_{name}" for name in _OUTLIERS))
_DERIVED = ("zero", "remainder_values", "remainder_columns", "remainder_offsets")


class DenseSparseLinear(PackedLinear):
    """``y = x W^T + b`` with most of ``W`` in low-bit codes and its outliers in 16 bits.

    Usually made by :func:`~pyrobust.quantize.gwq_quantize` or :meth:`from_qtensor`. A freshly
    constructed layer packs torch's default initialisation without outliers. The arguments, shapes
    and errors are those of :class:`~pyrobust.nn.PackedLinear`.

    Example:
        >>> from pyrobust.quantize import quantize_with_outliers
        >>> weight = torch.tensor([[9.0, 0.1, -0.2, 0.3], [0.2, 0.1, 0.0, -0.1]])
        >>> layer = DenseSparseLinear.from_qtensor(quantize_with_outliers(weight, weight > 1))
        >>> float(layer(torch.tensor([1.0, 0.0, 0.0, 0.0]))[0])
        9.0
    """

    kind = 5
    scale_codes: Tensor | None
    scale_base: Tensor | None
    scale_step: Tensor | None
    zero_codes: Tensor | None
    zero_base: Tensor | None
    zero_step: Tensor | None
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_counts: Tensor | None
    outlier_whole_columns: Tensor | None
    outlier_whole_values: Tensor | None
    packed_buffers: ClassVar[tuple[str, ...]] = (*PackedModule.packed_buffers, *_SAVED)
    free_floats: ClassVar[tuple[str, ...]] = (
        "scale",
        "scale_base",
        "scale_step",
        "outlier_values",
        "outlier_whole_values",
    )

    def _register_empty(self) -> None:
        super()._register_empty()
        for name in _SAVED:
            self.register_buffer(name, None)
        for name in _DERIVED:
            self.register_buffer(name, self._buffers[name], persistent=False)
        self.second_level = False
        self.whole_columns = 0
        self._make_room()

    def extend(self, layout: WeightLayout, storage: Sequence[int] = ()) -> Self:
        """Make room for outliers and second-level codes, without data; returns itself."""
        self.layout = layout
        self.second_level, self.whole_columns = bool(storage[0]), storage[1]
        self.register_buffer("scale", self.scale, persistent=not self.second_level)
        self._make_room()
        return self

    def _storage(self) -> tuple[int, ...]:
        return int(self.second_level), self.whole_columns

    def _make_room(self) -> None:
        """Saved buffers of the right shapes, on the meta device."""

        def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        rows, cols = self._matrix_shape
        lines, groups = self.scale.shape
        supers = -(-groups // SUPER_GROUP)
        if self.second_level:
            self.scale_codes = empty(lines, row_bytes(groups, 3))
            self.scale_base = empty(lines, supers, dtype=torch.float16)
            self.scale_step = empty(lines, supers, dtype=torch.float16)
        if not self.symmetric:
            bits = 3 if self.second_level else self.bits
            self.zero_codes = empty(lines, row_bytes(groups, bits))
            if self.second_level:
                self.zero_base, self.zero_step = empty(lines, supers), empty(lines, supers)
        if self.layout.nonzeros >= 0:
            kind, whole = index_type(cols), self.whole_columns
            count = self.layout.nonzeros - rows * whole
            self.outlier_values = empty(count, dtype=torch.float16)
            self.outlier_columns = empty(count, dtype=kind)
            self.outlier_counts = empty(rows, dtype=kind)
            self.outlier_whole_columns = empty(whole, dtype=torch.int32)
            self.outlier_whole_values = empty(rows, whole, dtype=torch.float16)

    @classmethod
    def from_qtensor(
        cls, qtensor: QTensor, bias: Tensor | None = None, *, activations: str | None = None
    ) -> Self:
        """Wrap a weight with or without remainder; its codes are shared, ``bias`` is copied.

        Args:
            qtensor: the weight, ``(out_features, in_features)``; second-level statistics are saved
                as such where it carries them
                (:class:`~pyrobust.quantize.QTensorWithStatistics`).
            bias: ``(out_features,)`` float, or None.
            activations: None or ``"int8"``.

        Raises:
            ValueError: the weight has a codebook or two-level scales.
        """
        check_instance(cls.__name__, "qtensor", qtensor, QTensor)
        if qtensor.row_scale is not None or qtensor.codebook is not None:
            raise ValueError(
                "DenseSparseLinear: qtensor must have scales of its groups only; got a codebook or "
                "two-level scales."
            )
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
        return layer.adopt(qtensor, bias)

    def adopt(self, qtensor: QTensor, bias: Tensor | None = None) -> Self:
        """Take the codes of ``qtensor`` (shared, not copied) and a copy of ``bias``.

        Raises:
            ValueError: shape or format of ``qtensor`` is not this layer's.
        """
        statistics = cast("SecondLevel | None", getattr(qtensor, "statistics", None))
        outliers = None
        if qtensor.remainder is not None:
            outliers = StoredOutliers.of(qtensor.remainder, qtensor.shape[1])
        whole = 0 if outliers is None else len(outliers.whole_columns)
        self.extend(qtensor.layout, (int(statistics is not None), whole))
        super().adopt(qtensor, bias)
        if statistics is not None:
            for name in _LEVEL:
                setattr(self, name, getattr(statistics, name))
        elif qtensor.zero is not None:
            self.zero_codes = pack_codes(qtensor.zero, bits=self.bits)
        if outliers is not None:
            for name in _OUTLIERS:
                setattr(self, f"outlier_{name}", getattr(outliers, name))
        self._absent_last()
        return self

    def finish_loading(self) -> None:
        """Derive what the product reads from what was saved."""
        if self.codes.is_meta:
            return
        groups = self.scale.shape[1]
        if self.second_level:
            level = SecondLevel(groups, *(self._buffers[name] for name in _LEVEL))  # type: ignore[arg-type]
            self.scale, self.zero = level.scale, level.zero(levels_of(self.bits))
        elif self.zero_codes is not None:
            codes = self.zero_codes.cpu()
            zero = unpack_codes(codes, in_features=groups, bits=self.bits)
            self.zero = zero.to(self.zero_codes.device)
        if self.layout.nonzeros >= 0:
            parts = [cast(Tensor, self._buffers[f"outlier_{name}"]) for name in _OUTLIERS]
            sparse = StoredOutliers(*parts).remainder()
            self.remainder_values = sparse.values
            self.remainder_columns = sparse.columns
            self.remainder_offsets = sparse.offsets
        self._absent_last()

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
        before = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) == before and f"{prefix}codes" in state_dict:
            self.finish_loading()

    @property
    def bits_per_weight(self) -> float:
        """Saved bits per weight: codes, statistics, outliers and their places."""
        count = self.in_features * self.out_features
        return 8 * self.nbytes_packed / count if count else float("nan")

    def _format_repr(self) -> str:
        text = super()._format_repr()
        text += ", second_level=True" if self.second_level else ""
        return text + (f", whole_columns={self.whole_columns}" if self.whole_columns else "")
