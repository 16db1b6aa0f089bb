"""PackedQKAttention: self-attention on one packed matrix per head, packed values and output."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from pyrobust.nn.half_sums import packed_linear_of
from pyrobust.quantize.qk_attention import QKAttention

__all__ = ["PackedQKAttention"]


class PackedQKAttention(QKAttention):
    """What a :class:`~pyrobust.quantize.QKReparamAttention` becomes when it is packed.

    Args:
        attention: the trained attention, with weight bits; its rounding of activations is copied.

    Shape:
        As :class:`~pyrobust.quantize.QKReparamAttention`.
    """

    vectors: Tensor | None

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.dim, self.num_heads = attention.dim, attention.num_heads
        self.head_dim, self.output = attention.head_dim, attention.output
        self.dropout = attention.dropout
        self.qk = packed_linear_of(attention.simulated_weights()["qk"].qtensor, None)
        self.value = attention.value.to_packed()
        self.proj = attention.proj.to_packed()
        vectors = attention.bias_vectors()
        self.register_buffer("vectors", None if vectors is None else vectors.detach().float())
        for name in ("input", "qk", "value", "probability"):
            part = f"{name}_activation"
            setattr(self, part, _frozen(getattr(attention, part)))
        self.relative = _frozen(attention.relative)
        self.train(attention.training)

    def transformed(self, x: Tensor) -> Tensor:
        """``T = x M^T``, ``(B, N, heads * dim)``, before its rounding."""
        result: Tensor = self.qk(x)
        return result

    def bias_vectors(self) -> Tensor | None:
        """``(heads, dim)``: the part of the query bias that softmax feels."""
        return self.vectors

    def extra_repr(self) -> str:
        """Sizes."""
        return f"dim={self.dim}, num_heads={self.num_heads}"


def _frozen(module: Any) -> Any:
    return None if module is None else copy.deepcopy(module).requires_grad_(False)
