"""The complex product with weights in {1, i, -1, -i}."""

import pytest
import torch

from pyrobust import _native
from pyrobust.ops import complex_2bit_matmul, complex_2bit_sums, pack_codes

from ..packed_products import BATCHES

SIZES = [(1, 1, 1), (3, 5, 7), (2, 9, 64), (4, 3, 65), (17, 6, 130), (1, 4, 1000), (5, 2, 63)]
SIZES += [(0, 3, 8), (2, 0, 8), (2, 3, 0)]
SIZES += [(count, 11, cols) for count in BATCHES for cols in (1, 64, 131)]


def problem(count, rows, cols):
    codes = torch.randint(0, 4, (rows, cols), dtype=torch.uint8)
    x = torch.randint(-128, 128, (2, count, cols), dtype=torch.int8)
    return x[0], x[1], codes


def int64_sums(a, b, codes):
    u = (codes == 0).long() - (codes == 2).long()
    v = (codes == 1).long() - (codes == 3).long()
    a, b = a.long(), b.long()
    return torch.stack([a @ u.t(), b @ v.t(), a @ v.t(), -(b @ u.t())])


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_exact(isa, size):
    a, b, codes = problem(*size)
    sums = complex_2bit_sums(a, b, pack_codes(codes, bits=2), in_features=size[2])
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), int64_sums(a, b, codes))


def test_largest_sums_do_not_overflow(isa):
    cols = 70_001
    codes = torch.zeros(4, cols, dtype=torch.uint8) + torch.arange(4, dtype=torch.uint8)[:, None]
    a = torch.full((2, cols), -128, dtype=torch.int8)
    sums = complex_2bit_sums(a, a, pack_codes(codes, bits=2), in_features=cols)
    assert torch.equal(sums.long(), int64_sums(a, a, codes))


def test_product_equals_complex_arithmetic(isa):
    a, b, codes = problem(6, 10, 300)
    steps, scales = torch.rand(2, 6) / 100, torch.tensor([0.7, 1.3])
    real, imag = complex_2bit_matmul(
        a, b, pack_codes(codes, bits=2), scales, *steps, in_features=300
    )
    x = torch.complex(a.double() * steps[0, :, None], b.double() * steps[1, :, None])
    unit = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)[codes.long()]
    weight = torch.where(codes % 2 == 0, scales[0].double(), scales[1].double()) * unit
    expected = x.conj() @ weight.t()  # W^T without conjugation
    torch.testing.assert_close(real.double(), expected.real, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(imag.double(), expected.imag, rtol=1e-6, atol=1e-6)


def test_all_sets_threads_and_batches_give_the_same_bits():
    a, b, codes = problem(9, 600, 2000)
    packed, steps, scales = pack_codes(codes, bits=2), torch.rand(2, 9), torch.tensor([0.1, 0.3])
    before, threads, results = _native.isa(), torch.get_num_threads(), []
    try:
        for name in _native.supported_isas():
            _native.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                y = complex_2bit_matmul(a, b, packed, scales, *steps, in_features=2000)
                one = complex_2bit_matmul(
                    a[4:5], b[4:5], packed, scales, steps[0, 4:5], steps[1, 4:5], in_features=2000
                )
                assert torch.equal(one[0][0], y[0][4])
                results.append(torch.stack(y))
    finally:
        _native.set_isa(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_leading_axes_strides_and_operator_contracts(isa):
    a, b, codes = problem(6, 5, 33)
    packed = pack_codes(codes, bits=2)
    flat = complex_2bit_sums(a, b, packed, in_features=33)
    shaped = complex_2bit_sums(a.reshape(2, 3, 33), b.reshape(2, 3, 33), packed, in_features=33)
    assert torch.equal(shaped.reshape(4, 6, 5), flat)
    strided = complex_2bit_sums(a.t().contiguous().t(), b, packed, in_features=33)
    assert torch.equal(strided, flat)
    torch.library.opcheck(torch.ops.pyrobust.complex_2bit_sums, (a, b, packed, 33))
    product = (a, b, packed, torch.ones(2), torch.ones(6), torch.ones(6), 33)
    torch.library.opcheck(torch.ops.pyrobust.complex_2bit_matmul, product)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_real": torch.zeros(2, 8)}, TypeError, "x_real must have dtype torch.int8"),
        ({"x_imag": torch.zeros(3, 8, dtype=torch.int8)}, ValueError, "x_imag must have shape"),
        ({"in_features": 9}, ValueError, "in_features = 9 values"),
        ({"codes": torch.zeros(3, 3, dtype=torch.uint8)}, ValueError, "codes must have shape"),
        ({"scales": torch.ones(3)}, ValueError, r"scales must have shape \(2\)"),
        ({"step_real": torch.ones(2).double()}, TypeError, "step_real must have dtype"),
        ({"step_imag": torch.ones(4)}, ValueError, "step_imag must have shape"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "x_real": torch.zeros(2, 8, dtype=torch.int8),
        "x_imag": torch.zeros(2, 8, dtype=torch.int8),
        "codes": torch.zeros(3, 2, dtype=torch.uint8),
        "scales": torch.ones(2),
        "step_real": torch.ones(2),
        "step_imag": torch.ones(2),
        "in_features": 8,
    }
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(error, match=message):
            complex_2bit_matmul(**{**arguments, **change})
