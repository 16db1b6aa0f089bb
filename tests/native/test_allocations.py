"""What a product, a convolution and loading ask of memory, counted beneath malloc.

The counts are taken in processes of their own, before whose libc ``count_allocations.c`` is loaded.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None,
        reason="needs a C compiler and the names of glibc",
    ),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="has its own malloc"),
]

PRELUDE = """
import ctypes, json, sys
import torch
import pyrobust
from pyrobust import _native, ops
from pyrobust.quantize import round_to_nearest

library = ctypes.CDLL(None)
library.begin_counting.argtypes = [ctypes.c_size_t]

def counted(call, least=256):
    "Requests of at least so many bytes, their sum, what stays, and the most held at once."
    library.begin_counting(least)
    call()
    names = "requests", "bytes", "live", "peak"
    found = [getattr(library, "counted_" + name) for name in names]
    for function in found:
        function.restype = ctypes.c_long
    values = [function() for function in found]
    library.begin_counting(2**64 - 1)
    return dict(zip(names, values))
"""


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Runs a script after the prelude with counted allocations; what it prints is JSON."""
    built = tmp_path_factory.mktemp("counting") / "count_allocations.so"
    source = Path(__file__).with_name("count_allocations.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)

    def run(script, *arguments):
        command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
        preloaded = os.environ | {"LD_PRELOAD": str(built), "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, env=preloaded, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


PRODUCTS = """
torch.set_num_threads(2)
wrong = []
for isa in _native.supported_isas():
    _native.set_isa(isa)
    for bits in (1.58, 3, 4, 8):
        for dim in (0, 1):
            w = round_to_nearest(torch.randn(512, 512), bits=bits, group_size=128, group_dim=dim)
            form = {"in_features": 512, "bits": bits, "group_size": 128, "group_dim": dim}
            for mode, dtype in (("int8", torch.float32), (None, torch.float32), (None, torch.half)):
                for rows in (1, 4, 40):
                    x = torch.randn(rows, 512).to(dtype)
                    def call():
                        ops.packed_linear(x, w.codes, w.scale, w.zero, activations=mode, **form)
                    for _ in range(3):  # scratch, panels, threads
                        call()
                    seen = counted(lambda: [call() for _ in range(4)])
                    size = 4 * rows * 512 * x.element_size()
                    if (seen["requests"], seen["bytes"]) != (4, size):
                        wrong.append([isa, bits, dim, str(mode), str(dtype), rows, seen])
print(json.dumps(wrong))
"""


def test_a_product_allocates_its_output_and_nothing_else(measure):
    assert measure(PRODUCTS) == []


LAYERS = """
conv = torch.nn.Conv2d(16, 16, 3, padding=1)
layer = pyrobust.pack(torch.nn.Sequential(conv), bits=4, group_size=48)
small, large = torch.randn(8, 16, 32, 32), torch.randn(64, 16, 32, 32)
table = round_to_nearest(torch.randn(1000, 64), bits=4, group_size=64)
indices = torch.randint(0, 1000, (500,))
def gather():
    return ops.packed_embedding(
        indices, table.codes, table.scale, table.zero, embedding_dim=64, bits=4, group_size=64)
with torch.inference_mode():
    for x in (small, large, small, large):
        layer(x)
    gather()
    held = [counted(lambda: layer(x))["peak"] for x in (small, large)]
    rows = counted(lambda: gather())["peak"]
print(json.dumps({"small": held[0], "large": held[1], "rows": rows}))
"""


def test_scratch_of_layers_does_not_grow_with_the_batch(measure):
    from pyrobust.ops import packed_conv

    seen = measure(LAYERS)
    outputs = {"small": 4 * 8 * 16 * 32 * 32, "large": 4 * 64 * 16 * 32 * 32}
    scratch = {name: seen[name] - outputs[name] for name in outputs}
    # Padded images, their patches, and the product of a block, however many images there are.
    assert scratch["large"] < 3 * packed_conv.COLUMN_BYTES
    assert scratch["large"] < scratch["small"] + 64 * 1024
    assert seen["rows"] < 4 * 500 * 64 + 16 * 1024


GRADIENTS = """
torch.set_num_threads(2)
wrong = []
for isa in _native.supported_isas():
    _native.set_isa(isa)
    for bits in (1.58, 4, 8):
        for dim in (0, 1):
            w = round_to_nearest(torch.randn(512, 512), bits=bits, group_size=128, group_dim=dim)
            for dtype in (torch.float32, torch.bfloat16):
                for rows in (1, 40):
                    g = torch.randn(rows, 512).to(dtype)
                    def call():
                        torch.ops.pyrobust.packed_linear_transpose(
                            g, w.codes, w.scale, w.zero, 512, bits, 128, dim
                        )
                    for _ in range(2):  # scratch, threads
                        call()
                    seen = counted(lambda: [call() for _ in range(4)], 1024)
                    size = 4 * rows * 512 * g.element_size()
                    if (seen["requests"], seen["bytes"]) != (4, size):
                        wrong.append([isa, bits, dim, str(dtype), rows, seen])
print(json.dumps(wrong))
"""


def test_the_gradient_to_the_input_allocates_its_result_and_nothing_else(measure):
    assert measure(GRADIENTS) == []


BOUNDS = """
torch.set_num_threads(2)
found = {}
for isa in _native.supported_isas():
    _native.set_isa(isa)
    def linear(rows, inputs, outputs):
        w, low = torch.randn(outputs, inputs), torch.rand(rows, inputs)
        high = low + 0.01
        return lambda: ops.interval_linear(low, high, w)
    def convolution(images, size):
        w, low = torch.randn(32, 32, 3, 3), torch.rand(images, 32, size, size)
        high = low + 0.01
        return lambda: ops.interval_conv2d(low, high, w, padding=1)
    calls = [linear(128, 512, 256), convolution(8, 16), convolution(2, 33)]
    for call in calls:
        call()
    seen = [counted(call, 2**16) for call in calls]
    many = [linear(128, 256 * k, 128 * k) for k in range(1, 9)]
    kept = counted(lambda: [call() for call in many] and None, 2**16)
    found[isa] = {"requests": [one["requests"] for one in seen], "kept": kept["live"]}
print(json.dumps(found))
"""


def test_bounds_take_their_memory_from_what_calls_before_left(measure):
    for isa, seen in measure(BOUNDS).items():
        assert seen["requests"] == [0, 0, 0], isa
        assert seen["kept"] <= 32 * 2**20, isa


LOADING = """
def network():
    return torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(16)])

path = sys.argv[1]
pyrobust.save(pyrobust.pack(network(), bits=8, group_size=128), path)
with torch.device("meta"):
    model = network()
loading = counted(lambda: pyrobust.load(path, model))
x = torch.randn(1, 1024)
with torch.no_grad():
    first = counted(lambda: model(x))
    before = _native.panel_memory()
    model(x)
    after = _native.panel_memory()
    again = counted(lambda: pyrobust.save(model, path + ".again"))
same = open(path, "rb").read() == open(path + ".again", "rb").read()
layer = sum(tensor.nbytes for tensor in model[0].state_dict().values())
print(json.dumps({"loading": loading, "first": first["live"], "panels": [before, after],
                  "saving": again["peak"], "same": same, "layer": layer}))
"""


def test_loading_holds_one_copy_of_the_weights_and_files_are_canonical(measure, tmp_path):
    seen = measure(LOADING, tmp_path / "model.safetensors")
    whole = 16 * seen["layer"]
    assert whole <= seen["loading"]["live"] < whole + seen["layer"]
    assert seen["loading"]["peak"] < whole + 3 * seen["layer"]
    assert seen["panels"][0] == 0  # none before the second product
    assert seen["first"] < 4 * seen["layer"]
    # Saving after panels exist writes the canonical layout, and copies no more than a layer.
    assert seen["same"]
    assert seen["saving"] < 3 * seen["layer"]
