"""QTensor: the canonical layout and the exactness of the stored weight."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyrobust.quantize import BITS, QTensor, round_scale

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}


def unpack_with_numpy(packed: np.ndarray, cols: int, bits: float) -> np.ndarray:
    """Independent of the library: whole rows as bit strings, or base-3 digits."""
    if bits == 1.58:
        digits = (packed[:, :, None].astype(int) // 3 ** np.arange(5)) % 3
        return digits.reshape(len(packed), -1)[:, :cols]
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : int(bits) * cols]
    return stream.reshape(len(packed), cols, int(bits)) @ (1 << np.arange(int(bits)))


def random_qtensor(
    bits, rows, cols, group_size, group_dim, *, symmetric=False, dtype=torch.float16
):
    codes = torch.randint(0, LEVELS[bits], (rows, cols), dtype=torch.uint8)
    along_columns, along_rows = -(-cols // group_size), -(-rows // group_size)
    shape = (rows, along_columns) if group_dim == 1 else (along_rows, cols)
    scale = (torch.rand(shape) + 0.1).to(dtype)
    zero = None
    if not symmetric and bits not in (1, 1.58):
        zero = torch.randint(0, LEVELS[bits], shape, dtype=torch.uint8)
    return codes, QTensor.from_codes(
        codes, scale, zero, bits=bits, group_size=group_size, group_dim=group_dim
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize(
    ("rows", "cols", "group_size"), [(5, 37, 16), (3, 8, 3), (1, 1, 1), (7, 0, 4)]
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantize_equals_numpy_unpacking(
    bits, group_dim, rows, cols, group_size, symmetric, dtype
):
    codes, packed = random_qtensor(
        bits, rows, cols, group_size, group_dim, symmetric=symmetric, dtype=dtype
    )
    unpacked = unpack_with_numpy(packed.codes.numpy(), cols, bits)
    assert np.array_equal(unpacked, codes.numpy())
    assert torch.equal(packed.unpack_codes(), codes)

    scale = packed.scale.double().repeat_interleave(group_size, group_dim)
    zero = (
        torch.full_like(packed.scale, 1 if bits == 1 else LEVELS[bits] // 2)
        if packed.zero is None
        else packed.zero
    )
    zero = zero.double().repeat_interleave(group_size, group_dim)
    scale, zero = scale[:rows, :cols].numpy(), zero[:rows, :cols].numpy()
    value = scale * ((2 if bits == 1 else 1) * unpacked - zero)
    assert np.array_equal(packed.dequantize().numpy().astype(np.float64), value)
    assert np.array_equal(packed.dequantize(torch.float64).numpy(), value)


def test_stored_weight_is_exact_rational():
    scale = round_scale(torch.tensor([[math.pi * 1e-3]]))
    packed = QTensor.from_codes(
        torch.tensor([[255]], dtype=torch.uint8),
        scale,
        torch.tensor([[2]], dtype=torch.uint8),
        bits=8,
        group_size=1,
    )
    assert Fraction(packed.dequantize().item()) == Fraction(scale.item()) * 253


@pytest.mark.parametrize("up", [False, True])
def test_round_scale_keeps_fifteen_bits(up):
    scale = torch.logspace(-30, 37, 500) * torch.rand(500)
    rounded = round_scale(scale, up=up)
    mantissa = torch.frexp(rounded).mantissa.double() * 2**15
    assert torch.equal(mantissa, mantissa.round())
    error = (rounded.double() - scale.double()) / scale.double()
    assert (error.abs() <= (2**-14 if up else 2**-15)).all()
    assert not up or (error >= 0).all()


def test_sizes_are_accounted():
    _, packed = random_qtensor(3, 4, 100, 50, 1)
    assert packed.codes.shape == (4, 38)
    assert packed.nbytes == 4 * 38 + 8 * 2 + 8
    assert packed.bits_per_weight == pytest.approx(8 * 176 / 400)


def test_ternary_bytes_that_are_no_code_do_not_fault():
    packed = QTensor(
        torch.full((1, 2), 255, dtype=torch.uint8), torch.ones(1, 1), None, 1.58, (1, 8), 8
    )
    assert packed.dequantize().abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 5}, ValueError, "bits must be one of 1, 1.58, 2, 3, 4, 8; got 5"),
        ({"bits": True}, ValueError, "bits must be one of"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1; got 0"),
        ({"group_size": 2.0}, TypeError, "group_size must be an integer"),
        ({"group_dim": 2}, ValueError, "group_dim must be one of 0, 1; got 2"),
        ({"codes": torch.zeros(2, 3)}, TypeError, "codes must have dtype torch.uint8"),
        (
            {"codes": torch.zeros(2, 5, dtype=torch.uint8)},
            ValueError,
            r"codes must have shape \(2, 4\)",
        ),
        ({"scale": torch.ones(2, 3)}, ValueError, r"scale must have shape \(2, 2\)"),
        ({"scale": torch.full((2, 2), 0.1)}, ValueError, "at most 15 significant bits"),
        ({"scale": torch.full((2, 2), torch.nan)}, ValueError, "scale must be finite"),
        ({"scale": torch.ones(2, 2, dtype=torch.float64)}, TypeError, "float32, float16"),
        ({"zero": torch.full((2, 2), 16, dtype=torch.uint8)}, ValueError, "zero must be below 16"),
        ({"shape": (2, 8, 1)}, ValueError, "shape must be"),
    ],
)
def test_bad_parts_give_one_clear_error(change, error, message):
    parts = {
        "codes": torch.zeros(2, 4, dtype=torch.uint8),
        "scale": torch.ones(2, 2),
        "zero": None,
        "bits": 4,
        "shape": (2, 8),
        "group_size": 4,
    }
    with pytest.raises(error, match=message):
        QTensor(**{**parts, **change})


def test_codes_too_large_are_refused():
    with pytest.raises(ValueError, match="codes must be below 16; got 16"):
        QTensor.from_codes(
            torch.full((1, 4), 16, dtype=torch.uint8), torch.ones(1, 1), bits=4, group_size=4
        )
