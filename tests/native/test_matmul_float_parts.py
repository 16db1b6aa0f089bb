"""Float32 activations in three or four 8-bit parts, on AVX-512 for groups of whole blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust import _native
from pyrobust.quantize import BITS, QTensor, round_to_codebook, round_to_two_level

from ..packed_products import (
    BATCHES,
    assert_within_bound,
    check_batch_sizes,
    multiply,
    random_weight,
)

# rows, cols, group_size: usual groups, tails of columns and rows, one group, a last group of one;
# and fewer rows than parts want
SHAPES = [(70, 512, 128), (41, 200, 64), (39, 150, 150), (37, 129, 128), (40, 1300, 640)]
SHAPES += [(31, 200, 64)]
SHAPES += [(37, 200, 48), (33, 1344, 100)]  # groups that are filled up
THREE, FOUR = 8_355_711, 2_139_062_143  # the largest integers that three and four parts write


def _with(x: torch.Tensor, columns, value: float) -> torch.Tensor:
    x = x.clone()
    x[:, columns] = value
    return x


# Rows that take three parts, four, or float arithmetic, within one group or in several.
KINDS = {
    "normal": lambda x: x,
    "integers": lambda x: (x * 100).round(),
    "log-normal": lambda x: x * torch.exp(1.5 * torch.randn_like(x)),
    "heavy-tailed": lambda x: x / torch.randn_like(x),
    "beyond four parts": lambda x: x * torch.exp(12 * torch.randn_like(x)),
    "an outlier": lambda x: _with(x, 3, 1000.0),
    "a huge outlier": lambda x: _with(x, 3, 1e7),
    "one column": lambda x: _with(torch.zeros_like(x), 3, 0.1),
    "a quiet group": lambda x: x * torch.where(torch.arange(x.shape[1]) < 64, 1e-6, 1.0),
    "halves are zero": lambda x: x.relu(),
    "huge": lambda x: x * 1e30,
    "small": lambda x: x * 1e-20,
    "mixed rows": lambda x: x * torch.exp(2.0 * torch.randn(len(x), 1) * torch.randn_like(x)),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_batch_size(isa, bits, shape):
    packed = random_weight(*shape[:2], bits, shape[2], symmetric=shape[0] % 2 == 0)
    x, bias = KINDS["mixed rows"](torch.randn(max(BATCHES), shape[1])), torch.randn(shape[0])
    check_batch_sizes(x, packed, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1.58, 3, 8])
def test_rows_of_every_kind(isa, bits, kind):
    for rows, cols, group_size in SHAPES:
        packed = random_weight(rows, cols, bits, group_size)
        x = KINDS[kind](torch.randn(9, cols))
        whole = multiply(x, packed)
        assert_within_bound(whole, x, packed)
        for batch in (1, 2, 3):
            assert torch.equal(multiply(x[:batch], packed), whole[:batch])


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_multiples_of_a_step_are_exact(isa, batch):
    packed = random_weight(52, 384, 4, 128)
    x = torch.randint(-127, 128, (batch, 384)).double()
    exact = x @ packed.dequantize(torch.float64).t()
    assert torch.equal(multiply(x.float(), packed), exact.float())


def rounding(x: torch.Tensor, largest: int) -> torch.Tensor:
    """What rounding a group to multiples of its step takes from each column, in double."""
    step = 2.0 ** (x.abs().amax(1, keepdim=True) / largest).log2().ceil()
    return (x - (x / step).round() * step).abs()


def without_largest(x: torch.Tensor) -> torch.Tensor:
    """Sums of ``|x|`` over all columns but the eight of largest magnitude."""
    return x.abs().sort(1).values[:, :-8].sum(1)


@pytest.mark.parametrize("isa", ["avx512"], indirect=True)
@pytest.mark.parametrize("largest", [THREE, FOUR])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_bound_where_large_x_meets_weights_of_zero(isa, largest, batch):
    """All columns but one have weights of zero, the one of small x: the worst for a format."""
    cols = 256
    x = torch.randn(batch, cols).double()
    if largest == FOUR:
        x[:, 7] = 500.0
    x = x.float().double()
    takes_three = rounding(x, THREE).sum(1) <= 2.0**-21 * without_largest(x)
    assert (takes_three == (largest == THREE)).all()
    rest = rounding(x, largest)
    assert (rest.sum(1) <= 2.0**-21 * without_largest(x)).all()
    codes = torch.full((40, cols), 8, dtype=torch.uint8)
    for n in range(40):
        codes[n, x[0].abs().argsort()[n]] = 15
    packed = QTensor.from_codes(codes, torch.ones(40, 1), bits=4, group_size=cols)
    weight = packed.dequantize(torch.float64)
    exact = x @ weight.t()
    error = (multiply(x.float(), packed).double() - exact).abs()
    assert (error <= rest @ weight.abs().t() + exact.abs() * 2.0**-24).all()
    assert error.max() > 0  # of columns that lost bits


@pytest.mark.parametrize("magnitude", [2.0**-126, 2.0**-140, 2.0**120])
@pytest.mark.parametrize("batch", [1, 3])
def test_extreme_magnitudes(isa, magnitude, batch):
    packed = random_weight(49, 256, 2, 128)
    x = torch.randn(batch, 256) * magnitude
    weight = packed.dequantize(torch.float64)
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    # Below 2^-126 floats are 2^-149 apart, and 256 of them are added.
    allowed = 1e-6 * size + 256 * 2.0**-149
    assert ((multiply(x, packed).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_what_is_not_finite_propagates_in_its_row(isa, batch):
    packed = random_weight(49, 256, 4, 128)
    x = torch.randn(batch + 1, 256)
    quiet = multiply(x, packed)
    weight = packed.dequantize()
    for value in (torch.inf, -torch.inf, torch.nan):
        x[0, 3] = value
        result = multiply(x, packed)
        expected = weight[:, 3] * value  # NaN where the weight is zero
        assert torch.equal(result[0].isnan(), expected.isnan())
        assert torch.equal(result[0].isposinf(), expected.isposinf())
        assert torch.equal(result[0].isneginf(), expected.isneginf())
        assert torch.equal(result[1:], quiet[1:])


@pytest.mark.parametrize("group_size", [128, 65_536])
def test_largest_sums_do_not_overflow(isa, group_size):
    cols = 65_536
    codes = torch.full((36, cols), 255, dtype=torch.uint8)
    zero = torch.zeros(36, cols // group_size, dtype=torch.uint8)
    scale = torch.ones(36, cols // group_size)
    packed = QTensor.from_codes(codes, scale, zero, bits=8, group_size=group_size)
    # All digits -127; the lower three of four -128, below one column that makes four necessary.
    for value, first in ((-THREE * 2.0**-23,) * 2, (-0x808080 * 2.0**-31, THREE * 2.0**-23)):
        for batch in (1, 3):
            x = torch.full((batch, cols), value)
            x[:, 0] = first
            expected = (255.0 * x[0].double().sum()).float()
            assert torch.equal(multiply(x, packed), expected.expand(batch, 36))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_codebooks_two_level_scales_and_remainders(isa, batch):
    weight, x = torch.randn(51, 256), KINDS["mixed rows"](torch.randn(batch, 256))
    levels = torch.linspace(-1, 1, 16)
    few = torch.rand(51, 256) < 0.05
    values = 20 * torch.randn(51, 256).sign()
    for packed in (
        round_to_codebook(weight, levels=levels, bits=4, group_size=128),
        round_to_two_level(weight, bits=4, group_size=64),
        random_weight(51, 256, 4, 128).with_remainder(values, few),
    ):
        assert_within_bound(multiply(x, packed), x, packed)


@pytest.mark.parametrize(("rows", "dtype"), [(31, torch.float32), (15, torch.bfloat16)])
@pytest.mark.parametrize("batch", [1, 9])
def test_weights_of_few_rows_meet_x_as_it_is(isa, rows, dtype, batch):
    """Parts would lose columns of small x, the only ones whose weights are not zero."""
    codes = torch.full((rows, 128), 8, dtype=torch.uint8)
    codes[:, 64:] = 9
    packed = QTensor.from_codes(codes, torch.ones(rows, 1), bits=4, group_size=128)
    x = torch.ones(batch, 128)
    x[:, 64:] = 2.0**-30
    assert torch.equal(multiply(x.to(dtype), packed).float(), torch.full((batch, rows), 2.0**-24))


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("activations", ["int8", None])
def test_threads_that_share_rows_of_x_change_no_bit(isa, rows, activations):
    packed = random_weight(rows, 200, 4, 50)
    few = torch.rand(rows, 200) < 0.05
    packed = packed.with_remainder(20 * torch.randn(rows, 200).sign(), few)
    x, bias = KINDS["mixed rows"](torch.randn(2500, 200)), torch.randn(rows)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(x, packed, bias, activations=activations))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(
        multiply(x[1700:1703], packed, bias, activations=activations), results[0][1700:1703]
    )


def test_threads_change_no_bit(isa):
    packed, x = random_weight(515, 4096, 4, 128), KINDS["mixed rows"](torch.randn(7, 4096))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [torch.cat([multiply(x[:1], packed), multiply(x, packed)[1:]])]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif("avx512" not in _native.supported_isas(), reason="parts need AVX-512")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_shapes_and_formats(data):
    rows, cols = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 700))
    bits, kind = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from(list(KINDS)))
    group_size = data.draw(st.sampled_from([16, 32, 50, 64, 96, 100, 128, 192, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    symmetric = data.draw(st.booleans())
    packed = random_weight(rows, cols, bits, group_size, symmetric=symmetric, generator=generator)
    x = torch.randn(data.draw(st.integers(1, 12)), max(cols, 4), generator=generator)
    x = KINDS[kind](x)[:, :cols].contiguous()
    result = multiply(x, packed)
    assert_within_bound(result, x, packed)
    assert torch.equal(multiply(x[-1:], packed), result[-1:])
