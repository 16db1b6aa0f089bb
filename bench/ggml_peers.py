"""The products of llama.cpp: ggml's own libraries from its Python wheel, called through ctypes.

Each type is measured in plain memory and, where the library lays it out anew for this processor,
in that buffer too (what llama.cpp does by default).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

from .peer import Call, Peer

# Numbers of enum ggml_type, by the width that they compete with.
_TYPES = {
    1: {"Q1_0": 41},
    1.58: {"TQ1_0": 34, "TQ2_0": 35},
    2: {"Q2_K": 10},  # Q2_0 has generic code alone and takes 14 ms for one row
    3: {"Q3_K": 11},
    4: {"Q4_0": 2, "Q4_K": 12},
    8: {"Q8_0": 8},
}
_SAMPLE_ROWS = 64  # k-quants search long; their rows are repeated
_CONTEXT_BYTES = 1 << 20


class _Parameters(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Traits(ctypes.Structure):
    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    ]


_POINTER = c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_POINTER, [_Parameters]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), [c_int]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, ctypes.POINTER(c_float)],
    ),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [_POINTER, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [_POINTER, _POINTER]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, c_char_p]),
    "ggml_backend_reg_dev_get": (_POINTER, [_POINTER, c_size_t]),
    "ggml_backend_dev_supports_op": (c_bool, [_POINTER, _POINTER]),
    "ggml_backend_buft_name": (c_char_p, [_POINTER]),
}
_CPU_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_reg": (_POINTER, []),
    "ggml_backend_cpu_buffer_type": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, c_int]),
}


def _functions(path: Path, signatures: dict[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    found = {}
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        found[name.removeprefix("ggml_")] = function
    return found


@functools.cache
def _library() -> Any:
    """All functions as attributes, or None where llama-cpp-python is absent."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    if not (folder / "libggml-cpu.so").exists():
        return None
    functions = _functions(folder / "libggml-base.so", _SIGNATURES)
    functions |= _functions(folder / "libggml-cpu.so", _CPU_SIGNATURES)
    return type("Ggml", (), {name: staticmethod(f) for name, f in functions.items()})


def _buffer_types(lib: Any) -> dict[str, int]:
    """Plain memory, and the layouts for this processor (CPU_REPACK, AMX)."""
    found = {"plain": lib.backend_cpu_buffer_type()}
    registry = lib.backend_cpu_reg()
    address = lib.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        ask = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        extra, i = ask(lib.backend_reg_dev_get(registry, 0)), 0
        while extra and extra[i]:
            found[lib.backend_buft_name(extra[i]).decode()] = extra[i]
            i += 1
    return found


def _quantized(lib: Any, kind: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the whole weight, and the floats that they stand for."""
    rows, cols = weight.shape
    sample = weight[:_SAMPLE_ROWS].contiguous()
    data = torch.zeros(len(sample), lib.row_size(kind, cols), dtype=torch.uint8)
    lib.quantize_chunk(kind, sample.data_ptr(), data.data_ptr(), 0, *sample.shape, None)
    floats = torch.empty(sample.shape)
    to_float = lib.get_type_traits(kind).contents.to_float
    to_float(data.data_ptr(), floats.data_ptr(), sample.numel())
    times = -(-rows // len(sample))
    return data.repeat(times, 1)[:rows].contiguous(), floats.repeat(times, 1)[:rows].contiguous()


class _Product:
    """Room for a weight in one buffer; ``prepare`` builds the graph of one batch size."""

    def __init__(self, lib: Any, kind: int, shape: torch.Size, memory: int) -> None:
        self.lib, (self.rows, self.cols) = lib, shape
        self.backend = lib.backend_cpu_init()
        context = lib.init(_Parameters(_CONTEXT_BYTES, None, True))
        self.weight = lib.new_tensor_2d(context, kind, self.cols, self.rows)
        lib.backend_alloc_ctx_tensors_from_buft(context, memory)

    def fill(self, data: torch.Tensor) -> None:
        """Write the bytes of the weight; the buffer may lay them out anew."""
        self.lib.backend_tensor_set(self.weight, data.data_ptr(), 0, data.numel())

    def supported(self) -> bool:
        """Whether the buffer serves a product of this type here; else it must not be filled."""
        context = self.lib.init(_Parameters(_CONTEXT_BYTES, None, True))
        x = self.lib.new_tensor_2d(context, 0, self.cols, 1)
        device = self.lib.backend_reg_dev_get(self.lib.backend_cpu_reg(), 0)
        y = self.lib.mul_mat(context, self.weight, x)
        return bool(self.lib.backend_dev_supports_op(device, y))

    def prepare(self, x: torch.Tensor) -> Call:
        lib, backend = self.lib, self.backend
        lib.backend_cpu_set_n_threads(backend, torch.get_num_threads())
        context = lib.init(_Parameters(_CONTEXT_BYTES, None, True))
        given = lib.new_tensor_2d(context, 0, self.cols, len(x))
        result = lib.mul_mat(context, self.weight, given)
        graph = lib.new_graph(context)
        lib.build_forward_expand(graph, result)
        lib.backend_alloc_ctx_tensors(context, backend)
        own = x.float().contiguous()
        lib.backend_tensor_set(given, own.data_ptr(), 0, own.nbytes)
        out = torch.empty(len(x), self.rows)

        def call() -> torch.Tensor:
            lib.backend_graph_compute(backend, graph)
            lib.backend_tensor_get(result, out.data_ptr(), 0, out.nbytes)
            return out

        return call


def ggml_peers(bits: float, weight: torch.Tensor) -> Iterator[Peer]:
    """llama.cpp's types of about ``bits``, of the first rows of ``weight`` again and again."""
    lib = _library()
    if lib is None:
        return
    for name, kind in _TYPES[bits].items():
        data, floats = _quantized(lib, kind, weight)
        for place, memory in _buffer_types(lib).items():
            product = _Product(lib, kind, weight.shape, memory)
            if place != "plain" and not product.supported():
                continue
            product.fill(data)
            label = f"llama.cpp {name}" + ("" if place == "plain" else f", {place}")
            yield Peer(label, bits, product.prepare, floats, data.nbytes)
