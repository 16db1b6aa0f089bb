"""The float weights of a self-attention, read from the forms in which models keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AttentionParts", "RelativeBias", "attention_parts", "is_attention"]

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class AttentionParts:
    """Weights ``(heads * head width, dim)``, biases or None, and what else shapes the result.

    Attributes:
        query: weight of the queries.
        key: weight of the keys; their bias never matters.
        value: weight of the values.
        output_weight: ``(dim, heads * head width)``.
        query_bias: of the queries.
        value_bias: of the values.
        output_bias: of the output.
        num_heads: heads.
        dropout: of the probabilities.
        relative: module that returns a bias of the scores, or None.
        output: ``"tensor"`` or ``"pair"``, what the module returns.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output_weight: Tensor
    query_bias: Tensor | None
    value_bias: Tensor | None
    output_bias: Tensor | None
    num_heads: int
    dropout: float = 0.0
    relative: nn.Module | None = None
    output: str = "tensor"


class RelativeBias(nn.Module):
    """A learned bias for each pair of places in a window: ``(heads, N, N)``.

    Args:
        table: ``(distances, heads)``.
        index: ``(N, N)`` int64, the distance of each pair.
    """

    index: Tensor

    def __init__(self, table: Tensor, index: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.detach().clone())
        self.register_buffer("index", index.detach().clone())

    def forward(self) -> Tensor:
        """``(heads, N, N)``."""
        return self.table[self.index].permute(2, 0, 1)


def is_attention(module: nn.Module) -> bool:
    """Whether :func:`attention_parts` knows the form of ``module``."""
    return (
        isinstance(module, nn.MultiheadAttention)
        or _has_linears(module, ("qkv", "proj"))
        or _has_linears(module, _SEPARATE)
    )


def attention_parts(subject: str, module: nn.Module) -> AttentionParts:
    """The parts of ``module``, which stay its own tensors (nothing is copied).

    Args:
        subject: who asks, for the errors.
        module: see :meth:`pyrobust.quantize.QKReparamAttention.from_float`.

    Raises:
        TypeError: its form is not known.
        ValueError: it computes something that the known forms do not.
    """
    if isinstance(module, nn.MultiheadAttention):
        parts = _from_multihead(subject, module)
    elif _has_linears(module, ("qkv", "proj")):
        parts = _from_fused(module)
    elif _has_linears(module, _SEPARATE):
        parts = _from_separate(module)
    else:
        raise TypeError(
            f"{subject}: mha must be a torch.nn.MultiheadAttention, or have linear layers qkv and "
            f"proj, or q_proj, k_proj, v_proj and o_proj; got {type(module).__name__}."
        )
    _check_form(subject, module, parts)
    return parts


def _from_multihead(subject: str, mha: nn.MultiheadAttention) -> AttentionParts:
    if mha.in_proj_weight is None or mha.bias_k is not None or mha.add_zero_attn:
        raise ValueError(
            f"{subject}: mha must take queries, keys and values of one width, without add_bias_kv "
            "and add_zero_attn; got another kind."
        )
    query, key, value = mha.in_proj_weight.detach().chunk(3)
    biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.detach().chunk(3)
    out = mha.out_proj
    return AttentionParts(
        query, key, value, out.weight, biases[0], biases[2], out.bias, mha.num_heads, mha.dropout
    )


def _from_fused(module: Any) -> AttentionParts:
    query, key, value = module.qkv.weight.detach().chunk(3)
    bias = module.qkv.bias
    biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
    drop = getattr(module, "attn_drop", None)
    relative = None
    if isinstance(getattr(module, "relative_position_bias_table", None), Tensor):
        relative = RelativeBias(module.relative_position_bias_table, module.relative_position_index)
    return AttentionParts(
        query, key, value, module.proj.weight, biases[0], biases[2], module.proj.bias,
        int(module.num_heads), float(getattr(drop, "p", drop or 0.0)), relative,
    )  # fmt: skip


def _from_separate(module: Any) -> AttentionParts:
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    return AttentionParts(
        module.q_proj.weight.detach(), module.k_proj.weight.detach(), module.v_proj.weight.detach(),
        module.o_proj.weight, module.q_proj.bias, module.v_proj.bias, module.o_proj.bias,
        int(heads), float(getattr(module, "attention_dropout", 0.0)),
        getattr(module, "relative_position_bias", None), "pair",
    )  # fmt: skip


def _has_linears(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def _check_form(subject: str, module: Any, parts: AttentionParts) -> None:
    kind = type(module).__name__
    rows = parts.query.shape[0]
    if rows % parts.num_heads or parts.key.shape != parts.query.shape:
        raise ValueError(
            f"{subject}: the projections of {kind} must have equal rows that {parts.num_heads} "
            f"heads divide; got {tuple(parts.query.shape)} and {tuple(parts.key.shape)}."
        )
    if parts.value.shape != parts.query.shape:
        raise ValueError(
            f"{subject}: the values of {kind} must be as wide as its queries; got "
            f"{tuple(parts.value.shape)} and {tuple(parts.query.shape)}."
        )
    for name in ("q_norm", "k_norm", "norm"):
        part = getattr(module, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            raise ValueError(
                f"{subject}: {kind} must not normalise queries, keys or mixed values, which one "
                f"matrix per head cannot express; it has a {name}."
            )
    usual = (rows // parts.num_heads) ** -0.5
    for name in ("scale", "scaling"):
        seen = getattr(module, name, usual)
        seen = float(seen) if isinstance(seen, int | float) else usual
        if abs(seen - usual) > 1e-6 * usual:
            raise ValueError(
                f"{subject}: {kind} must scale its scores by {usual:.6g}; got {seen:.6g}."
            )
    if not torch.is_floating_point(parts.query):
        raise TypeError(f"{subject}: the weights of {kind} must be floating point.")
