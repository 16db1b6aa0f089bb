"""Phase codes: the interval definition, ties, scales, packing."""

import math

import numpy as np
import pytest
import torch

from pyrobust.quantize import (
    PhaseCodes,
    dequantize,
    pack_codes_2bit,
    phase_quantize,
    unpack_codes_2bit,
)


def test_the_four_roots_are_their_own_codes():
    real, imag = torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    phases = phase_quantize(real, imag)
    assert phases.codes.tolist() == [0, 1, 2, 3]
    assert float(phases.scale_real) == float(phases.scale_imag) == 1.0
    assert torch.equal(dequantize(phases)[0], real)
    assert torch.equal(dequantize(phases)[1], imag)


def test_codes_are_the_phase_intervals_on_random_points():
    real, imag = torch.randn(2, 100_000)
    phase = np.arctan2(imag.double().numpy(), real.double().numpy())
    quarter = math.pi / 4
    expected = np.select(
        [
            (phase >= -quarter) & (phase < quarter),
            (phase >= quarter) & (phase < 3 * quarter),
            (phase >= -3 * quarter) & (phase < -quarter),
        ],
        [0, 1, 3],
        2,
    )
    assert np.array_equal(phase_quantize(real, imag).codes.numpy(), expected)


def test_every_tie_goes_to_the_interval_that_holds_its_border():
    size = torch.tensor([1e-30, 0.1, 1.0, 3e38])
    for signs, code in [((1, 1), 1), ((-1, 1), 2), ((-1, -1), 3), ((1, -1), 0)]:
        assert phase_quantize(signs[0] * size, signs[1] * size).codes.tolist() == [code] * 4
    for zero in (0.0, -0.0):
        none = torch.full((4,), zero)
        assert phase_quantize(size, none).codes.tolist() == [0] * 4
        assert phase_quantize(none, size).codes.tolist() == [1] * 4
        assert phase_quantize(-size, none).codes.tolist() == [2] * 4
        assert phase_quantize(none, -size).codes.tolist() == [3] * 4
        assert phase_quantize(none, none).codes.tolist() == [0] * 4


def test_a_quarter_turn_of_the_weight_adds_one_to_every_code():
    real, imag = torch.randn(2, 50, 40)
    real[0], imag[0] = 1.0, 1.0  # ties too
    once, turned = phase_quantize(real, imag), phase_quantize(-imag, real)
    assert torch.equal((once.codes + 1) % 4, turned.codes)
    assert torch.equal(once.scale_real, turned.scale_imag)


def test_rounding_again_changes_no_code():
    phases = phase_quantize(*torch.randn(2, 30, 50))
    again = phase_quantize(*dequantize(phases))
    assert torch.equal(phases.codes, again.codes)
    torch.testing.assert_close(phases.scale_real, again.scale_real, rtol=1e-6, atol=0)


def test_isotropic_weights_use_all_codes_alike():
    codes = phase_quantize(*torch.randn(2, 200, 200)).codes
    shares = torch.bincount(codes.flatten().long(), minlength=4) / codes.numel()
    assert bool(((shares - 0.25).abs() < 0.02).all())


def test_scales_are_the_means_of_the_parts_that_count():
    real, imag = torch.randn(2, 40, 30)
    codes, scale_real, scale_imag = phase_quantize(real, imag)
    assert float(scale_real) == pytest.approx(float(real[codes % 2 == 0].abs().mean()), rel=1e-6)
    assert float(scale_imag) == pytest.approx(float(imag[codes % 2 == 1].abs().mean()), rel=1e-6)
    empty = phase_quantize(torch.ones(3), torch.zeros(3))
    assert (float(empty.scale_real), float(empty.scale_imag)) == (1.0, pytest.approx(1e-5))


@pytest.mark.parametrize("columns", [0, 1, 3, 4, 5, 17])
def test_codes_take_two_bits_the_first_lowest(columns):
    codes = torch.randint(0, 4, (3, columns), dtype=torch.uint8)
    packed = pack_codes_2bit(codes)
    assert packed.shape == (3, -(-columns // 4))
    assert torch.equal(unpack_codes_2bit(packed, columns), codes)
    if columns == 5:
        first = sum(int(codes[0, i]) << (2 * i) for i in range(4))
        assert int(packed[0, 0]) == first


def test_refusals():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="one shape"):
        phase_quantize(x, x[:2])
    with pytest.raises(TypeError, match="one dtype"):
        phase_quantize(x, x.double())
    with pytest.raises(TypeError, match=r"x\.real and x\.imag"):
        phase_quantize(torch.complex(x, x), x)
    with pytest.raises(ValueError, match="w_imag must be finite"):
        phase_quantize(x, x / 0)
    with pytest.raises(TypeError, match="floating-point"):
        phase_quantize(x.long(), x.long())
    with pytest.raises(ValueError, match="codes must be 0 to 3; got 4"):
        dequantize(PhaseCodes(torch.tensor([4], dtype=torch.uint8), x[0, 0], x[0, 0]))
    with pytest.raises(ValueError):
        pack_codes_2bit(torch.tensor([[4]], dtype=torch.uint8))
