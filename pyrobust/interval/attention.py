"""Rules of attention: what transformers make of products of two boxes and softmax.

Attention is moreover cut to the range of the values, since it averages them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.errors import check_shape, where
from pyrobust.interval.linear import linear
from pyrobust.interval.operands import Rule, refuse, require_box, working
from pyrobust.interval.outward import enclose, error_of_products
from pyrobust.interval.pair_pass import mul
from pyrobust.interval.product_pass import matmul, softmax
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = ["RULES", "attention"]


def _of_ranks(name: str, first: int, second: int) -> Rule:
    """``matmul`` under one of its names that take two ranks and broadcast nothing."""

    def rule(input: Any, mat2: Any, *, out: None = None) -> Interval:
        fits = (input.ndim, mat2.ndim) == (first, second) and input.shape[:-2] == mat2.shape[:-2]
        requirement = f"operands of {first} and {second} dimensions and one batch"
        check_shape(name, fits, requirement, (*input.shape, *mat2.shape))
        return matmul(input, mat2, out=out)

    return rule


_mv = _of_ranks("mv", 2, 1)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Interval:
    """Scaled dot-product attention ``softmax(q k^T scale + mask) v``.

    In deployed mode for implementations that form the scores, their softmax and the average one
    after another.
    """
    if dropout_p > 0:
        raise ValueError(
            f"Interval: attention must run without dropout; got dropout_p = {dropout_p}{where()}. "
            "Call model.eval() first."
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, -3)
        value = value.repeat_interleave(groups, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not isinstance(query, Interval) and not isinstance(key, Interval):
        # a point's scores have rounding errors too
        box = require_box(value, "scaled_dot_product_attention")
        query = Interval(query, query, rounding=box.rounding)
    weights = mul(matmul(query, key.mT), factor)
    bounded = None
    if not weights.finite_by_kernel:
        bounded = (weights.lower.isfinite() & weights.upper.isfinite()).all(-1, keepdim=True)
    mask = attn_mask
    if is_causal:
        size = weights.shape[-2:]
        mask = torch.ones(size, dtype=torch.bool, device=weights.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            weights = weights.masked_fill(~mask, -math.inf)
        else:
            weights = weights + mask
    mixed = _cut_to_range(matmul(softmax(weights, -1), value), value)
    if bounded is None:
        return mixed
    # scores that overflow, in boxes or in an evaluation, are no scores
    lower = torch.where(bounded, mixed.lower, -math.inf)
    return wrap(lower, torch.where(bounded, mixed.upper, math.inf), mixed.rounding)


def _cut_to_range(mixed: Interval, value: Any) -> Interval:
    """A mean of values lies between the least and the greatest of them, up to its own rounding."""
    low, high = (value.lower, value.upper) if isinstance(value, Interval) else (value, value)
    # readings of an end rise with it: those of the least are the least
    ends = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    least, most = working(wrap(*ends, mixed.rounding))
    if is_deployed(mixed.rounding):
        terms = 2 * low.shape[-2] + 64
        slack = error_of_products(terms, mixed.dtype, mixed.rounding)
        lost = torch.finfo(mixed.dtype).tiny * terms  # where denormals are flushed
        least, most = least - slack * least.abs() - lost, most + slack * most.abs() + lost
    kind = mixed.dtype
    least, most = enclose(least, most, 0.0, kind) if mixed.rounding != "nearest" else (least, most)
    return wrap(torch.maximum(mixed.lower, least), torch.minimum(mixed.upper, most), mixed.rounding)


def _multi_head(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Interval, None]:
    """``torch.nn.MultiheadAttention`` of ``(T, B, E)`` boxes; the weights are not returned."""
    extras = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or any(extra is not None for extra in extras):
        raise refuse("multi-head attention with extra keys")
    if use_separate_proj_weight or in_proj_weight is None:
        projections = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        projections = list(in_proj_weight.chunk(3))
    shifts = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    batched = query.dim() == 3
    heads = []
    for source, weight, shift in zip((query, key, value), projections, shifts, strict=True):
        sequence = source if batched else source.unsqueeze(1)
        projected = (
            linear(sequence, weight, shift)
            if isinstance(sequence, Interval)
            else torch.nn.functional.linear(sequence, weight, shift)  # type: ignore[arg-type]
        )
        split = projected.reshape(*projected.shape[:2], num_heads, -1)
        heads.append(split.permute(1, 2, 0, 3))  # (B, heads, T, E / heads)
    mask = _merged_mask(attn_mask, key_padding_mask, heads[0].shape[0], num_heads)
    mixed = attention(heads[0], heads[1], heads[2], mask, dropout_p if training else 0.0)
    joined = mixed.permute(2, 0, 1, 3).reshape(mixed.shape[2], mixed.shape[0], -1)
    result = linear(joined, out_proj_weight, out_proj_bias)
    return (result if batched else result.squeeze(1)), None


def _merged_mask(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, num_heads: int
) -> Tensor | None:
    """One additive mask of ``(B or 1, heads or 1, T, S)``; True in a bool mask forbids."""
    masks = []
    if attn_mask is not None:
        shape = (batch, num_heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask.shape
        masks.append(attn_mask.reshape(shape))
    if padding is not None:
        masks.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
    additive = [
        torch.zeros(m.shape, device=m.device).masked_fill(m, -math.inf)
        if m.dtype == torch.bool
        else m
        for m in masks
    ]
    return (
        None if not additive else additive[0] if len(additive) == 1 else additive[0] + additive[1]
    )


RULES: dict[str, Rule] = {
    "matmul": matmul,
    "__matmul__": matmul,
    "__rmatmul__": lambda x, y: matmul(y, x),
    "bmm": _of_ranks("bmm", 3, 3),
    "mm": _of_ranks("mm", 2, 2),
    "mv": lambda input, vec: _mv(input, vec),
    "softmax": softmax,
    "log_softmax": lambda input, dim=None, _stacklevel=3, dtype=None: softmax(
        input, dim, dtype=dtype, log=True
    ),
    "softmin": lambda input, dim=None, _stacklevel=3, dtype=None: softmax(-input, dim, dtype=dtype),
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": _multi_head,
}
