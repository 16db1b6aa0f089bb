"""The CUDA interval kernels on fibres: sound against float64 and rationals, tight."""

import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust import ops
from pyrobust.ops import _cuda_interval
from pyrobust.ops import _cuda_interval_library as library
from pyrobust.quantize import round_to_nearest

sys.path.insert(0, str(Path(__file__).parent))
from interval_images import boxes, exact_ends

ROUNDINGS = ["real", "deployed", "nearest"]


def check_sound(ends, exact, lower, upper, weight, slack=5e-4):
    """Contains the image, and adds at most ``slack`` of sum |w| max |x|, of which radii that are
    rounded up to bfloat16 take half."""
    largest = torch.maximum(lower.abs(), upper.abs()).double()
    magnitude = largest @ weight.double().abs().T
    noise = 1e-13 * magnitude
    assert (ends[0].double() <= exact[0] + noise).all()
    assert (ends[1].double() >= exact[1] - noise).all()
    assert (exact[0] - ends[0].double() <= slack * magnitude + 1e-30).all()
    assert (ends[1].double() - exact[1] <= slack * magnitude + 1e-30).all()


@pytest.fixture(params=[False, True], ids=["exact-sums", "truncating-sums"])
def tensor_core(request, emulated_cuda):
    """The best and the coarsest tensor core that the literature documents."""
    emulated_cuda.set_options(truncating=request.param)
    return emulated_cuda


@pytest.fixture(params=[2, 3], ids=["neither", "clusters"])
def card(request, monkeypatch):
    """Cards of the emulation that have no products of warpgroups; without this, one that has."""
    for module in (_cuda_interval, library):
        monkeypatch.setattr(module, "where", lambda _: (request.param, 0))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("batch", "rows", "terms"),
    [
        (1, 16, 128), (3, 33, 200), (9, 40, 131), (17, 20, 256), (40, 18, 64), (2, 5, 1),
        (16, 130, 1150), (5, 64, 640), (70, 210, 136),
    ],
)  # fmt: skip
def test_dense_weights(tensor_core, batch, rows, terms, rounding):
    lower, upper = boxes(batch, terms)
    weight, bias = torch.randn(rows, terms), torch.randn(rows)
    for matrix in (weight, weight.bfloat16()):
        ends = _cuda_interval.linear(lower, upper, matrix, bias, rounding)
        exact = exact_ends(lower, upper, matrix, bias)
        if rounding == "nearest":
            magnitude = torch.maximum(lower.abs(), upper.abs()) @ matrix.float().abs().T + 1
            for end, wanted in zip(ends, exact, strict=True):
                assert ((end - wanted).abs() <= 3e-4 * magnitude).all()
        else:
            check_sound(ends, exact, lower, upper, matrix)


@pytest.mark.parametrize(("batch", "rows", "terms"), [(3, 33, 200), (17, 130, 131)])
def test_dense_weights_on_other_cards(tensor_core, card, batch, rows, terms):
    lower, upper = boxes(batch, terms)
    weight, bias = torch.randn(rows, terms), torch.randn(rows)
    for matrix in (weight, weight.bfloat16()):
        ends = _cuda_interval.linear(lower, upper, matrix, bias, "real")
        check_sound(ends, exact_ends(lower, upper, matrix, bias), lower, upper, matrix)


