"""Attention and the transformer's encoder layer: two matrix products around a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

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
    """Scores, softmax and average, without a mask or with the causal one."""
    shape, keys = site.shapes[0], site.shapes[1]
    if dropout_p > 0 or enable_gqa or attn_mask is not None or len(shape) < 3 or keys[-2] < 2:
        return None
    factor = 1 / math.sqrt(shape[-1]) if scale is None else scale
    scores = torch.matmul(q, k.transpose(-2, -1)) * factor
    if is_causal:
        weights = masked_soft(scores, _triangle(site, shape[-2], keys[-2]))
    else:
        weights = soft(scores, -1)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=factor)
    return emit(meet, torch.matmul(weights, v), plain)


def _triangle(site: Site, rows: int, columns: int) -> Any:
    ones = site.tracer.create_proxy(
        "call_function", torch.ones, (rows, columns), {"dtype": torch.bool}
    )
    return ones.tril()


def _multi_head(site: Site, module: nn.MultiheadAttention, q: Any, k: Any, v: Any) -> Any:
    """``(B, T, E)`` boxes, without masks; the weights are not returned."""
    width = module.embed_dim
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
    batch, length = site.shapes[0][:2]
    inner = torch.Size((batch, module.num_heads, length, width // module.num_heads))
    other = torch.Size((batch, module.num_heads, site.shapes[1][1], inner[-1]))
    mixed = attention(site.at("", [inner, other, other]), *heads)
    if mixed is None:
        return None
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
    """The module on ``(B, T, E)`` boxes, without masks."""
    extra = (key_padding_mask, attn_mask, module.bias_k, module.bias_v)
    if any(e is not None for e in extra) or module.add_zero_attn or not module.batch_first:
        return None
    if len(site.shapes[0]) != 3 or (module.training and module.dropout > 0):
        return None
    mixed = _multi_head(site, module, q, k, v)
    return None if mixed is None else (mixed, None)


def encoder_layer(
    site: Site,
    layer: nn.TransformerEncoderLayer,
    x: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    """``torch.nn.TransformerEncoderLayer`` without masks, norms first or last."""
    masked = src_mask is not None or src_key_padding_mask is not None
    plain = all(type(n) is nn.LayerNorm and n.eps > 0 for n in (layer.norm1, layer.norm2))
    if masked or not plain or not layer.self_attn.batch_first or layer.training:
        return None
    inner = site.at("self_attn", [site.shapes[0]] * 3)

    def attend(y: Any) -> Any:
        return _multi_head(inner, layer.self_attn, y, y, y)

    def feed(y: Any) -> Any:
        return site.call("linear2", layer.activation(site.call("linear1", y)))

    def norm(name: str, y: Any) -> Any:
        module = getattr(layer, name)
        at = site.at(name)
        affine = at.parameter(module, "weight"), at.parameter(module, "bias")
        return layer_normed(y, tuple(module.normalized_shape), *affine, module.eps)

    if site.shapes[0][1] < 2:
        return None
    if layer.norm_first:
        x = x + attend(norm("norm1", x))
        return x + feed(norm("norm2", x))
    x = norm("norm1", x + attend(x))
    return norm("norm2", x + feed(x))


def encoder(
    site: Site,
    module: nn.TransformerEncoder,
    x: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    """``torch.nn.TransformerEncoder`` without masks."""
    if mask is not None or src_key_padding_mask is not None:
        return None
    for i, layer in enumerate(module.layers):
        plain = type(layer) is nn.TransformerEncoderLayer
        x = encoder_layer(site.at(f"layers.{i}"), layer, x) if plain else None
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
