"""quantize_vit: a vision transformer with every block in low bits, ready to train.

Attention becomes query-key reparametrized, linear layers of the blocks get low-bit weights and
inputs, the ends (patch embedding, classifier) 8 bits.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv 2302.02210, and the authors' code for which layers get how many bits and which are unsigned.
Departures: scales and shifts of images are per channel (the code has a shift per pixel).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_instance
from pyrobust.quantize.attention_parts import is_attention
from pyrobust.quantize.qk_reparam import QKReparamAttention
from pyrobust.quantize.quant_layers import QuantConv2d, QuantLinear
from pyrobust.quantize.simulated_weight import SimulatedWeight
from pyrobust.quantize.stats_quantizer import check_weight_bits

__all__ = ["quantize_vit"]

_END_BITS = 8


def quantize_vit(
    model: nn.Module,
    w_bits: int = 4,
    a_bits: int | None = 4,
    skip: Iterable[str] = (),
    *,
    example: Tensor | None = None,
    reparametrize: bool = True,
    weight_quantizer: str = "statsq",
    per_token: bool = False,
    unsigned: Iterable[str] = ("*fc2", "*linear2"),
    inplace: bool = False,
) -> nn.Module:
    """Replace the layers of a vision transformer by modules that simulate low bits.

    A block is an element of a ``ModuleList`` or ``Sequential`` that holds an attention. Its linear
    layers get ``w_bits`` and ``a_bits``; convolutions and linear layers outside blocks get 8-bit
    LSQ. Attention is recognised in the forms of ``torch.nn.MultiheadAttention``, timm (``qkv``,
    ``proj``) and transformers (``q_proj`` ... ``o_proj``), relative position biases included.

    Args:
        model: the trained float model.
        w_bits: 1 to 8, of the weights of blocks (8 needs ``weight_quantizer="lsq"`` to be packed).
        a_bits: 1 to 8, of the activations of blocks; None leaves all activations in float.
        skip: names or patterns (``fnmatch``) of modules to leave as they are, with all below.
        example: a first batch: the model is run on it once, which sets every activation scale, so
            that an optimizer can be made afterwards.
        reparametrize: replace attention; otherwise its linear layers are treated as all others
            (``torch.nn.MultiheadAttention`` has none and stays in float).
        weight_quantizer: of the linear layers of blocks: ``"statsq"`` or ``"lsq"``.
        per_token: activation scales per token, as published, which fixes the number of tokens.
        unsigned: names or patterns of linear layers whose inputs are mostly positive, such as those
            behind a GELU.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model to train; ``pyrobust.pack`` makes the packed one.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits are out of range, a pattern names nothing, an attention cannot be
            reparametrized, or the model has no block.
    """
    check_instance("quantize_vit", "model", model, nn.Module)
    check_weight_bits("quantize_vit", "w_bits", w_bits)
    if a_bits is not None:
        check_weight_bits("quantize_vit", "a_bits", a_bits)
    skipped = (skip,) if isinstance(skip, str) else tuple(skip)
    names = [name for name, _ in model.named_modules()]
    for pattern in skipped:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(f"quantize_vit: skip must name modules of the model; got {pattern!r}.")
    blocks = _block_names(model)
    if not blocks:
        raise ValueError(
            "quantize_vit: model must have attention blocks in a ModuleList or Sequential; got "
            f"{type(model).__name__} without."
        )
    result = model if inplace else copy.deepcopy(model)
    maker = _Maker(w_bits, a_bits, weight_quantizer, per_token, tuple(unsigned), reparametrize)
    _replace(result, "", blocks, skipped, maker)
    _leave_fused_paths(result)
    if example is not None:
        _run_once(result, example)
    return result


class _Maker:
    """Makes the quantized form of one layer."""

    def __init__(
        self,
        w_bits: int,
        a_bits: int | None,
        weight_quantizer: str,
        per_token: bool,
        unsigned: tuple[str, ...],
        reparametrize: bool,
    ) -> None:
        self.w_bits, self.a_bits, self.weight_quantizer = w_bits, a_bits, weight_quantizer
        self.per_token, self.unsigned = per_token, unsigned
        self.reparametrize = reparametrize

    def make(self, name: str, layer: nn.Module, in_block: bool) -> nn.Module | None:
        """None where the layer stays and its children are looked at."""
        end_bits = None if self.a_bits is None else _END_BITS
        if in_block and self.reparametrize and is_attention(layer):
            attention = QKReparamAttention.from_float(
                layer, self.w_bits, self.a_bits, per_token=self.per_token
            )
            if isinstance(layer, nn.MultiheadAttention):
                return _MultiheadCall(attention, layer)
            return attention
        if isinstance(layer, nn.MultiheadAttention):
            return layer
        if type(layer) is nn.Conv2d:
            return QuantConv2d.from_float(layer, _END_BITS, end_bits)
        if type(layer) is nn.Linear and not in_block:
            return QuantLinear.from_float(layer, _END_BITS, end_bits, "lsq")
        if type(layer) is nn.Linear:
            return QuantLinear.from_float(
                layer,
                self.w_bits,
                self.a_bits,
                self.weight_quantizer,
                signed=not any(fnmatchcase(name, pattern) for pattern in self.unsigned),
                per_channel=-2 if self.per_token else None,
            )
        return None


def _block_names(model: nn.Module) -> list[str]:
    return [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child, block in module.named_children()
        if any(is_attention(inner) for inner in block.modules())
    ]


def _replace(
    module: nn.Module, prefix: str, blocks: list[str], skipped: tuple[str, ...], maker: _Maker
) -> None:
    for child, layer in list(module.named_children()):
        name = f"{prefix}.{child}" if prefix else child
        if any(_fits(name, pattern) for pattern in skipped):
            continue
        in_block = any(_fits(name, block) for block in blocks)
        made = maker.make(name, layer, in_block)
        if made is None:
            _replace(layer, name, blocks, skipped, maker)
        else:
            setattr(module, child, made)


def _fits(name: str, pattern: str) -> bool:
    """Whether ``pattern`` names the module or one above it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _leave_fused_paths(model: nn.Module) -> None:
    """Torch's encoders would hand raw weights to one fused kernel in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _run_once(model: nn.Module, example: Tensor) -> None:
    training = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        model(example)
    for module, mode in training.items():
        module.training = mode


class _MultiheadCall(nn.Module):
    """Gives an attention the call of the ``torch.nn.MultiheadAttention`` that it replaces."""

    in_proj_bias = None  # what torch's encoder layers ask before they take their fused path
    _qkv_same_embed_dim = True

    def __init__(self, attention: nn.Module, mha: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.batch_first = mha.batch_first
        self.embed_dim, self.num_heads = mha.embed_dim, mha.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention only; masks as ``torch.nn.MultiheadAttention`` takes them."""
        if query is not key or query is not value:
            raise ValueError(
                "quantize_vit: a reparametrized attention is a self-attention; query, key and "
                "value must be the same tensor."
            )
        batched = query.ndim == 3
        x = query if batched else query[None]
        x = x if self.batch_first or not batched else x.transpose(0, 1)
        mask = self._mask(x, attn_mask, key_padding_mask)
        result = self.attention(x, mask)
        result = result if self.batch_first or not batched else result.transpose(0, 1)
        weights = None
        if need_weights:
            attention: Any = self.attention
            weights = attention.probabilities(x, mask)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            result, weights = result[0], None if weights is None else weights[0]
        return result, weights

    def _mask(self, x: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """One additive mask that broadcasts to ``(B, heads, N, N)``."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _additive(attn_mask, x)
            if total.ndim == 3:
                total = total.unflatten(0, (x.shape[0], self.num_heads))
        if padding is not None:
            keys = _additive(padding, x).reshape(-1, 1, 1, x.shape[1])
            total = keys if total is None else total + keys
        return total

    def simulated_weights(self) -> dict[str, SimulatedWeight]:
        """Those of the attention."""
        attention: Any = self.attention
        return {f"attention.{name}": w for name, w in attention.simulated_weights().items()}

    def to_packed(self) -> nn.Module:
        """The same call of the packed attention."""
        attention: Any = self.attention
        packed = copy.copy(self)
        packed._modules = {"attention": attention.to_packed()}
        return packed


def _additive(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return zero.expand(mask.shape).masked_fill(mask, -torch.inf)