@pytest.mark.parametrize("skipped", [1, 4])
@pytest.mark.parametrize("batch", [3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_begin_between_vectors(emulated_cuda, batch, dtype, skipped):
    """Rows past the end and terms past the end too."""
    rows, terms = 33, 200
    lower, upper = boxes(batch, terms)
    plain = torch.randn(rows, terms).to(dtype)
    weight = torch.cat((torch.zeros(skipped, dtype=dtype), plain.flatten()))[skipped:].view(
        rows, -1
    )
    aligned = weight.data_ptr() % 16 == 0
    assert aligned == (skipped * weight.element_size() % 16 == 0)
    ends = _cuda_interval.linear(lower, upper, weight, None, "real")
    expected = _cuda_interval.linear(lower, upper, plain, None, "real")
    assert all(torch.equal(*pair) for pair in zip(ends, expected, strict=True))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_runs_of_eight_terms_are_those_of_their_places(data):
    order = data.draw(st.sampled_from([1, 2, 3, 4, 8, 16, 32]))
    chunk, i = data.draw(st.integers(0, 15)), data.draw(st.integers(0, 7))
    shim = pytest.importorskip("pyrobust._cuda_shim")
    operand, image = shim.terms_of_run(order, chunk, i)
    assert operand == shim.term_of_place(order, chunk % 4, chunk // 4 * 8 + i)
    _, term = shim.image_place(128, 8, 0, 0, 0, chunk * 8 + i, order)
    assert image == term


def packed(rows, terms, bits, group_size, symmetric=False):
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return round_to_nearest(torch.randn(rows, terms), **options)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "terms", "batch"), [(128, 384, 5), (256, 512, 14), (-1, 256, 20), (128, 256, 66)]
)
def test_packed_weights_are_bounded_exactly(tensor_core, bits, group_size, terms, batch):
    check_packed(bits, group_size, terms, batch)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_weights_on_other_cards(tensor_core, card, bits):
    check_packed(bits, 128, 384, 12)


def check_packed(bits, group_size, terms, batch):
    size = terms if group_size == -1 else group_size
    for symmetric in (False, True):
        weight = packed(21, terms, bits, size, symmetric or bits == 1)
        lower, upper = boxes(batch, terms)
        ends = _cuda_interval.packed_linear(
            lower, upper, weight.codes, weight.scale, weight.zero, None, terms, bits, size,
            False, "real",
        )  # fmt: skip
        matrix = weight.dequantize()
        check_sound(ends, exact_ends(lower, upper, matrix), lower, upper, matrix)


@pytest.mark.parametrize("batch", [3, 18])
def test_the_rounding_of_activations_widens_packed_bounds(emulated_cuda, card, batch):
    weight = packed(8, 128, 4, 128)
    lower, upper = boxes(batch, 128)
    parts = (weight.codes, weight.scale, weight.zero, None, 128, 4, 128)
    ends = _cuda_interval.packed_linear(lower, upper, *parts, True, "real")
    for _ in range(20):
        x = lower + torch.rand_like(lower) * (upper - lower)
        y = ops.packed_linear(
            x, weight.codes, weight.scale, weight.zero, in_features=128, bits=4, group_size=128,
            activations="int8",
        )  # fmt: skip
        assert (ends[0] <= y).all()
        assert (y <= ends[1]).all()
    cpu = ops.interval_packed_linear(
        lower, upper, *parts[:3], in_features=128, bits=4, group_size=128, activations="int8"
    )
    assert ((ends[1] - ends[0]) <= (cpu[1] - cpu[0]) * 1.01).all()


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, torch.float32), (1, torch.bfloat16), (10, torch.bfloat16), (40, torch.bfloat16)],
)
def test_corners_of_adversarial_boxes_in_rationals(tensor_core, batch, dtype):
    """One huge term and many just below what a truncating sum keeps, signs all one way."""
    terms = 300
    weight = torch.full((1, terms), 1.0, dtype=dtype)
    for shift in (8, 13, 16):
        centre = torch.full((batch, terms), 2.0**-shift * (1 - 2.0**-7))
        centre[:, 0] = 2.0**10
        for sign in (1.0, -1.0):
            point = centre * sign
            low, high = _cuda_interval.linear(point, point, weight, None, "real")
            exact = sum(Fraction(float(v)) for v in point[0])
            assert Fraction(low.max().item()) <= exact <= Fraction(high.min().item())


