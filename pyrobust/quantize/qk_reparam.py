"""Query-key reparametrization: attention scores from one low-bit matrix per head instead of two.

``(x Wq^T)(x Wk^T)^T = x M x^T`` with ``M = Wq^T Wk``: with the product rounded instead of both
factors, two quantizers no longer chase each other. The factors stay the trained weights. The
matrices take ``heads * width^2`` codes.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv 2302.02210; section 4.3 and the authors' code (MIT).
Departures: the biases of queries and keys, which the code drops, are kept exactly: softmax is not
changed by a constant per row, so only ``bq`` matters, as a term ``(Wk^T bq) . x_m`` of the score
(n, m); it stays in float. ``exact_bias=False`` is the published form.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_integer
from pyrobust.quantize.attention_parts import AttentionParts, attention_parts
from pyrobust.quantize.lsq import ActivationQuantizer, LSQQuantizer
from pyrobust.quantize.qk_attention import QKAttention, wide
from pyrobust.quantize.quant_layers import QuantLinear
from pyrobust.quantize.simulated_weight import SimulatedWeight
from pyrobust.quantize.stats_quantizer import StatsQuantizer

__all__ = ["QKReparamAttention"]


class QKReparamAttention(QKAttention):
    """Self-attention with one rounded matrix ``M_h = Wq_h^T Wk_h`` per head.

    The input is rounded once (signed), ``T_h = x M_h^T`` is rounded (signed, with shifts), the
    scores are ``x . T_h / sqrt(head width)`` plus the term of the query bias and the given bias;
    probabilities (unsigned) and values (signed, with shifts) are rounded before their product.

    Made by :meth:`from_float`. ``M`` is rounded by StatsQ, row by row; with ``a_bits=None`` nothing
    but weights is rounded, and with ``w_bits=None`` too it is the float attention it came from.

    Args:
        dim: width of the input.
        num_heads: heads; it must divide the rows of the projections.
        head_dim: rows of the projections per head.
        w_bits: 1 to 8, of ``M``, values and output projection; None leaves them in float.
        a_bits: 1 to 8, of all rounded activations; None leaves them in float.
        exact_bias: keep the query bias.
        per_token: one activation scale per token, as published, which fixes the number of tokens;
            otherwise one per tensor.
        dropout: of the probabilities while training.
        output: ``"tensor"``, or ``"pair"`` to return ``(result, None)`` as some models expect.

    Raises:
        ValueError: a size or number of bits is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        w_bits: int | None = 4,
        a_bits: int | None = None,
        exact_bias: bool = True,
        per_token: bool = False,
        dropout: float = 0.0,
        output: str = "tensor",
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        check_integer(subject, "num_heads", num_heads, 1)
        check_integer(subject, "dim", dim, 1)
        check_choice(subject, "output", output, ("tensor", "pair"))
        if head_dim is None and dim % num_heads:
            raise ValueError(f"{subject}: num_heads must divide dim = {dim}; got {num_heads}.")
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.w_bits, self.a_bits, self.output = w_bits, a_bits, output
        self.exact_bias, self.dropout = exact_bias, dropout
        inner = num_heads * self.head_dim
        self.query = nn.Parameter(torch.empty(inner, dim))
        self.key = nn.Parameter(torch.empty(inner, dim))
        self.query_bias = nn.Parameter(torch.zeros(inner)) if exact_bias else None
        for weight in (self.query, self.key):
            nn.init.xavier_uniform_(weight)
        self.value = _linear(nn.Linear(dim, inner), w_bits)
        axis = -2 if per_token else None
        self.proj = _linear(nn.Linear(inner, dim), w_bits, a_bits, axis)
        self.relative: nn.Module | None = None
        self.qk_quantizer = None if w_bits is None else StatsQuantizer(w_bits)
        self.boundary: float | None = None
        self.input_activation = _activation(a_bits, dim, axis)
        self.qk_activation = _activation(a_bits, num_heads * dim, axis, heads=num_heads)
        self.value_activation = _activation(a_bits, inner, -1 if per_token else None)
        self.probability_activation = (
            None if a_bits is None else LSQQuantizer(a_bits, False, -2 if per_token else None)
        )

    @classmethod
    def from_float(
        cls,
        mha: nn.Module,
        w_bits: int | None = 4,
        a_bits: int | None = None,
        exact_bias: bool = True,
        *,
        per_token: bool = False,
    ) -> QKReparamAttention:
        """Start from a copy of the weights of a self-attention.

        Args:
            mha: a ``torch.nn.MultiheadAttention`` whose queries, keys and values have one width; a
                module with ``qkv``, ``proj`` and ``num_heads`` (timm); or one with ``q_proj``,
                ``k_proj``, ``v_proj``, ``o_proj`` and ``num_attention_heads`` (transformers). A
                relative position bias is taken along.
            w_bits: as for the class.
            a_bits: as for the class.
            exact_bias: keep the query bias; False drops it, with a warning where it is not zero.
            per_token: as for the class.

        Raises:
            TypeError: ``mha`` is no such module.
            ValueError: its form cannot be reparametrized (normalised queries, unequal heads, ...).
        """
        parts = attention_parts("QKReparamAttention", mha)
        if not exact_bias and parts.query_bias is not None and bool((parts.query_bias != 0).any()):
            warnings.warn(
                "QKReparamAttention: the query bias is not zero and is dropped, which changes the "
                "attention; exact_bias=True keeps it.",
                stacklevel=2,
            )
        layer = cls(
            parts.query.shape[1],
            parts.num_heads,
            head_dim=parts.query.shape[0] // parts.num_heads,
            w_bits=w_bits,
            a_bits=a_bits,
            exact_bias=exact_bias and parts.query_bias is not None,
            per_token=per_token,
            dropout=parts.dropout,
            output=parts.output,
        )
        return layer._take(parts).to(parts.query.device).train(mha.training)

    def _take(self, parts: AttentionParts) -> QKReparamAttention:
        """Copy the float weights."""
        with torch.no_grad():
            self.query.copy_(parts.query)
            self.key.copy_(parts.key)
            if self.query_bias is not None and parts.query_bias is not None:
                self.query_bias.copy_(parts.query_bias)
            _fill(self.value, parts.value, parts.value_bias)
            _fill(self.proj, parts.output_weight, parts.output_bias)
        self.relative = copy.deepcopy(parts.relative)
        return self

    # -- the scores ----------------------------------------------------------------------------

    def qk_matrix(self) -> Tensor:
        """``M`` in float: ``(heads * dim, dim)``, rows of one head together."""
        query, key = (wide(w).unflatten(0, (self.num_heads, -1)) for w in (self.query, self.key))
        product: Tensor = query.transpose(1, 2) @ key
        return product.flatten(0, 1)

    def simulated_qk(self) -> Tensor:
        """``M`` as the scores use it: rounded, unless ``w_bits`` is None."""
        matrix = self.qk_matrix()
        if self.qk_quantizer is None:
            return matrix
        boundary = self.boundary if self.training else None
        rounded: Tensor = self.qk_quantizer(matrix, storable=True, boundary=boundary)
        return rounded

    def bias_vectors(self) -> Tensor | None:
        """``(heads, dim)``: ``Wk_h^T bq_h``, the part of the query bias that softmax feels."""
        if self.query_bias is None:
            return None
        key = wide(self.key).unflatten(0, (self.num_heads, -1))
        bias = wide(self.query_bias).unflatten(0, (self.num_heads, -1))
        return torch.einsum("hed,he->hd", key, bias)

    def transformed(self, x: Tensor) -> Tensor:
        """``T = x M^T``, ``(B, N, heads * dim)``, before its rounding."""
        return F.linear(x, self.simulated_qk().to(x.dtype))

    # -- packing -------------------------------------------------------------------------------

    def simulated_weights(self) -> dict[str, SimulatedWeight]:
        """``M`` (made of queries and keys), values and output projection, for packing.

        Raises:
            ValueError: ``w_bits`` is None.
        """
        if self.qk_quantizer is None:
            raise ValueError("QKReparamAttention: w_bits must be set to pack; got None.")
        matrix = self.qk_matrix()
        size = 2 * self.query.numel() * self.query.element_size()
        parts = {"qk": SimulatedWeight(matrix, self.qk_quantizer.stored(matrix), size)}
        for name in ("value", "proj"):
            parts[name] = getattr(self, name).simulated_weights()[""]
        return parts

    def to_packed(self) -> nn.Module:
        """The same attention on packed weights, without the float factors.

        Raises:
            ValueError: ``w_bits`` is None.
        """
        from pyrobust.nn.packed_qk_attention import PackedQKAttention

        return PackedQKAttention(self)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        sizes = f"dim={self.dim}, num_heads={self.num_heads}"
        return f"{sizes}, w_bits={self.w_bits}, a_bits={self.a_bits}"


def _fill(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def _linear(
    layer: nn.Linear, w_bits: int | None, a_bits: int | None = None, axis: int | None = None
) -> Any:
    if w_bits is None:
        return layer
    return QuantLinear.from_float(layer, w_bits, a_bits, per_channel=axis)


def _activation(
    bits: int | None, channels: int, axis: int | None, *, heads: int = 1
) -> ActivationQuantizer | None:
    if bits is None:
        return None
    return ActivationQuantizer(bits, channels, per_channel=axis, heads=heads)
