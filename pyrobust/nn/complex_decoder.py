"""A causal language model on complex numbers, with 2-bit phase weights (iFairy's architecture).

Source: Wang et al., "iFairy: the First 2-bit Complex LLM with All Parameters in {±1, ±i}", 2025,
arXiv 2508.05571, and the published model code; parameters carry the names of the published
checkpoints, whose state dicts load as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_integer, check_positive
from pyrobust.nn.complex_layers import (
    ComplexReLUSquared,
    ComplexRMSNorm,
    ComplexRotaryEmbedding,
    Pair,
)
from pyrobust.quantize.ifairy import ComplexLinear

__all__ = [
    "ComplexAttention",
    "ComplexDecoderConfig",
    "ComplexDecoderLM",
    "ComplexGatedMLP",
    "KeyValueCache",
]


@dataclass(frozen=True)
class ComplexDecoderConfig:
    """Sizes of a :class:`ComplexDecoderLM`; the defaults are those of the published 700M model.

    Args:
        vocab_size: tokens.
        hidden_size: complex width; a multiple of ``heads``.
        mlp_size: complex width inside the MLP.
        layers: blocks.
        heads: of attention.
        kv_heads: heads of keys and values, a divisor of ``heads``; None means ``heads``.
        rotary_base: of the rotary frequencies.
        eps: of the norms.
        weight_bits: 2, or None for float weights.
        act_bits: 8, or None for float activations.
        initial_std: of embeddings and head; each part of a complex weight has it over sqrt(2).

    Raises:
        ValueError: an argument is out of range, or sizes do not divide.
    """

    vocab_size: int = 32000
    hidden_size: int = 1536
    mlp_size: int = 4096
    layers: int = 24
    heads: int = 16
    kv_heads: int | None = None
    rotary_base: float = 10000.0
    eps: float = 1e-5
    weight_bits: int | None = 2
    act_bits: int | None = 8
    initial_std: float = 0.02

    def __post_init__(self) -> None:
        subject = "ComplexDecoderConfig"
        for name in ("vocab_size", "hidden_size", "mlp_size", "layers", "heads"):
            check_integer(subject, name, getattr(self, name), 1)
        check_choice(subject, "weight_bits", self.weight_bits, (2, None))
        check_choice(subject, "act_bits", self.act_bits, (8, None))
        for name in ("rotary_base", "eps", "initial_std"):
            check_positive(subject, name, getattr(self, name))
        _check_divides(subject, "heads", self.heads, "hidden_size", self.hidden_size)
        if self.kv_heads is not None:
            check_integer(subject, "kv_heads", self.kv_heads, 1)
            _check_divides(subject, "kv_heads", self.kv_heads, "heads", self.heads)


class KeyValueCache:
    """Keys and values that one attention layer has seen, ``(B, heads, T, 2 * head_dim)`` each.

    The last axis holds the real parts, then the imaginary ones.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> Pair:
        """Add positions; returns all keys and values."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


class ComplexAttention(nn.Module):
    """Causal attention with real scores Re<q, k>, complex values and a norm before the output.

    Args:
        hidden_size: complex width, a multiple of ``heads``.
        heads: of attention.
        kv_heads: heads of keys and values, a divisor of ``heads``; None means ``heads``.
        rotary_base: of the rotary frequencies.
        eps: of the norm.
        weight_bits: 2 or None.
        act_bits: 8 or None.

    Raises:
        ValueError: sizes do not divide, or an argument is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        eps: float = 1e-5,
        weight_bits: int | None = 2,
        act_bits: int | None = 8,
    ) -> None:
        super().__init__()
        check_integer("ComplexAttention", "heads", heads, 1)
        _check_divides("ComplexAttention", "heads", heads, "hidden_size", hidden_size)
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        _check_divides("ComplexAttention", "kv_heads", self.kv_heads, "heads", heads)
        self.head_dim = hidden_size // heads
        bits: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits}
        narrow = self.kv_heads * self.head_dim
        self.q_proj = ComplexLinear(hidden_size, hidden_size, **bits)
        self.k_proj = ComplexLinear(hidden_size, narrow, **bits)
        self.v_proj = ComplexLinear(hidden_size, narrow, **bits)
        self.o_proj = ComplexLinear(hidden_size, hidden_size, **bits)
        self.attn_layernorm = ComplexRMSNorm(hidden_size, eps=eps)
        self.rotary = ComplexRotaryEmbedding(self.head_dim, base=rotary_base)

    def forward(
        self, x_real: Tensor, x_imag: Tensor, *, cache: KeyValueCache | None = None
    ) -> Pair:
        """``(B, T, hidden_size)`` twice -> the same; with ``cache``, ``x`` continues it."""
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + x_real.shape[1], device=x_real.device)
        q = self._turned(self.q_proj(x_real, x_imag), positions)
        keys = self._turned(self.k_proj(x_real, x_imag), positions)
        values = torch.cat([self._split(part) for part in self.v_proj(x_real, x_imag)], -1)
        if cache is not None:
            keys, values = cache.append(keys, values)
        repeats = self.heads // self.kv_heads
        if repeats > 1:
            keys = keys.repeat_interleave(repeats, 1)
            values = values.repeat_interleave(repeats, 1)
        mask = None
        if start and len(positions) > 1:
            mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
        # Re<q, k> is the real product of the concatenated parts
        mixed = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=start == 0, scale=self.head_dim**-0.5
        )
        real, imag = mixed.transpose(1, 2).chunk(2, -1)
        normed = self.attn_layernorm(real.flatten(2), imag.flatten(2))
        pair: Pair = self.o_proj(*normed)
        return pair

    def _split(self, x: Tensor) -> Tensor:
        """``(B, T, heads * head_dim)`` -> ``(B, heads, T, head_dim)``."""
        split: Tensor = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return split

    def _turned(self, pair: Pair, positions: Tensor) -> Tensor:
        real, imag = (self._split(part) for part in pair)
        return torch.cat(self.rotary(real, imag, positions), -1)