@pytest.mark.parametrize("batch", [4, 12])
def test_sums_that_nearly_cancel_stay_sound(tensor_core, batch):
    lower, upper = boxes(batch, 512, width=1e-6)
    weight = torch.randn(16, 512).bfloat16().float()
    weight[:, 256:] = -weight[:, :256]
    lower[:, 256:], upper[:, 256:] = lower[:, :256], upper[:, :256]
    for matrix in (weight, weight.bfloat16()):
        ends = _cuda_interval.linear(lower, upper, matrix, None, "deployed")
        check_sound(ends, exact_ends(lower, upper, weight), lower, upper, weight)
        y = lower @ weight.T  # a float32 evaluation
        assert (ends[0] <= y).all()
        assert (y <= ends[1]).all()


@pytest.mark.parametrize(
    ("more", "dtype"), [(0, torch.float32), (0, torch.bfloat16), (9, torch.bfloat16)]
)
def test_tiny_huge_infinite_and_nan_inputs(emulated_cuda, more, dtype):
    weight = torch.randn(4, 128).to(dtype)
    for size in (1e-44, 1e-38, 1e30):
        lower, upper = (end * size for end in boxes(3 + more, 128))
        ends = _cuda_interval.linear(lower, upper, weight, None, "real")
        exact = exact_ends(lower, upper, weight)
        assert (ends[0].double() <= exact[0]).all()
        assert (ends[1].double() >= exact[1]).all()
    lower, upper = boxes(5 + more, 128)
    lower[1, 3], upper[2, 4], lower[3, 5] = float("-inf"), float("nan"), 3e38
    upper[3, 5] = 3.2e38
    for rounding in ROUNDINGS:
        low, high = _cuda_interval.linear(lower, upper, weight * 100, None, rounding)
        for image in (1, 2, 3):
            assert (low[image] == float("-inf")).all()
            assert (high[image] == float("inf")).all()
        assert low[[0, 4]].isfinite().all()


def test_point_boxes_with_exact_arithmetic_are_nearly_points(emulated_cuda):
    x = torch.randint(-8, 9, (2, 128)).float()
    weight = torch.randint(-8, 9, (16, 128)).float()
    low, high = _cuda_interval.linear(x, x, weight, None, "real")
    y = x @ weight.T
    assert ((low <= y) & (y <= high)).all()
    assert (high - low <= 6e-4 * (x.abs() @ weight.abs().T) + 1e-6).all()


@pytest.mark.parametrize(("batch", "most"), [(4, 1.005), (12, 1.01)])
@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_it_is_about_as_tight_as_the_cpu(emulated_cuda, batch, most, rounding):
    """Warpgroups multiply with radii rounded up to bfloat16, 0.3% on average."""
    lower, upper = boxes(batch, 512)
    weight = torch.randn(32, 512).bfloat16()
    ends = _cuda_interval.linear(lower, upper, weight, None, rounding)
    cpu = ops.interval_linear(lower, upper, weight.float(), rounding=rounding)
    assert ((ends[1] - ends[0]) / (cpu[1] - cpu[0])).max() < most


# --- denormals ----------------------------------------------------------------------------------

TINY = torch.finfo(torch.float32).tiny


@pytest.fixture(params=["fused", "library"])
def either_path(request, emulated_cuda, monkeypatch):
    """The fused kernel, or decoded weights by the library's path."""
    if request.param == "library":
        for name in ("MOST_FUSED_INPUTS", "MOST_FUSED_PACKED_INPUTS", "LEAST_PRODUCTS"):
            monkeypatch.setattr(library, name, 0)
        for name in ("LEAST_INPUTS", "LEAST_PACKED_INPUTS"):
            monkeypatch.setattr(library, name, 1)
    return request.param


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("size", [1e-40, 1.1e-38, 1.5e-38])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_packed_bounds_hold_evaluations_whose_scales_are_flushed(
    either_path, batch, size, activations
):
    from pyrobust.ops._interval_packed import _linear_cuda

    codes = torch.randint(0, 256, (8, 256), dtype=torch.uint8)
    scale, zero = torch.full((8, 2), size), torch.zeros(8, 2, dtype=torch.uint8)
    options = {"in_features": 256, "bits": 8, "group_size": 128, "activations": activations}
    for x in (torch.rand(batch, 256), torch.rand(batch, 256) * 2.0**20):
        low, high = _linear_cuda(
            x, x, codes, scale, zero, None, 256, 8, 128, 1, activations, "deployed",
            *(None,) * 5,
        )  # fmt: skip
        y = ops.packed_linear(x, codes, scale, zero, **options)
        assert y.all()
        for value in (y, torch.zeros_like(y), torch.where(y.abs() < TINY, 0.0, y)):
            assert (low <= value).all()
            assert (value <= high).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 9])
