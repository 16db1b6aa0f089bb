"""onnxruntime and OpenVINO: the packed product as a graph of one node, in float and in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pyrobust.quantize import QTensor

from .peer import Call, Peer


def onnxruntime_peers(packed: QTensor) -> Iterator[Peer]:
    """MatMulNBits at accuracy levels 0 (float) and 4 (8-bit activations)."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return
    (rows, cols), bits, group = packed.shape, int(packed.bits), packed.group_size
    groups = cols // group
    codes = packed.codes.numpy().reshape(rows, groups, group * bits // 8)
    zero = packed.zero.numpy().astype(np.uint8)
    per_byte = 8 // bits
    zero = sum(zero[:, i::per_byte] << (bits * i) for i in range(per_byte)).astype(np.uint8)
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

        def prepare(x: torch.Tensor, session: Any = session) -> Call:
            value = {"A": x.numpy()}
            return lambda: session.run(None, value)[0]

        name = f"onnxruntime {bits} bits, {mode}"
        yield Peer(name, bits, prepare, packed.dequantize(), sum(v.nbytes for v in parts.values()))


def openvino_peers(packed: QTensor) -> Iterator[Peer]:
    """A compressed MatMul without and with dynamic rounding of the activations to 8 bits."""
    try:
        import openvino as ov
        import openvino.opset13 as op
    except ImportError:
        return
    (rows, cols), bits, group = packed.shape, int(packed.bits), packed.group_size
    kind = {2: ov.Type.u2, 4: ov.Type.u4, 8: ov.Type.u8}[bits]
    shape = (rows, cols // group, group)

    def constant(codes: np.ndarray) -> Any:
        fields = codes.reshape(-1, 8 // bits)
        data = sum(fields[:, i] << (bits * i) for i in range(8 // bits)).astype(np.uint8)
        if bits == 8:
            return op.constant(data.reshape(codes.shape))
        return op.constant(ov.Tensor(data, ov.Shape(codes.shape), kind), shared_memory=False)

    codes = op.convert(constant(packed.unpack_codes().numpy().reshape(shape)), "f16")
    zero = op.convert(constant(packed.zero.numpy()[..., None]), "f16")
    scale = op.constant(packed.scale.numpy()[..., None])
    weight = op.multiply(op.subtract(codes, zero), scale)
    weight = op.convert(op.reshape(weight, [rows, cols], False), "f32")
    x = op.parameter([-1, cols], ov.Type.f32)
    model = ov.Model([op.matmul(x, weight, False, True)], [x])
    nbytes = packed.codes.nbytes + packed.scale.nbytes + packed.zero.numel() * bits // 8
    for dynamic, mode in ((0, "float"), (group, "int8")):
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(dynamic),
        }
        request = ov.compile_model(model, "CPU", options).create_infer_request()

        def prepare(x: torch.Tensor, request: Any = request) -> Call:
            request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

            def call() -> object:
                request.infer()
                return request.get_output_tensor().data

            return call

        yield Peer(f"openvino {bits} bits, {mode}", bits, prepare, packed.dequantize(), nbytes)
