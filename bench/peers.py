"""Low-bit products of other libraries on the CPU, in one table with ours; absent ones are not.

Each peer takes our codes and scales in its own layout, so that all multiply the same weight (but
int8pack, which has one scale a row and gets a weight of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyrobust.quantize import QTensor

from .ggml_peers import ggml_peers
from .graph_peers import onnxruntime_peers, openvino_peers
from .peer import Call, Peer


def dense_peers(weight: Tensor) -> Iterator[Peer]:
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        own = weight.to(dtype)
        yield Peer(name, 8 * own.element_size(), _linear(own), weight, own.nbytes)


def prepacked_peers(weight: Tensor) -> Iterator[Peer]:
    """The products of oneDNN with a weight in its own layout for the batch, as in torch.compile."""
    for name, dtype in (
        ("torch float32 packed", torch.float32),
        ("torch bfloat16 packed", torch.bfloat16),
    ):
        own = weight.to(dtype)
        yield Peer(name, 8 * own.element_size(), _prepacked(own), weight, own.nbytes)


def _prepacked(weight: Tensor) -> Callable[[Tensor], Call]:
    def prepare(x: Tensor) -> Call:
        own = x.to(weight.dtype)
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        product = torch.ops.mkldnn._linear_pointwise
        return lambda: product(own, laid_out, None, "none", [], "")

    return prepare


def _linear(weight: Tensor) -> Callable[[Tensor], Call]:
    def prepare(x: Tensor) -> Call:
        own = x.to(weight.dtype)
        return lambda: torch.nn.functional.linear(own, weight)

    return prepare


def packed_peers(packed: QTensor) -> Iterator[Peer]:
    """Peers at the width of ``packed``: affine, groups along the inputs."""
    if packed.bits == 4:
        yield _torch_int4(packed)
        yield from _bitsandbytes(packed)
    if packed.bits == 8:
        yield _torch_int8(packed)
        yield from _torchao(packed)
    yield from ggml_peers(packed.bits, packed.dequantize())
    if packed.bits in (4, 8):
        yield from onnxruntime_peers(packed)
    if packed.bits in (2, 4, 8):
        yield from openvino_peers(packed)


def _torch_int4(packed: QTensor) -> Peer:
    codes = packed.unpack_codes().int()
    own = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale, zero = packed.scale.float(), packed.zero.float()
    # w = (code - 8) scale + shift
    both = torch.stack([scale, (8 - zero) * scale], 2).transpose(0, 1).bfloat16().contiguous()

    def prepare(x: Tensor) -> Call:
        half = x.bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda: product(half, own, packed.group_size, both)

    return Peer("torch int4pack", 4, prepare, packed.dequantize(), own.nbytes + both.nbytes)


def _torch_int8(packed: QTensor) -> Peer:
    weight = packed.dequantize()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    half_scale = scale.bfloat16()

    def prepare(x: Tensor) -> Call:
        half = x.bfloat16()
        return lambda: torch.ops.aten._weight_int8pack_mm(half, codes, half_scale)

    return Peer("torch int8pack", 8, prepare, weight, codes.nbytes + half_scale.nbytes)


def _torchao(packed: QTensor) -> Iterator[Peer]:
    """Rows of weights and of activations rounded to 8 bits; its wheel has no kernels for CPUs."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return
    layer = torch.nn.Linear(packed.shape[1], packed.shape[0], bias=False, dtype=torch.bfloat16)
    weight = packed.dequantize()
    layer.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())

    def prepare(x: Tensor) -> Call:
        half = x.bfloat16()
        return lambda: layer(half)

    yield Peer("torchao 8 bits, int8", 8, prepare, weight, weight.numel() + 4 * len(weight))


def _bitsandbytes(packed: QTensor) -> Iterator[Peer]:
    """NF4 of a weight of its own, float activations."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return
    own, state = bnb.functional.quantize_4bit(
        packed.dequantize().bfloat16(), blocksize=packed.group_size, quant_type="nf4"
    )
    weight = bnb.functional.dequantize_4bit(own, state).float()

    def prepare(x: Tensor) -> Call:
        half = x.bfloat16()
        return lambda: bnb.matmul_4bit(half, own.t(), state)

    yield Peer("bitsandbytes NF4", 4, prepare, weight, own.nbytes + state.absmax.nbytes)
