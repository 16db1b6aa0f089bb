"""Attention and the transformer's encoder layer: two matrix products around a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyrobust.certify.relaxation.compositions.masks import Mask, mask_of, merged_mask
from pyrobust.certify.relaxation.compositions.norms import layer_normed
from pyrobust.certify.relaxation.compositions.parts import meet
from pyrobust.certify.relaxation.compositions.site import Site, emit
from pyrobust.certify.relaxation.compositions.softmax import masked_soft, soft

__all__ = ["attention", "encoder", "encoder_layer", "multi_head_attention"]


def attention(
    site: Site,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Scores, softmax and average, with constant masks."""
    shape, keys = site.shapes[0], site.shapes[1]
    if dropout_p > 0 or len(shape) < 3 or keys[-2] < 2 or (is_causal and attn_mask is not None):
        return None
    if enable_gqa:
        heads = [site.shapes[i][-3] for i in range(3)]
        k, v = (
            x if n == heads[0] else x.repeat_interleave(heads[0] // n, -3)
            for x, n in zip((k, v), heads[1:], strict=True)
        )
    mask = None
    if attn_mask is not None:
        mask = mask_of(site, attn_mask, keys[-2])
        if mask is None:
            return None
    if is_causal:
        triangle = _triangle(site, shape[-2], keys[-2])
        mask = Mask(triangle, None, triangle)
    return _attended(q, k, v, 1 / math.sqrt(shape[-1]) if scale is None else scale, mask)


def _attended(q: Any, k: Any, v: Any, factor: float, mask: Mask | None) -> Any:
    scores = torch.matmul(q, k.transpose(-2, -1)) * factor
    if mask is None:
        weights, whole = soft(scores, -1), None
    else:
        scores = scores if mask.added is None else scores + mask.added
        weights, whole = masked_soft(scores, mask.keep), mask.whole
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=whole, scale=factor)
    return emit(meet, torch.matmul(weights, v), plain)


def _triangle(site: Site, rows: int, columns: int) -> Any:
    ones = site.tracer.create_proxy(
        "call_function", torch.ones, (rows, columns), {"dtype": torch.bool}
    )
    return ones.tril()


def _multi_head(
    site: Site,
    module: nn.MultiheadAttention,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    padding: Any = None,
) -> Any:
    """``(B, T, E)`` boxes; the weights are not returned."""
    width, keys = module.embed_dim, site.shapes[1][1]
    mask = None
    if attn_mask is not None or padding is not None:
        mask = merged_mask(site, attn_mask, padding, module.num_heads, keys)
        if mask is None:
            return None
    if keys < 2:
        return None
    bias = site.parameter(module, "in_proj_bias")
    joint = site.parameter(module, "in_proj_weight")
    if joint is not None:
        weights = [joint[i * width : (i + 1) * width] for i in range(3)]
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = [site.parameter(module, name) for name in names]
    heads = []
    for i, source in enumerate((q, k, v)):
        shift = None if bias is None else bias[i * width : (i + 1) * width]
        projected = F.linear(source, weights[i], shift)
        heads.append(projected.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
    factor = 1 / math.sqrt(width // module.num_heads)
    mixed = _attended(heads[0], heads[1], heads[2], factor, mask)
    joined = mixed.transpose(1, 2).flatten(2)
    out = site.at("out_proj")
    weight = out.parameter(module.out_proj, "weight")
    return F.linear(joined, weight, out.parameter(module.out_proj, "bias"))


def multi_head_attention(
    site: Site,
    module: nn.MultiheadAttention,
    q: Any,
    k: Any,
    v: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """The module on ``(B, T, E)`` boxes, with constant masks."""
    extra = module.bias_k is not None or module.bias_v is not None
    if extra or module.add_zero_attn or not module.batch_first:
        return None
    if len(site.shapes[0]) != 3 or (module.training and module.dropout > 0):
        return None
    mixed = _multi_head(site, module, q, k, v, attn_mask, key_padding_mask)
    return None if mixed is None else (mixed, None)


def encoder_layer(
    site: Site,
    layer: nn.TransformerEncoderLayer,
    x: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    """``torch.nn.TransformerEncoderLayer`` with constant masks, norms first or last."""
    plain = all(type(n) is nn.LayerNorm and n.eps > 0 for n in (layer.norm1, layer.norm2))
    if not plain or not layer.self_attn.batch_first or layer.training:
        return None
    inner = site.at("self_attn", [site.shapes[0]] * 3)

    def attend(y: Any) -> Any:
        return _multi_head(inner, layer.self_attn, y, y, y, src_mask, src_key_padding_mask)

    def feed(y: Any) -> Any:
        return site.call("linear2", layer.activation(site.call("linear1", y)))

    def norm(name: str, y: Any) -> Any:
        module = getattr(layer, name)
        at = site.at(name)
        affine = at.parameter(module, "weight"), at.parameter(module, "bias")
        return layer_normed(y, tuple(module.normalized_shape), *affine, module.eps)

    mixed = attend(norm("norm1", x) if layer.norm_first else x)
    if mixed is None:
        return None
    if layer.norm_first:
        x = x + mixed
        return x + feed(norm("norm2", x))
    x = norm("norm1", x + mixed)
    return norm("norm2", x + feed(x))


def encoder(
    site: Site,
    module: nn.TransformerEncoder,
    x: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    """``torch.nn.TransformerEncoder`` with constant masks."""
    for i, layer in enumerate(module.layers):
        plain = type(layer) is nn.TransformerEncoderLayer
        inner = site.at(f"layers.{i}")
        x = encoder_layer(inner, layer, x, mask, src_key_padding_mask) if plain else None
        if x is None:
            return None
    norm = module.norm
    if norm is None:
        return x
    if type(norm) is not nn.LayerNorm or norm.eps <= 0:
        return None
    at = site.at("norm")
    affine = at.parameter(norm, "weight"), at.parameter(norm, "bias")
    return layer_normed(x, tuple(norm.normalized_shape), *affine, norm.eps)