def test_no_deployed_end_is_read_as_zero_inside_the_box(either_path, batch, dtype):
    """Biases so near to the absolute term that ends are denormal by ordinary rounding."""
    x, weight = torch.zeros(batch, 1), torch.zeros(1000, 1, dtype=dtype)
    for sign in (1, -1):
        bias = sign * torch.linspace(0, 200, 1000) * TINY
        low, high = _cuda_interval.linear(x, x, weight, bias, "deployed")
        assert (low > 0).any() == (sign > 0)
        assert not ((low > 0) & (low < TINY)).any()
        assert not ((high < 0) & (high > -TINY)).any()
        real = _cuda_interval.linear(x, x, weight, bias, "real")
        assert any(((end != 0) & (end.abs() < TINY)).any() for end in real)


# --- layout -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 700), st.sampled_from([1, 2, 3, 4, 8, 16, 32]))
def test_operands_fill_their_scratch_once(batch, terms, bits):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    inputs, padded = shim.operand_sizes(batch, terms)
    assert inputs >= batch
    assert padded >= terms
    assert padded % 128 == 0
    first = {shim.operand_place(batch, terms, p, 0, k, bits) for p in range(4) for k in range(128)}
    assert first == set(range(512))
    last = shim.operand_place(batch, terms, 3, inputs - 1, padded - 1, bits)
    scratch = shim.interval_scratch_bytes(0, (batch, 1, terms), (0, 0))
    assert last < 4 * inputs * padded <= scratch // 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**20), st.integers(1, 2**21), st.data())
def test_operand_places_beyond_2_31(batch, terms, data):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    inputs, padded = shim.operand_sizes(batch, terms)
    image, term = data.draw(st.integers(0, inputs - 1)), data.draw(st.integers(0, padded - 1))
    order = data.draw(st.sampled_from([3, 16, 32]))
    place = shim.operand_place(batch, terms, 2, image, term, order)
    assert place // (4 * padded) == image
    step, within = place % (4 * padded) // 512, place % 512
    eighth, lane, plane, i = within // 128, within // 32 % 4, within // 8 % 4, within % 8
    assert plane == 2
    own = {
        3: lane * 32 + eighth * 8 + i,
        16: eighth * 32 + lane * 8 + i,
        32: eighth * 32 + i // 4 * 16 + lane * 4 + i % 4,
    }
    assert step * 128 + own[order] == term


def test_shared_inputs_lie_where_products_look_and_fill_their_stage():
    shim = pytest.importorskip("pyrobust._cuda_shim")
    places = shim.shared_places(16)
    assert all(copied == read for copied, read in places)
    assert sorted(place for place, _ in places) == list(range(16 * 64))
    for lane in (0, 8, 16, 24):
        for first in range(0, 16, 4):
            assert sorted(shim.banks_together(first // 4, first // 4, lane)) == list(range(8))
        for chunks in (16, 32):
            for first in range(0, chunks, 4):
                assert sorted(shim.weight_banks_together(chunks, first, lane)) == list(range(8))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 8, 16, 32])
