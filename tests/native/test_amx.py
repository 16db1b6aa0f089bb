"""The AMX kernels: their source on emulated tiles everywhere, the real ones where AMX is.

On a processor with AMX: ``PYROBUST_ISA=amx python -m pytest tests/native/test_amx.py -rs``.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyrobust import _native
from pyrobust.quantize import BITS, QTensor

from .. import packed_products

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
LEAST_ROWS = 16  # kLeastTileRows of csrc/matmul/kernels.h
BLOCK_ROWS = 256  # kMaxBlockRows
BATCHES = (1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 200)
# rows, cols, group_size: whole rows; halves of a block, with tails; one and a half blocks; one
# block; two; groups longer than a panel; a last group of one column
SHAPES = [
    (6, 150, 150),
    (33, 200, 32),
    (40, 95, 32),
    (9, 400, 96),
    (70, 650, 64),
    (32, 1100, 128),
    (3, 1300, 640),
    (5, 129, 128),
]
AMX = "amx" in _native.supported_isas()
OBJECTS = sorted((Path(__file__).resolve().parents[2] / "build").rglob("csrc/matmul/amx.cpp.o"))
PRODUCTS = {name: getattr(_native, name) for name in ("packed_linear", "eager_linear")}


def load_shim():
    """The module with emulated tiles; the rest of the kernel needs AVX-512."""
    shim = pytest.importorskip("pyrobust._amx_shim", reason="not built (PYROBUST_AMX_SHIM=ON)")
    if "avx512" not in _native.supported_isas():
        pytest.skip("no AVX-512 here, which the AMX kernels need besides their tiles")
    return shim


def install(products):
    """Lets packed_linear call these functions in place of those of ``_native``; returns those."""
    before = {name: getattr(_native, name) for name in PRODUCTS}
    for name, function in products.items():
        setattr(_native, name, function)
    return before


@pytest.fixture(params=["emulated", "processor"])
def amx(request):
    """Sends products through emulated tiles (returns their module) or real ones (None)."""
    before = _native.isa()
    if request.param == "emulated":
        shim = load_shim()
        installed = install({name: getattr(shim, name) for name in PRODUCTS})
        shim.take_counters()
        yield shim
        install(installed)
        return
    if not AMX:
        pytest.skip("no AMX here: run this file on a processor that has it")
    _native.set_isa("amx")
    yield None
    _native.set_isa(before)


def draw(high, shape, generator=None):
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=generator)


def random_weight(rows, cols, bits, group_size, *, kind="zeros", generator=None):
    """Kinds: zeros, symmetric, codebook, remainder, and two-level scales, of which some are too
    large to be folded into bytes (two_level) or none (folded); the last three have zeros."""
    grouped, options = (rows, -(-cols // group_size)), {}
    zero = None
    if kind not in ("symmetric", "codebook") and bits not in (1, 1.58):
        zero = draw(LEVELS[bits], grouped, generator)
    scale = (torch.rand(grouped, generator=generator) + 0.1).half()
    if kind == "codebook":
        options["codebook"] = draw(256, (LEVELS[bits],), generator)
    if kind in ("two_level", "folded"):
        most = 511 if kind == "two_level" else 255
        scale = draw(most // max(1, LEVELS[bits] - 1) % 256 + 1, grouped, generator)
        options["row_scale"] = torch.rand(rows, generator=generator) / 8
    codes = draw(LEVELS[bits], (rows, cols), generator)
    packed = QTensor.from_codes(codes, scale, zero, bits=bits, group_size=group_size, **options)
    if kind != "remainder":
        return packed
    values = packed.dequantize().abs().max() * (1 + torch.rand(rows, cols))
    return packed.with_remainder(values, torch.rand(rows, cols) < 0.05)


def multiply(x, packed, bias=None, activations="int8"):
    return packed_products.multiply(x, packed, bias, activations=activations)


def on_portable(x, packed, bias=None):
    """The reference, whatever the fixture has put in place."""
    before, installed = _native.isa(), install(PRODUCTS)
    _native.set_isa("portable")
    try:
        return multiply(x, packed, bias)
    finally:
        install(installed)
        _native.set_isa(before)


def tile_products(batch, rows, cols, group_size):
    """How many the kernel makes: two a step for each tile of x and each 32 rows of W."""
    step = 64 if group_size >= cols or group_size % 64 == 0 else 32
    blocks = [min(BLOCK_ROWS, batch - first) for first in range(0, batch, BLOCK_ROWS)]
    tiles = sum(-(-block // 16) for block in blocks if block >= LEAST_ROWS)
    return 2 * tiles * -(-rows // 32) * -(-cols // step)


def check_batches(shim, packed, batches=BATCHES, dtype=torch.float32):
    rows, cols = packed.shape
    x, bias = torch.randn(max(batches), cols).to(dtype), torch.randn(rows)
    expected = on_portable(x, packed, bias)
    for batch in batches:
        assert torch.equal(multiply(x[:batch], packed, bias), expected[:batch])
        if shim is None:
            continue
        seen = shim.take_counters()
        assert seen["products"] == tile_products(batch, rows, cols, packed.group_size)
        assert seen["configurations"] == seen["releases"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["zeros", "symmetric"])
def test_every_width_and_batch_has_the_bits_of_portable(amx, bits, shape, kind):
    rows, cols, group_size = shape
    check_batches(amx, random_weight(rows, cols, bits, group_size, kind=kind))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(40, 95, 32), (34, 320, 64)], ids=str)
@pytest.mark.parametrize("kind", ["codebook", "two_level", "folded", "remainder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_of_a_weight_and_types_of_x(amx, bits, shape, kind, dtype):
    if bits == 8 and kind == "codebook":
        pytest.skip("8 bits take no codebook")
    rows, cols, group_size = shape
    packed = random_weight(rows, cols, bits, group_size, kind=kind)
    if kind != "remainder":
        check_batches(amx, packed, (16, 33), dtype)
        return
    x = torch.randn(33, cols).to(dtype)  # rows of W come in runs of 64 then
    assert torch.equal(multiply(x, packed), on_portable(x, packed))


@pytest.mark.parametrize("bits", [1.58, 2, 3, 4])
@pytest.mark.parametrize("shape", [(40, 95, 32), (70, 576, 96), (34, 1280, 128)], ids=str)
def test_scales_folded_into_bytes(amx, bits, shape):
    """Panels of fewer than 512 columns, and groups that end within a block."""
    rows, cols, group_size = shape
    check_batches(amx, random_weight(rows, cols, bits, group_size, kind="folded"), (16, 33, 49))


def test_blocks_of_x_that_are_too_short_for_tiles(amx):
    for batch in (BLOCK_ROWS, BLOCK_ROWS + 3, BLOCK_ROWS + 16):
        check_batches(amx, random_weight(35, 70, 4, 32), (batch,))


def test_largest_sums(amx):
    """255 times -127 in every place of the longest run."""
    cols = 65_536
    codes = torch.full((2, cols), 255, dtype=torch.uint8)
    zero = torch.zeros(2, 1, dtype=torch.uint8)
    packed = QTensor.from_codes(codes, torch.ones(2, 1), zero, bits=8, group_size=cols)
    x = torch.full((16, cols), -1.0)
    assert torch.equal(multiply(x, packed), torch.full((16, 2), -255.0 * cols))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_rows_of_x_without_a_step(amx, value):
    packed, x = random_weight(33, 128, 4, 64), torch.randn(17, 128)
    x[3] = value
    assert torch.equal(multiply(x, packed).nan_to_num(7.0), on_portable(x, packed).nan_to_num(7.0))


def test_what_takes_no_tiles(amx):
    """Floats with groups of half blocks, groups along outputs or of no 32 columns, few rows."""
    x, plain = torch.randn(20, 130), random_weight(5, 130, 4, 64)
    crosswise = QTensor.from_codes(
        draw(16, (5, 130)), (torch.rand(3, 130) + 0.1).half(), bits=4, group_size=2, group_dim=0
    )
    before = _native.isa()
    calls = [
        (x, random_weight(5, 130, 4, 32), None),
        (x[: LEAST_ROWS - 1], plain, None),
        (x, crosswise, None),
        (x, crosswise, "int8"),
        (x, random_weight(5, 130, 4, 13), "int8"),
        (x[: LEAST_ROWS - 1], plain, "int8"),
        (x[:, :0], random_weight(5, 0, 4, 64), "int8"),
    ]
    results = [multiply(rows, packed, activations=mode) for rows, packed, mode in calls]
    if amx is not None:
        assert amx.take_counters()["products"] == 0
        install(PRODUCTS)
    _native.set_isa("avx512")
    try:
        for result, (rows, packed, mode) in zip(results, calls, strict=True):
            assert torch.equal(result, multiply(rows, packed, activations=mode))
    finally:
        _native.set_isa(before)


def on_avx512(x, packed, bias=None):
    """The reference of float activations in parts, whatever the fixture has put in place."""
    before, installed = _native.isa(), install(PRODUCTS)
    _native.set_isa("avx512")
    try:
        return multiply(x, packed, bias, activations=None)
    finally:
        install(installed)
        _native.set_isa(before)


def float_rows(batch, cols, kind):
    """Rows of x that are multiplied in two, three, or three and four parts."""
    x = torch.randn(batch, cols)
    if kind == "three parts":
        return (x * 1e4).round()
    if kind == "three and four parts":
        x[batch // 3 : batch // 2, ::64] *= 300.0
    return x.bfloat16() if kind == "two parts" else x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] % 64 == 0 or s[2] >= s[1]], ids=str)
@pytest.mark.parametrize("kind", ["two parts", "three parts", "three and four parts"])
def test_float_activations_have_the_bits_of_avx512(amx, bits, shape, kind):
    cols, group_size = shape[1:]
    rows = shape[0] + 32  # fewer meet float x as it is
    packed = random_weight(rows, cols, bits, group_size, kind="zeros")
    x, bias = float_rows(200, cols, kind), torch.randn(rows)
    expected = on_avx512(x, packed, bias)
    for batch in BATCHES:
        assert torch.equal(multiply(x[:batch], packed, bias, activations=None), expected[:batch])
        if amx is None or kind == "three and four parts":
            continue
        parts = 2 if kind == "two parts" else 3
        assert amx.take_counters()["products"] == parts * tile_products(
            batch, rows, cols, group_size
        )
    if amx is not None:
        seen = amx.take_counters()
        assert seen["configurations"] == seen["releases"]
        assert (seen["products"] > 0) == (kind == "three and four parts")


@pytest.mark.parametrize("extra", ["symmetric", "codebook", "two_level", "remainder"])
@pytest.mark.parametrize("kind", ["two parts", "three parts"])
def test_parts_of_a_weight_with_float_activations(amx, extra, kind):
    packed = random_weight(34, 320, 4, 64, kind=extra)
    x = float_rows(33, 320, kind)
    assert torch.equal(multiply(x, packed, activations=None), on_avx512(x, packed))
    if amx is not None:
        assert amx.take_counters()["products"] > 0


@pytest.mark.parametrize("kind", ["two parts", "three parts"])
def test_largest_sums_of_parts(amx, kind):
    """Digits of -127 or 127 and one of -128 against codes of 255, in the longest run."""
    cols = 65_536
    codes = torch.full((2, cols), 255, dtype=torch.uint8)
    zero = torch.zeros(2, 1, dtype=torch.uint8)
    packed = QTensor.from_codes(codes, torch.ones(2, 1), zero, bits=8, group_size=cols)
    x = torch.full((16, cols), -0x808080 * 2.0**-31)
    x[:, 0] = 8_355_711 * 2.0**-23
    x = x.bfloat16() if kind == "two parts" else x
    assert torch.equal(multiply(x, packed, activations=None), on_avx512(x, packed))


def test_threads_change_no_bit(amx):
    packed, x = random_weight(515, 2048, 4, 128), torch.randn(33, 2048)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_shapes(amx, data):
    rows, cols = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 700))
    group_size = data.draw(st.sampled_from([32, 64, 96, 128, 160, 192, 544, 1000]))
    kind = data.draw(st.sampled_from(["zeros", "symmetric", "two_level", "folded"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    bits = data.draw(st.sampled_from(BITS))
    packed = random_weight(rows, cols, bits, group_size, kind=kind, generator=generator)
    x = torch.randn(data.draw(st.integers(16, 70)), cols, generator=generator)
    assert torch.equal(multiply(x, packed), on_portable(x, packed))


def test_emulated_product():
    shim = load_shim()
    left = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    right, sums = draw(256, (16, 16, 4)), torch.randint(-1000, 1000, (16, 16), dtype=torch.int32)
    columns = right.permute(0, 2, 1).reshape(64, 16)  # [k / 4][n][k % 4] -> [k][n]
    expected = sums + (left.long() @ columns.long()).int()
    shim.tile_product(left, right, sums)
    assert torch.equal(sums, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("palette", "#GP, the palette"),
        ("reserved", "#GP, a reserved byte"),
        ("ninth", "#GP, a tile past the eighth"),
        ("rows", "#GP, more than 16 rows"),
        ("row_bytes", "#GP, rows of more than 64 bytes"),
        ("no_bytes", "#GP, rows without bytes"),
        ("not_configured", "#UD, no configuration"),
        ("released", "#UD, no configuration"),
        ("no_rows", "#UD, the tile has no rows"),
        ("not_written", "read before it is written"),
        ("sum_rows", "#UD, rows of the sum"),
        ("sum_columns", "#UD, columns of sum"),
        ("common_size", "#UD, the operands' common sizes"),
        ("dwords", "#UD, rows are not whole dwords"),
    ],
)
def test_the_emulation_faults_where_the_processor_does(fault, message):
    shim = load_shim()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        shim.tile_fault(fault)


@pytest.mark.skipif(not OBJECTS, reason="no build tree beside the tests")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_real_kernel_is_made_of_tile_instructions():
    run = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(OBJECTS[0])],
        capture_output=True,
        text=True,
        check=True,
    )
    instructions = re.findall(r"^\s*[0-9a-f]+:\s+(\w+)\s*(\S*)", run.stdout, re.MULTILINE)
    names = {name for name, _ in instructions}
    assert {"ldtilecfg", "tilezero", "tileloadd", "tilestored", "tilerelease"} <= names
    operands = {text for name, text in instructions if name == "tdpbsud"}
    # AT&T order: unsigned tile of W, signed tile of x, sums
    assert operands == {
        f"%tmm{6 + t},%tmm{4 + i},%tmm{2 * i + t}" for i in range(2) for t in range(2)
    }
    assert not {name for name in names if name.startswith("tdp")} - {"tdpbsud"}


# A filter that lets no process ask for tile state (arch_prctl with ARCH_REQ_XCOMP_PERM), then what
# this library offers.
REFUSED = """
import ctypes, errno, struct
code = [
    (0x20, 0, 0, 0),            # A = number of the system call
    (0x15, 0, 3, 158),          # arch_prctl
    (0x20, 0, 0, 16),           # A = its first argument
    (0x15, 0, 1, 0x1023),
    (0x06, 0, 0, 0x00050000 | errno.EPERM),
    (0x06, 0, 0, 0x7fff0000),   # allow
]
program = b"".join(struct.pack("HBBI", *each) for each in code)
memory = ctypes.create_string_buffer(program, len(program))
header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
if libc.prctl(22, 2, ctypes.create_string_buffer(header, len(header))) != 0:
    raise SystemExit(77)
assert libc.syscall(158, 0x1023, 18) == -1 and ctypes.get_errno() == errno.EPERM
import pyrobust
print(*pyrobust.info().supported_isas)
"""


@pytest.mark.skipif(not AMX, reason="no AMX here, so that there is nothing to refuse")
def test_amx_is_not_offered_without_permission(monkeypatch):
    monkeypatch.delenv("PYROBUST_ISA", raising=False)
    run = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("filters of system calls are not allowed here")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [name for name in _native.supported_isas() if name != "amx"]
