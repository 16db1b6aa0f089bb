"""PackedEmbedding: torch.nn.Embedding with its table in 1 to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_instance
from pyrobust.nn.packed_module import PackedModule
from pyrobust.ops.packed_embedding import packed_embedding
from pyrobust.quantize import QTensor

__all__ = ["PackedEmbedding"]


class PackedEmbedding(PackedModule):
    """A packed table of ``num_embeddings`` vectors; only the vectors asked for are decoded.

    A freshly constructed layer packs torch's default initialisation, rounded to nearest. The table
    does not train.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        padding_idx: kept for parity with ``torch.nn.Embedding``, where it stops a gradient and
            starts the row at zero; here the row is whatever was packed.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``.
        group_dim: 1 groups along a vector, 0 across vectors.
        symmetric: no zero-points.
        dtype: of the output: float32 (exact), bfloat16, float16 or float64. ``.to(dtype)``
            changes it, and never the table.
        device: where the buffers live; ``"meta"`` makes a layer without data.

    Shape:
        Input: integers of any shape ``(*)``; output ``(*, embedding_dim)``.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> table = PackedEmbedding(100, 16, bits=8, group_size=16)
        >>> table(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 16])
    """

    kind = 3

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: float = 4,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            (num_embeddings, embedding_dim),
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            symmetric=symmetric,
            activations=None,
        )
        layer = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = layer.padding_idx
        self.dtype = layer.weight.dtype
        self._start_from(layer)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        bits: float = 4,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = False,
    ) -> Self:
        """Pack the table of ``embedding``, rounded to nearest.

        Raises:
            ValueError: the table holds NaN or infinite values, ``embedding`` has a ``max_norm``
                (which changes the table while running), or an argument is out of range.
        """
        return cls._from_layer(
            embedding, bits=bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
        )

    @classmethod
    def from_qtensor(
        cls, qtensor: QTensor, padding_idx: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Wrap codes made elsewhere (shared, not copied), ``(num_embeddings, embedding_dim)``."""
        layer = cls(
            *qtensor.shape,
            padding_idx,
            bits=qtensor.bits,
            group_size=qtensor.group_size,
            group_dim=qtensor.group_dim,
            symmetric=qtensor.zero is None,
            dtype=dtype,
            device="meta",
        )
        return layer.extend(qtensor.layout).adopt(qtensor)

    @classmethod
    def like(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of the ``torch.nn.Embedding`` ``layer`` without data, on the meta device."""
        check_instance(cls.__name__, "layer", layer, nn.Embedding)
        assert isinstance(layer, nn.Embedding)
        if layer.max_norm is not None:
            raise ValueError(f"{cls.__name__}: max_norm must be None; got {layer.max_norm}.")
        weight_format.pop("activations", None)  # a gather multiplies nothing
        return cls(
            layer.num_embeddings,
            layer.embedding_dim,
            layer.padding_idx,
            dtype=layer.weight.dtype,
            device="meta",
            **weight_format,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let the dtype of the output follow ``.to(dtype)``."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, indices: Tensor) -> Tensor:
        """``(*)`` integers -> ``(*, embedding_dim)``."""
        return packed_embedding(
            indices,
            self.codes,
            self.scale,
            self.zero,
            embedding_dim=self.embedding_dim,
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
            dtype=self.dtype,
            extras=self.extras,
        )

    def extra_repr(self) -> str:
        """Sizes and format."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"
