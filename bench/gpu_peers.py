"""Other libraries' packed products on a GPU, where they are installed: the same bits, M and group.

Each peer: ``build(bits, weight) -> call(x)``, which raises whatever the peer raises. A group is 128
columns except where a peer has its own (said in its name).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PEERS", "Peer"]

_GROUP = 128
Peer = Callable[[float, Tensor], Callable[[Tensor], Tensor]]


def humming(bits: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Humming compiles a kernel a shape with the machine's nvcc; its own choice of tiles."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=weight.shape[0],
        shape_k=weight.shape[1],
        weight_config={"dtype": f"int{int(bits)}", "group_size": _GROUP},
        torch_dtype=weight.dtype,
    ).cuda()
    layer.load_from_unquantized(weight)
    layer.transform()
    return layer  # type: ignore[no-any-return]


def gemlite(bits: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """gemlite's Triton kernels, with their fast tuning."""
    from gemlite import DType, GemLiteLinear

    rows, columns = weight.shape
    kinds = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}
    layer = GemLiteLinear(
        int(bits),
        group_size=_GROUP,
        in_features=columns,
        out_features=rows,
        input_dtype=kinds[weight.dtype],
        output_dtype=kinds[weight.dtype],
    )
    codes = torch.randint(0, 1 << int(bits), (rows, columns), dtype=torch.uint8)
    grouped = (rows * columns // _GROUP, 1)
    scales = torch.rand(grouped, dtype=weight.dtype) / 64
    zeros = torch.full(grouped, float(1 << (int(bits) - 1)), dtype=weight.dtype)
    layer.pack(codes, scales, zeros, None)
    return layer  # type: ignore[no-any-return]


def bitsandbytes(bits: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """bitsandbytes' NF4."""
    import bitsandbytes as bnb

    if bits != 4:
        raise NotImplementedError("4 bits only")
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=_GROUP, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state)


def marlin(bits: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Marlin, as IST-DASLab publishes it: 4 bits, symmetric, float16."""
    import marlin as published

    if bits != 4 or weight.dtype != torch.float16:
        raise NotImplementedError("4 bits and float16 only")
    rows, columns = weight.shape
    word = 2**31
    codes = torch.randint(-word, word, (columns // 16, rows * 2)).int()
    scales = torch.rand(columns // _GROUP, rows).half() / 64
    workspace = torch.zeros(rows // 128 * 16, dtype=torch.int32)

    def call(x: Tensor) -> Tensor:
        out = torch.empty(len(x), rows, dtype=x.dtype)
        published.mul(x, codes, out, scales, workspace)
        return out

    return call


def tinygemm(bits: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Torch's own, with zero-points, for bfloat16."""
    if bits != 4 or weight.dtype != torch.bfloat16:
        raise NotImplementedError("4 bits and bfloat16 only")
    rows, columns = weight.shape
    scales = torch.rand(columns // _GROUP, rows, 2).bfloat16()
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, _GROUP, scales)


PEERS: dict[str, Peer] = {
    "torch's tinygemm": tinygemm,
    "humming": humming,
    "Marlin": marlin,
    "bitsandbytes": bitsandbytes,
    "gemlite": gemlite,
}