def test_places_of_terms_have_an_inverse(order):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    for term in range(128):
        assert shim.term_of_place(order, *shim.place_in_step(order, term)) == term


@pytest.mark.parametrize("order", [1, 2, 3, 4, 8, 16])
def test_images_hold_every_term_of_every_plane_once(order):
    """In rows of 128 bytes that lie as warpgroups look for them."""
    shim = pytest.importorskip("pyrobust._cuda_shim")
    for inputs in (8, 16, 32, 64):
        seen = {}
        for plane in range(3):
            for image in (0, inputs - 1, inputs, 2 * inputs - 1):
                for column in range(256):
                    place, term = shim.image_place(
                        200, inputs, plane, image, column // 128, column % 128, order
                    )
                    seen.setdefault(place, (plane, image, term))
                    row = place // 64
                    assert row % inputs == image % inputs
                    assert row // inputs % 3 == plane
                    assert row // inputs // 3 == image // inputs * 4 + column // 64
                    assert (place % 64 // 8) ^ (image % 8) == column % 64 // 8
        assert len(seen) == len(set(seen.values())) == 3 * 4 * 256
        assert {term for _, _, term in seen.values()} == set(range(256))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 8, 16])
def test_columns_of_images_are_where_fragments_take_them(order):
    """A lane's k of a product are its pairs 2 s and 2 s + 1 of the eighth, s = 0, 1."""
    shim = pytest.importorskip("pyrobust._cuda_shim")
    for column in range(128):
        _, term = shim.image_place(128, 8, 0, 0, 0, column, order)
        lane, place = shim.place_in_step(order, term)
        k = column % 16
        assert lane == k % 8 // 2
        assert place == column // 32 * 8 + column // 16 % 2 * 4 + k // 8 * 2 + k % 2


@given(st.integers(1, 300), st.integers(0, 2**20))
def test_a_rotation_takes_every_step_once(count, rows):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    assert sorted(shim.rotation(count, rows)) == list(range(count))


