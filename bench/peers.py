"""Low-bit products of other libraries on the CPU, in one table with ours; absent ones are not.

Each peer takes our codes and scales in its own layout, so that all multiply the same weight (but
int8pack, which has one scale a row and gets a weight of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyrobust.quantize import QTensor


@dataclass(frozen=True)
class Peer:
    """A product to time: ``prepare(x)`` gives the call, ``nbytes`` is what it reads of weights."""

    name: str
    bits: float
    prepare: Callable[[Tensor], Callable[[], object]]
    weight: Tensor
    nbytes: int


def dense_peers(weight: Tensor) -> Iterator[Peer]:
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        own = weight.to(dtype)
        yield Peer(name, 8 * own.element_size(), _linear(own), weight, own.nbytes)


def _linear(weight: Tensor) -> Callable[[Tensor], Callable[[], object]]:
    def prepare(x: Tensor) -> Callable[[], object]:
        own = x.to(weight.dtype)
        return lambda: torch.nn.functional.linear(own, weight)

    return prepare


def packed_peers(packed: QTensor) -> Iterator[Peer]:
    """Peers at the width of ``packed``: affine, groups along the inputs."""
    if packed.bits == 4:
        yield _torch_int4(packed)
    if packed.bits == 8:
        yield _torch_int8(packed)
    if packed.bits in (4, 8):
        yield from _onnxruntime(packed)


def _torch_int4(packed: QTensor) -> Peer:
    codes = packed.unpack_codes().int()
    own = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale, zero = packed.scale.float(), packed.zero.float()
    # w = (code - 8) scale + shift
    both = torch.stack([scale, (8 - zero) * scale], 2).transpose(0, 1).bfloat16().contiguous()

    def prepare(x: Tensor) -> Callable[[], object]:
        half = x.bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda: product(half, own, packed.group_size, both)

    return Peer("torch int4pack", 4, prepare, packed.dequantize(), own.nbytes + both.nbytes)


def _torch_int8(packed: QTensor) -> Peer:
    weight = packed.dequantize()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    half_scale = scale.bfloat16()

    def prepare(x: Tensor) -> Callable[[], object]:
        half = x.bfloat16()
        return lambda: torch.ops.aten._weight_int8pack_mm(half, codes, half_scale)

    return Peer("torch int8pack", 8, prepare, weight, codes.nbytes + half_scale.nbytes)


def _onnxruntime(packed: QTensor) -> Iterator[Peer]:
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return
    (rows, cols), bits, group = packed.shape, int(packed.bits), packed.group_size
    groups = cols // group
    codes = packed.codes.numpy().reshape(rows, groups, group * bits // 8)
    zero = packed.zero.numpy()
    if bits == 4:
        zero = zero[:, 0::2] | zero[:, 1::2] << 4
    parts = {"B": codes, "S": packed.scale.float().numpy(), "Z": zero.reshape(rows, -1)}
    names = ["A", *parts]
    for level, mode in ((0, "float"), (4, "int8")):
        node = helper.make_node(
            "MatMulNBits", names, ["Y"], domain="com.microsoft",
            K=cols, N=rows, bits=bits, block_size=group, accuracy_level=level,
        )  # fmt: skip
        sizes = [("A", cols), ("Y", rows)]
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["M", s]) for n, s in sizes)
        weights = [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in parts.items()]
        graph = helper.make_graph([node], "g", [x], [y], weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)

        def prepare(x: Tensor, session: object = session) -> Callable[[], object]:
            value = {"A": x.numpy()}
            return lambda: session.run(None, value)[0]  # type: ignore[attr-defined]

        name = f"onnxruntime {bits} bits, {mode}"
        yield Peer(name, bits, prepare, packed.dequantize(), sum(v.nbytes for v in parts.values()))