class ComplexGatedMLP(nn.Module):
    """``down(norm(conj(relu2(gate(x))) * up(x)))`` on complex numbers.

    Args:
        hidden_size: complex width outside.
        mlp_size: complex width inside.
        eps: of the norm.
        weight_bits: 2 or None.
        act_bits: 8 or None.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_size: int,
        *,
        eps: float = 1e-5,
        weight_bits: int | None = 2,
        act_bits: int | None = 8,
    ) -> None:
        super().__init__()
        bits: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits}
        self.gate_proj = ComplexLinear(hidden_size, mlp_size, **bits)
        self.up_proj = ComplexLinear(hidden_size, mlp_size, **bits)
        self.down_proj = ComplexLinear(mlp_size, hidden_size, **bits)
        self.activation = ComplexReLUSquared()
        self.ffn_layernorm = ComplexRMSNorm(mlp_size, eps=eps)

    def forward(self, x_real: Tensor, x_imag: Tensor) -> Pair:
        """``(..., hidden_size)`` twice -> the same."""
        g_real, g_imag = self.activation(*self.gate_proj(x_real, x_imag))
        u_real, u_imag = self.up_proj(x_real, x_imag)
        product = g_real * u_real + g_imag * u_imag, g_real * u_imag - g_imag * u_real
        pair: Pair = self.down_proj(*self.ffn_layernorm(*product))
        return pair


class _Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: ComplexDecoderConfig) -> None:
        super().__init__()
        bits: dict[str, Any] = {"weight_bits": config.weight_bits, "act_bits": config.act_bits}
        self.pre_layernorm = ComplexRMSNorm(config.hidden_size, eps=config.eps)
        self.self_attn = ComplexAttention(
            config.hidden_size,
            config.heads,
            kv_heads=config.kv_heads,
            rotary_base=config.rotary_base,
            eps=config.eps,
            **bits,
        )
        self.post_layernorm = ComplexRMSNorm(config.hidden_size, eps=config.eps)
        self.mlp = ComplexGatedMLP(config.hidden_size, config.mlp_size, eps=config.eps, **bits)

    def forward(self, x_real: Tensor, x_imag: Tensor, cache: KeyValueCache | None) -> Pair:
        real, imag = self.self_attn(*self.pre_layernorm(x_real, x_imag), cache=cache)
        x_real, x_imag = x_real + real, x_imag + imag
        real, imag = self.mlp(*self.post_layernorm(x_real, x_imag))
        return x_real + real, x_imag + imag


class ComplexDecoderLM(nn.Module):
    """Causal language model whose blocks compute on complex numbers.

    Two real embedding tables give the parts of a token; a real head reads both parts. Embeddings,
    norms and head are not quantized; every :class:`~pyrobust.quantize.ComplexLinear` is, as the
    configuration says.

    Args:
        config: sizes and formats.

    Example:
        >>> sizes = {"vocab_size": 11, "hidden_size": 8, "mlp_size": 12, "layers": 1, "heads": 2}
        >>> model = ComplexDecoderLM(ComplexDecoderConfig(**sizes))
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 11])
    """

    def __init__(self, config: ComplexDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings_real = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_embeddings_imag = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.final_norm = ComplexRMSNorm(config.hidden_size, eps=config.eps)
        self.lm_head = nn.Linear(2 * config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights as published; norms stay as they are."""
        std = self.config.initial_std
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, ComplexLinear):
                nn.init.normal_(module.weight_real, std=std / math.sqrt(2))
                nn.init.normal_(module.weight_imag, std=std / math.sqrt(2))

    def new_cache(self) -> list[KeyValueCache]:
        """Empty caches, one a layer, for decoding step by step."""
        return [KeyValueCache() for _ in self.layer]

    def forward(self, tokens: Tensor, *, cache: list[KeyValueCache] | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: ``(B, T)`` int32 or int64.
            cache: from :meth:`new_cache`; ``tokens`` then continue what it has seen, and it is
                extended in place.

        Returns:
            ``(B, T, vocab_size)``.

        Raises:
            ValueError: ``tokens`` is not two-dimensional, or the cache is of another model.
        """
        if tokens.ndim != 2:
            raise ValueError(
                f"ComplexDecoderLM: tokens must have shape (B, T); got {tuple(tokens.shape)}."
            )
        if cache is not None and len(cache) != len(self.layer):
            raise ValueError(
                f"ComplexDecoderLM: cache must have one entry a layer ({len(self.layer)}); got "
                f"{len(cache)}."
            )
        real, imag = self.token_embeddings_real(tokens), self.token_embeddings_imag(tokens)
        for i, block in enumerate(self.layer):
            real, imag = block(real, imag, None if cache is None else cache[i])
        logits: Tensor = self.lm_head(torch.cat(self.final_norm(real, imag), -1))
        return logits


def _check_divides(subject: str, name: str, value: int, whole_name: str, whole: int) -> None:
    if value < 1 or whole % value:
        raise ValueError(f"{subject}: {name} must divide {whole_name} = {whole}; got {value}.")