@given(
    st.integers(1, 2), st.integers(1, 3000), st.integers(1, 2**20), st.integers(1, 2**20),
    st.integers(1, 200),
)  # fmt: skip
def test_parts_of_warpgroups_fit_the_device_and_their_memory(kind, batch, rows, terms, processors):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    outputs, parts, left = shim.wide_plan(kind, batch, rows, terms, processors)
    assert 1 <= parts <= 8
    assert parts == 1 or outputs * parts <= processors
    assert parts <= -(-terms // 128)
    assert left == 0 if parts == 1 else left <= processors * 98304
    size = shim.interval_scratch_bytes(kind, (batch, rows, terms), (0, 0))
    assert size >= (6 if kind == 2 or batch > 8 else 8) * batch * terms


@given(st.integers(1, 2**30), st.integers(1, 200), st.integers(1, 2**21))
def test_parts_fit_the_device_and_have_a_step_each(blocks, multiprocessors, terms):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    parts, steps = shim.shared_parts(blocks, multiprocessors, terms), -(-terms // 128)
    assert parts in (1, 2, 4, 8)
    assert parts == 1 or (blocks * parts <= multiprocessors and parts <= steps)
    assert parts == 8 or 2 * blocks * parts > multiprocessors or 2 * parts > steps
    # A product and a sum a step of one block, then a sum for each half of every block.
    assert shim.gpu_depth(terms, parts) >= 2 * -(-steps // parts) + 2 * parts


def test_ends_are_exact_where_sums_are(emulated_cuda, card):
    """Small integers: every order of summation gives the same sums, and with one rounding of
    the result the same ends."""
    lower = torch.randint(-8, 9, (19, 700)).float()
    upper = lower + torch.randint(0, 5, lower.shape)
    weight = torch.randint(-8, 9, (150, 700)).float()
    for matrix in (weight, weight.bfloat16()):
        low, high = _cuda_interval.linear(lower, upper, matrix, None, "nearest")
        exact = exact_ends(lower, upper, matrix)
        assert torch.equal(low.double(), exact[0])
        assert torch.equal(high.double(), exact[1])


# --- the operators' CUDA functions, on CPU tensors ----------------------------------------------


def test_the_operator_takes_any_leading_shape(emulated_cuda):
    from pyrobust.ops._interval_linear import _linear_cuda

    lower, upper = (end.view(2, 3, 70) for end in boxes(6, 70))
    weight, bias = torch.randn(5, 70), torch.randn(5)
    low, high = _linear_cuda(lower, upper, weight, bias, "real")
    exact = exact_ends(lower, upper, weight, bias)
    assert low.shape == high.shape == (2, 3, 5)
    assert ((low <= exact[0]) & (exact[1] <= high)).all()
    low, _ = _linear_cuda(lower[0, 0], upper[0, 0], weight, bias, "real")
    assert low.shape == (5,)
    wide, _ = _linear_cuda(lower.double(), upper.double(), weight.double(), None, "real")
    assert wide.dtype == torch.float64


@pytest.mark.parametrize(
    ("bits", "group_size", "terms"), [(4, 128, 256), (4, 32, 96), (1.58, 64, 90)]
)
def test_packed_formats_beside_the_kernel_are_decoded(emulated_cuda, bits, group_size, terms):
    from pyrobust.ops._interval_packed import _linear_cuda

    weight = packed(9, terms, bits, group_size, symmetric=bits == 1.58)
    lower, upper = boxes(3, terms)
    ends = _linear_cuda(
        lower, upper, weight.codes, weight.scale, weight.zero, None, terms, bits, group_size, 1,
        None, "real", *(None,) * 5,
    )  # fmt: skip
    matrix = weight.dequantize()
    check_sound(ends, exact_ends(lower, upper, matrix), lower, upper, matrix)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_contain_the_exact_image(emulated_cuda, groups):
    from pyrobust.ops._interval_conv import _conv_cuda

    lower, upper = (end.view(3, 4, 7, 6) for end in boxes(3, 4 * 7 * 6))
    weight, bias = torch.randn(6, 4 // groups, 3, 2), torch.randn(6)
    window = ([2, 1], [1, 0, 1, 1], [1, 2], groups)
    ends = _conv_cuda(lower, upper, weight, bias, *window, "real")
    exact = ops.interval_conv2d(
        *(torch.nn.functional.pad(end, (1, 1, 1, 0)).double() for end in (lower, upper)),
        weight.double(), bias.double(), stride=(2, 1), dilation=(1, 2), groups=groups,
    )  # fmt: skip
    assert ends[0].shape == exact[0].shape
    assert (ends[0] <= exact[0]).all()
    assert (exact[1] <= ends[1]).all()
    assert ((ends[1] - ends[0]) <= (exact[1] - exact[0]) * 1.02 + 1e-4).all()


def test_packed_convolutions_round_each_patch_by_itself(emulated_cuda):
    from pyrobust.ops._interval_packed import _conv_cuda

    weight = packed(4, 27, 4, 27)
    lower, upper = (end.view(2, 3, 5, 5) for end in boxes(2, 75))
    parts = (weight.codes, weight.scale, weight.zero, None, 27, 4, 27, 1)
    window = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1)
    options = {"kernel_size": 3, "padding": 1, "bits": 4, "group_size": 27, "in_channels": 3}
    for activations in (None, "int8"):
        ends = _conv_cuda(lower, upper, *parts, activations, *window, "real", *(None,) * 5)
        cpu = ops.interval_packed_conv2d(
            lower, upper, *parts[:3], activations=activations, **options
        )
        middle = (cpu[0].double() + cpu[1]) / 2
        assert ((ends[0] <= middle) & (middle <= ends[1])).all()
        ratio = (ends[1] - ends[0]) / (cpu[1] - cpu[0])
        assert ratio.min() > 0.999
        assert ratio.max() < 1.02
