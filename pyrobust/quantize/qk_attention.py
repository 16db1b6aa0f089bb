"""Attention whose scores come from one matrix per head: ``x M_h x^T``, as trained and as packed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_shape
from pyrobust.quantize.lsq import ActivationQuantizer, LSQQuantizer

__all__ = ["QKAttention", "wide"]


class QKAttention(nn.Module):
    """The forward pass; where its matrices come from is told by the classes below it.

    Attributes:
        dim: width of the input.
        num_heads: heads.
        head_dim: width of a head of the values, which also scales the scores.
        value: maps the rounded input to the values, ``(..., heads * head_dim)``.
        proj: the output projection.
        input_activation: rounds the input; None leaves it in float.
        qk_activation: rounds ``T``; None leaves it in float.
        value_activation: rounds the values; None leaves them in float.
        probability_activation: rounds the probabilities; None leaves them in float.
        relative: gives a bias of the scores, ``(heads, N, N)`` or broadcasting to it; or None.
        dropout: of the probabilities while training.
        output: ``"tensor"`` or ``"pair"``.
    """

    dim: int
    num_heads: int
    head_dim: int
    value: nn.Module
    proj: nn.Module
    input_activation: ActivationQuantizer | None
    qk_activation: ActivationQuantizer | None
    value_activation: ActivationQuantizer | None
    probability_activation: LSQQuantizer | None
    relative: nn.Module | None
    dropout: float
    output: str

    def transformed(self, x: Tensor) -> Tensor:
        """``T = x M^T``, ``(B, N, heads * dim)``, before its rounding."""
        raise NotImplementedError

    def bias_vectors(self) -> Tensor | None:
        """``(heads, dim)``: ``Wk_h^T bq_h``, the part of the query bias that softmax feels."""
        raise NotImplementedError

    def probabilities(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attention before its rounding: ``(B, heads, N, N)`` for ``x`` of ``(B, N, dim)``.

        Args:
            x: the input, not yet rounded.
            attn_mask: as for :meth:`forward`.
        """
        return self._probabilities(self._rounded_input(x), attn_mask)

    def _rounded_input(self, x: Tensor) -> Tensor:
        check_shape(type(self).__name__, "x", x, (None, None, self.dim))
        return wide(x if self.input_activation is None else self.input_activation(x))

    def _probabilities(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        transformed = self.transformed(x)
        if self.qk_activation is not None:
            transformed = self.qk_activation(transformed)
        by_head = transformed.unflatten(-1, (self.num_heads, self.dim)).transpose(1, 2)
        scores = x[:, None] @ by_head.transpose(-1, -2)
        vectors = self.bias_vectors()
        if vectors is not None:
            scores = scores + torch.einsum("bnd,hd->bhn", x, vectors.to(x.dtype))[:, :, None]
        scores = scores / math.sqrt(self.head_dim)
        if self.relative is not None:
            scores = scores + self.relative()
        if attn_mask is not None:
            scores = _masked(scores, attn_mask)
        probabilities: Tensor = scores.softmax(-1)
        return probabilities

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Any:
        """``(B, N, dim)`` -> the same shape and dtype (with None beside it for ``"pair"``).

        Args:
            x: the input of queries, keys and values.
            attn_mask: added to the scores, or boolean with True where attention is allowed;
                anything that broadcasts to ``(B, heads, N, N)``, or one mask per window,
                ``(windows, N, N)``, for a batch of whole sets of windows.
        """
        rounded = self._rounded_input(x)
        attention = self._probabilities(rounded, attn_mask)
        if self.probability_activation is not None:
            attention = self.probability_activation(attention)
        attention = F.dropout(attention, self.dropout, self.training)
        value = self.value(rounded)
        if self.value_activation is not None:
            value = self.value_activation(value)
        heads = value.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        mixed = (attention.to(heads.dtype) @ heads).transpose(1, 2).flatten(2)
        result = self.proj(mixed).to(x.dtype)
        return result if self.output == "tensor" else (result, None)


def wide(x: Tensor) -> Tensor:
    """Float32 in place of a lower precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.ndim == 3:  # one for each window of a picture
        if scores.shape[0] % mask.shape[0]:
            raise ValueError(
                "QKAttention: attn_mask of shape (windows, N, N) must have windows that divide the "
                f"batch of {scores.shape[0]}; got {mask.shape[0]}."
            )
        mask = mask.repeat(scores.shape[0] // mask.shape[0], 1, 1)[:, None]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask
