"""The GPU's packed product, its very source, on the CPU: against float64 and the portable path."""

import weakref
from dataclasses import dataclass

import pytest
import torch

from pyrobust.ops import _cuda_matmul as gpu
from pyrobust.ops import (
    _cuda_module,
    complex_2bit_matmul,
    complex_2bit_sums,
    pack_codes,
    packed_linear,
)
from pyrobust.ops._cuda_complex import complex_sums
from pyrobust.ops._cuda_module import FLOAT_CODES
from pyrobust.ops.complex_matmul import complex_results
from pyrobust.quantize import BITS, QTensor

shim = pytest.importorskip("pyrobust._cuda_shim", reason="not built (PYROBUST_CUDA_SHIM=ON)")

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
HALVES = (torch.float16, torch.bfloat16)
EVERY_WIDTH = pytest.mark.parametrize("bits", BITS)
BOTH_TYPES = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The emulation in place of ``pyrobust._cuda``; sets the number of multiprocessors."""
    shim.set_options()
    shim.take_counters()
    monkeypatch.setattr(_cuda_module, "_load", lambda: shim)

    def set_multiprocessors(count):
        monkeypatch.setattr(gpu, "multiprocessors", lambda _: count)

    yield set_multiprocessors
    shim.set_options()


@dataclass(frozen=True)
class Drawn:
    """A random weight, and what the two sides of a comparison need of it."""

    packed: QTensor
    device: gpu.GpuWeight
    zeros: torch.Tensor  # scale * zero of every weight

    def reference(self, x, bias=None):
        """The product in float64, and the sum of magnitudes that errors are relative to."""
        weight = self.packed.dequantize().double()
        product = x.double() @ weight.T
        size = weight.abs()
        plain = self.packed.extras is None or self.packed.extras.codebook is None
        if x.dtype == torch.float16 and self.packed.group_dim == 1 and plain:
            size = size + 2 * self.zeros.double().abs()
        size = x.double().abs() @ size.T
        return (product, size) if bias is None else (product + bias, size + bias.abs())


def weigh(packed, zeros=None):
    parts = gpu.Parts(
        packed.codes, packed.scale, packed.zero, packed.shape[1], packed.bits,
        packed.group_size, packed.group_dim, packed.extras or gpu.NO_EXTRAS,
    )  # fmt: skip
    zeros = torch.zeros(packed.shape) if zeros is None else zeros
    return Drawn(packed, gpu.GpuWeight.of(parts), zeros)


def draw(rows, cols, bits, group_size=32, group_dim=1, parts=(), scale=None, codes=None):
    """A weight with zero-points where it may have them, and the optional ``parts``."""
    codes = torch.randint(0, LEVELS[bits], (rows, cols)).byte() if codes is None else codes
    codebook = torch.randint(0, 256, (LEVELS[bits],)).byte() if "codebook" in parts else None
    if codebook is not None and "remainder" in parts:
        codebook[-1] = 128  # kept places need a code for 0
    grouped = (rows, -(-cols // group_size)) if group_dim == 1 else (-(-rows // group_size), cols)
    zero, row_scale = None, None
    if "zero" in parts:
        zero = torch.randint(0, min(129, LEVELS[bits]), grouped).byte()
    if scale is None:
        scale = (torch.rand(grouped) + 0.1).half()
    if "two_level" in parts:
        reach = 255 if codebook is not None else max(1, LEVELS[bits] - 1)
        scale = torch.randint(0, min(255, 511 // reach) + 1, grouped).byte()
        row_scale = torch.rand(rows) / 8
    form = {"bits": bits, "group_size": group_size, "group_dim": group_dim}
    form |= {"row_scale": row_scale, "codebook": codebook}
    packed = QTensor.from_codes(codes, scale, zero, **form)
    zeros = -QTensor.from_codes(torch.zeros_like(codes), scale, zero, **form).dequantize()
    if "remainder" in parts and (bits != 1 or codebook is not None):  # one bit has no 0
        largest = packed.dequantize().abs().max()
        values = largest * (1 + torch.rand(rows, cols)) * torch.randn(rows, cols).sign()
        packed = packed.with_remainder(values, torch.rand(rows, cols) < 0.03)
    return weigh(packed, zeros)


def bound(drawn, size, dtype):
    """What csrc/matmul/cuda.h promises; ROUNDING of a type is half of its spacing."""
    cols = drawn.packed.shape[1]
    relative = (cols + 64) * 2.0**-22 + 2.0**-22
    if drawn.packed.group_dim == 0:
        relative += 2 * ROUNDING[dtype]
    elif drawn.device.fused[dtype] is None:  # decoded to the type of x
        relative += ROUNDING[dtype]
    return size * relative * (1 + ROUNDING[dtype]) + 2.0**-20


def check(drawn, x, bias=None):
    exact, size = drawn.reference(x, bias)
    result = gpu.linear(drawn.device, x, bias)
    assert result.dtype == x.dtype
    allowed = bound(drawn, size, x.dtype) + ROUNDING[x.dtype] * exact.abs()
    excess = (result.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"{excess.max()} above the bound"
    assert shim.take_counters()["matrix_conflicts"] == 0
    return result


@EVERY_WIDTH
@BOTH_TYPES
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_every_width(bits, dtype, descending):
    shim.set_options(descending=descending)
    parts = ("zero",) if bits not in (1, 1.58) else ()
    drawn = draw(130, 200, bits, parts=parts)
    check(drawn, torch.randn(5, 200).to(dtype), torch.randn(130))


@EVERY_WIDTH
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("count", [3, 16, 20, 50])
def test_thread_blocks_share_a_tile_with_and_without_clusters(
    bits, descending, count, monkeypatch, emulated
):
    """The same sums in the same order, whether through shared or through global memory."""
    shim.set_options(descending=descending)
    emulated(16)
    monkeypatch.setattr(gpu, "warpgroups", lambda _: False)  # they need clusters
    drawn, x = draw(300, 3136, bits, 64), torch.randn(count, 3136).half()
    assert drawn.device.fused_for(torch.float16) is not None
    in_clusters = check(drawn, x, torch.randn(300).fill_(0.5))
    monkeypatch.setattr(gpu, "clusters", lambda _: False)
    alone = weigh(drawn.packed, drawn.zeros)
    native = alone.device.fused_for(torch.float16).native
    assert native.workspace(count, FLOAT_CODES[torch.float16], False)[0] > 0
    assert torch.equal(check(alone, x, torch.full((300,), 0.5)), in_clusters)


@pytest.mark.parametrize("group_dim", [1, 0])
@pytest.mark.parametrize("group_size", [32, 64, 128, 192, 10_000], ids=lambda g: f"group{g}")
@pytest.mark.parametrize("parts", [(), ("zero",)], ids=["symmetric", "zero"])
def test_groups_of_every_size_and_direction(group_dim, group_size, parts):
    shape = (70, 300) if group_dim == 1 else (330, 72)
    drawn = draw(*shape, 4, group_size, group_dim, parts)
    for dtype in HALVES:
        check(drawn, torch.randn(3, shape[1]).to(dtype))
        assert drawn.device.fused[dtype] is not None


@EVERY_WIDTH
@BOTH_TYPES
def test_groups_along_output_features_at_every_width(bits, dtype):
    parts = ("zero",) if bits not in (1, 1.58) else ()
    check(draw(100, 136, bits, 32, 0, parts), torch.randn(9, 136).to(dtype))


@pytest.mark.parametrize(
    "parts",
    ["codebook", "remainder", "two_level", "codebook+remainder+two_level", "codebook+zero"],
)
@pytest.mark.parametrize("bits", [1, 1.58, 3, 4])
def test_optional_parts(parts, bits):
    drawn = draw(70, 130, bits, 64, 1, parts.split("+"))
    for dtype in HALVES:
        check(drawn, torch.randn(4, 130).to(dtype), torch.randn(70))


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_every_number_of_rows(count, bits):
    drawn = draw(70, 72, bits, 64, 1, ("zero",))
    compare = check if count <= gpu.FUSED_ROWS[bits] else check_rounded
    compare(drawn, torch.randn(count, 72).half(), torch.randn(70))


@EVERY_WIDTH
@BOTH_TYPES
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("group_size", [128, 10_000], ids=lambda g: f"group{g}")
def test_products_of_warpgroups(bits, dtype, descending, group_size, emulated):
    """An odd number of blocks of columns, strips past the end, two thread blocks a tile."""
    shim.set_options(descending=descending)
    emulated(16)
    parts = ("zero", "remainder") if bits not in (1, 1.58) else ()
    drawn = draw(200, 712, bits, group_size, 1, parts)
    check(drawn, torch.randn(50, 712).to(dtype), torch.randn(200))


def check_rounded(drawn, x, bias=None):
    """Many rows of x in one launch: each weight is rounded once to their type."""
    exact, size = drawn.reference(x, bias)
    native = drawn.device.fused_for(x.dtype).native
    assert native.takes_many_rows(FLOAT_CODES[x.dtype])
    result = gpu.linear(drawn.device, x, bias)
    assert shim.take_counters()["matrix_products"] > 0
    rounded = ROUNDING[x.dtype] * (1 + 2.0**-8)
    allowed = bound(drawn, size, x.dtype) + size * rounded + ROUNDING[x.dtype] * exact.abs()
    excess = (result.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"{excess.max()} above the bound"
    return result


@EVERY_WIDTH
@BOTH_TYPES
@pytest.mark.parametrize("group_size", [64, 192, 10_000], ids=lambda g: f"group{g}")
def test_many_rows_in_one_launch(bits, dtype, group_size, emulated):
    """Strips past the end, two thread blocks a tile, and two or one tiles of rows of x."""
    count = 150 if group_size == 64 else 129
    shim.set_options(descending=group_size == 64)
    emulated(2 if group_size == 192 else 16)
    parts = ("zero", "remainder") if bits not in (1, 1.58) else ()
    drawn = draw(100, 456, bits, group_size, 1, parts)
    check_rounded(drawn, torch.randn(count, 456).to(dtype), torch.randn(100))


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_type_are_rounded_once_with_their_weights(scale_type):
    scale = (torch.rand(70, 3) + 0.1).to(scale_type)
    drawn, x = draw(70, 300, 8, 128, 1, ("zero",), scale), torch.randn(140, 300)
    check_rounded(drawn, x.bfloat16())
    native = drawn.device.fused_for(torch.float16).native
    assert native.takes_many_rows(FLOAT_CODES[torch.float16]) == (scale_type == torch.float16)


def test_many_rows_do_not_depend_on_their_number():
    drawn, x = draw(300, 450, 4, 64, 1, ("zero",)), torch.randn(256, 450).half()
    whole = check_rounded(drawn, x)
    for count in (129, 200):
        assert torch.equal(gpu.linear(drawn.device, x[:count], None), whole[:count])


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_type(scale_type):
    scale = (torch.randint(1, 64, (70, 3)) / 64).to(scale_type)
    drawn = draw(70, 300, 4, 128, 1, ("zero",), scale)
    for count in (3, 40):
        check(drawn, torch.randn(count, 300).half())


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (257, 9), (64, 64), (63, 65), (513, 129)])
def test_sizes_that_do_not_divide(shape):
    drawn = draw(*shape, 4, 64, 1, ("zero", "remainder"))
    check(drawn, torch.randn(2, shape[1]).bfloat16())


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 40])
def test_split_sums_meet_again(multiprocessors, emulated):
    """One or two thread blocks a tile."""
    emulated(multiprocessors)
    drawn = draw(300, 577, 2, 64, 1)
    check(drawn, torch.randn(3, 577).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY_WIDTH
def test_small_integers_are_exact(bits, dtype):
    """Integers times powers of two: no order of summation and no path may round."""
    grouped = (70, 5)
    scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, grouped)].half()
    drawn = draw(70, 160, bits, 32, 1, () if bits in (1, 1.58) else ("zero",), scale)
    x = torch.randint(-2, 3, (6, 160)).to(dtype)
    fused = drawn.device.fused_for(dtype)
    result = gpu._fused_linear(drawn.device, fused, x, None, torch.float32)
    assert torch.equal(result.double(), drawn.reference(x)[0])


def test_a_row_does_not_depend_on_the_batch_or_on_chance():
    drawn = draw(300, 450, 4, 64, 1, ("zero",))
    x = torch.randn(64, 450).half()
    whole = gpu.linear(drawn.device, x, None)
    for most, counts in ((16, (1, 8, 13)), (32, (17, 30)), (64, (33, 50))):
        together = gpu.linear(drawn.device, x[:most], None)
        for count in counts:
            assert torch.equal(gpu.linear(drawn.device, x[:count], None), together[:count])
    shim.set_options(descending=True)
    assert torch.equal(gpu.linear(drawn.device, x, None), whole)


def test_tensor_cores_that_truncate_stay_within_the_bound():
    shim.set_options(truncating=True)
    drawn = draw(64, 320, 4, 128, 1, ("zero",))
    check(drawn, torch.randn(2, 320).exp().bfloat16())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("truncating", [False, True])
def test_codes_that_stand_for_zero_cost_no_more_than_the_bound(bits, truncating):
    """Multiplied as they are, with their zeros subtracted from the sums: nothing is left."""
    shim.set_options(truncating=truncating)
    codes = torch.full((64, 320), LEVELS[bits] // 2, dtype=torch.uint8)
    drawn = draw(64, 320, bits, 128, codes=codes)
    assert not drawn.packed.dequantize().any()
    check(drawn, torch.randn(9, 320).exp().half())


def test_rows_of_x_that_are_not_finite_reach_no_other_row():
    drawn, x = draw(64, 320, 4, 64), torch.randn(16, 320).half()
    expected = gpu.linear(drawn.device, x, None)
    x[3, 7], x[11, 300] = float("inf"), float("nan")
    found = gpu.linear(drawn.device, x, None)
    others = [row for row in range(16) if row not in (3, 11)]
    assert not found[[3, 11]].isfinite().any()
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize(
    ("group_dim", "group_size", "count"), [(1, 64, 3), (0, 64, 3), (1, 128, 30)]
)
def test_float32_activations(group_dim, group_size, count):
    """Two bfloat16 terms: 2^-16; groups along output features are multiplied decoded."""
    drawn = draw(72, 140, 4, group_size, group_dim, ("zero", "remainder"))
    x, bias = torch.randn(count, 140), torch.randn(72)
    exact, size = drawn.reference(x, bias)
    result = gpu.linear(drawn.device, x, bias)
    assert ((result.double() - exact).abs() <= size * (2.0**-16 + 210 * 2.0**-22)).all()
    infinite = torch.full((1, 140), float("inf"))
    assert not gpu.linear(drawn.device, infinite, None).isfinite().any()


@pytest.mark.parametrize("group_size", [48, 33])
def test_groups_that_no_block_holds_are_multiplied_decoded(group_size):
    drawn = draw(70, 100, 4, group_size)
    check(drawn, torch.randn(3, 100).half())
    assert drawn.device.fused[torch.float16] is None


def test_many_rows_are_multiplied_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(gpu, "_PIECE_BYTES", 64 * 100 * 2)
    monkeypatch.setattr(gpu, "_TILE", 1)
    drawn = draw(200, 100, 4, 32, 1, ("zero", "remainder"))
    x, bias = torch.randn(gpu.ROUNDED_ROWS + 1, 100), torch.randn(200)
    for dtype in (torch.float32, *HALVES):
        exact, size = drawn.reference(x.to(dtype), bias)
        result = gpu.linear(drawn.device, x.to(dtype), bias)
        assert ((result.double() - exact).abs() <= size * 4 * ROUNDING[dtype] + 1e-3).all()
    assert shim.take_counters()["matrix_products"] == 0


@EVERY_WIDTH
@pytest.mark.parametrize("group_dim", [1, 0])
@pytest.mark.parametrize("parts", ["", "remainder+two_level", "codebook"])
def test_the_decoded_weight_is_exact(bits, group_dim, parts):
    if bits == 8 and "codebook" in parts:
        pytest.skip("8 bits take no codebook")
    drawn = draw(40, 77, bits, 24, group_dim, parts.split("+"))
    weight = drawn.packed.dequantize()
    assert torch.equal(gpu.dequantize(drawn.device, 0, 40, torch.float32), weight)
    assert torch.equal(gpu.dequantize(drawn.device, 7, 31, torch.bfloat16), weight[7:31].bfloat16())
    plain = draw(40, 96, bits, 24, group_dim, ("zero",) if bits not in (1, 1.58) else ())
    for dtype in (*HALVES, torch.float32):  # rows that a kernel of their own decodes
        found = gpu.dequantize(plain.device, 3, 38, dtype)
        assert torch.equal(found, plain.packed.dequantize()[3:38].to(dtype))
    indices = torch.tensor([39, 0, 7, 7])
    assert torch.equal(gpu.dequantize(drawn.device, 0, 4, torch.float16, indices),
                       weight[indices].half())  # fmt: skip


@EVERY_WIDTH
@pytest.mark.parametrize("group_dim", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations_have_the_bits_of_the_cpu(bits, group_dim, dtype):
    drawn = draw(30, 100, bits, 24, group_dim, ("remainder", "two_level"))
    x, bias = torch.randn(5, 100).to(dtype), torch.randn(30)
    x[1], x[2, 3] = 0, float("nan")
    packed = drawn.packed
    expected = packed_linear(
        x, packed.codes, packed.scale, packed.zero, bias, in_features=100, bits=bits,
        group_size=24, group_dim=group_dim, activations="int8", extras=packed.extras,
    )  # fmt: skip
    assert torch.equal(gpu.linear_int8(drawn.device, x, bias).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("count", [1, 5, 8, 17])
@pytest.mark.parametrize("shape", [(70, 130), (300, 256), (1, 1)])
def test_complex_sums_are_those_of_the_cpu(count, shape):
    codes = pack_codes(torch.randint(0, 4, shape, dtype=torch.uint8), bits=2)
    real, imag = (torch.randint(-128, 128, (count, shape[1]), dtype=torch.int8) for _ in range(2))
    sums = complex_sums(real, imag, codes, shape[1])
    assert torch.equal(sums, complex_2bit_sums(real, imag, codes, in_features=shape[1]))
    assert shim.take_counters()["matrix_conflicts"] == 0


def test_complex_results_are_those_of_the_cpu():
    shape = (40, 70)
    codes = pack_codes(torch.randint(0, 4, shape, dtype=torch.uint8), bits=2)
    real, imag = (torch.randint(-128, 128, (3, 70), dtype=torch.int8) for _ in range(2))
    scales, steps = torch.rand(2), torch.rand(2, 3)
    expected = complex_2bit_matmul(real, imag, codes, scales, *steps, in_features=70)
    found = complex_results(complex_sums(real, imag, codes, 70), scales, *steps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_complex_sums_at_their_extremes():
    codes = pack_codes(torch.zeros(1, 131072, dtype=torch.uint8), bits=2)
    x = torch.full((1, 131072), -128, dtype=torch.int8)
    sums = complex_sums(x, x, codes, 131072)
    assert sums.flatten().tolist() == [-128 * 131072, 0, 0, 128 * 131072]
    with pytest.raises(ValueError, match=r"2\*\*17"):
        complex_sums(x, x, codes, 131073)


def derived(packed):
    return gpu.gpu_weight(
        packed.codes, packed.scale, packed.zero, packed.shape[1], packed.bits,
        packed.group_size, packed.group_dim, *packed.extras,
    )  # fmt: skip


def test_derived_weights_are_made_once_and_forgotten_with_the_codes():
    packed = draw(70, 72, 4, 64, 1, ("zero",)).packed
    first = derived(packed)
    assert derived(packed) is first
    x = torch.randn(2, 72).half()
    before = gpu.product(first, x, None, False)
    packed.scale.mul_(2)
    second = derived(packed)
    assert second is not first
    assert torch.equal(gpu.product(second, x, None, False), 2 * before)
    key = weakref.ref(packed.codes)
    del packed, first, second
    assert key() is None


def test_parts_on_two_devices_are_refused():
    packed = draw(70, 72, 4, 64).packed
    with pytest.raises(ValueError, match="must be on one device; got cpu and meta"):
        gpu.gpu_weight(packed.codes, packed.scale.to("meta"), None, 72, 4, 64, 1)
    with pytest.raises(ValueError, match="x must be on the device of the weight, cpu; got meta"):
        gpu.product(derived(packed), torch.zeros(1, 72, device="meta"), None, False)


@pytest.mark.parametrize("int8", [False, True])
def test_rows_of_the_weight(int8):
    weight = draw(70, 72, 4, 32, 0, ("zero",)).device
    x, bias = torch.randn(2, 3, 72), torch.randn(70)
    whole = gpu.product(weight, x, bias, int8)
    assert whole.shape == (2, 3, 70)
    part = gpu.product(weight, x, bias, int8, slice(5, 25))
    torch.testing.assert_close(part, whole[..., 5:25], rtol=1e-5, atol=1e-5)


def test_a_missing_wait_shows():
    """The same kernel, planted with one group of copies too many under way."""
    drawn = draw(64, 1024, 4, 64)
    x = torch.randn(4, 1024).half()
    expected = check(drawn, x)
    native = drawn.device.fused_for(torch.float16).native
    out = torch.zeros_like(expected)
    sizes = native.workspace(4, FLOAT_CODES[torch.float16], False)
    partials, arrivals = gpu.workspace(sizes, x)
    shim.linear_4_late(native, x.data_ptr(), 4, out.data_ptr(), gpu.address(partials),
                       gpu.address(arrivals), 1)  # fmt: skip
    assert not torch.equal(out, expected)
    shim.linear_4_late(native, x.data_ptr(), 4, out.data_ptr(), gpu.address(partials),
                       gpu.address(arrivals), 0)  # fmt: skip
    assert torch.equal(out, expected)


def assert_a_missing_wait_shows(multiply_late, drawn, x, expected):
    """``multiply_late(native, x, rows, out, late)`` is right in time, and wrong or told so late."""
    native = drawn.device.fused_for(torch.float16).native
    out = torch.zeros_like(expected)
    multiply_late(native, x.data_ptr(), len(x), out.data_ptr(), 0)
    assert torch.equal(out, expected)
    try:
        multiply_late(native, x.data_ptr(), len(x), out.data_ptr(), 1)
        fault = ""
    except RuntimeError as error:  # what lands meets a product under way, in one order of threads
        fault = str(error)
    assert "that no fence has shown to it" in fault or not torch.equal(out, expected)


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_a_missing_wait_shows_with_many_rows(descending):
    shim.set_options(descending=descending)
    drawn = draw(64, 1024, 4, 128)
    x = torch.randn(130, 1024).half()
    assert_a_missing_wait_shows(shim.broad_4_late, drawn, x, check_rounded(drawn, x))


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_a_missing_wait_shows_with_warpgroups(descending):
    shim.set_options(descending=descending)
    drawn = draw(64, 2048, 4, 128)
    x = torch.randn(40, 2048).half()
    assert_a_missing_wait_shows(shim.wide_4_late, drawn, x, check(drawn, x))
