"""Two-level scales with 8-bit activations: integer totals against int64, on every kernel."""

import pytest
import torch

from pyrobust import _native
from pyrobust.quantize import QTensor, round_to_two_level

from ..packed_products import LEVELS, multiply

# Rows of x on both sides of every border: of tiles, of folding (48), of a block (256).
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 31, 47, 48, 49, 70, 257)
SHAPES = [(37, 200, 64), (70, 576, 192), (33, 1100, 512), (40, 1300, 1300), (9, 160, 32)]


@pytest.fixture(autouse=True)
def panels():
    """Panels from the first product on, where the instruction set has them."""
    before = _native.set_panels(1, 0)
    yield
    _native.set_panels(*before)


def random_weight(rows, cols, bits, group_size, *, symmetric, largest):
    """Random codes and integer scales of at most ``largest`` over the codes' reach."""
    top = LEVELS[bits] - 1
    shape = (rows, -(-cols // group_size))

    def draw(high, shape):
        return torch.randint(0, high, shape, dtype=torch.uint8)

    return QTensor.from_codes(
        draw(top + 1, (rows, cols)),
        draw(largest // top + 1, shape),
        None if symmetric else draw(top + 1, shape),
        bits=bits,
        group_size=group_size,
        row_scale=torch.rand(rows) / 8,
    )


def reference(x, packed):
    """``t = (double) T * row_scale`` and ``y = t * step`` of matmul.h, T in int64."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    q = (x.double() / step).round().long()
    codes = packed.unpack_codes().long()

    def spread(grouped):
        return grouped.long().repeat_interleave(packed.group_size, 1)[:, : packed.shape[1]]

    zero = packed.symmetric_zero if packed.zero is None else spread(packed.zero)
    total = q @ ((codes - zero) * spread(packed.scale)).t()
    return (total.double() * packed.row_scale.double() * step).float()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("largest", [255, 511])  # scale times code fits in a byte, or not
def test_totals_are_exact(isa, bits, symmetric, largest):
    for shape in SHAPES:
        packed = random_weight(*shape[:2], bits, shape[2], symmetric=symmetric, largest=largest)
        x = torch.randn(max(ROWS), shape[1])
        expected = reference(x, packed)
        for rows in ROWS:
            assert torch.equal(multiply(x[:rows], packed, activations="int8"), expected[:rows])


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_quantizer_makes(isa, symmetric):
    packed = round_to_two_level(torch.randn(40, 1024), bits=4, symmetric=symmetric)
    x = torch.randn(64, 1024)
    expected = reference(x, packed)
    assert torch.equal(multiply(x, packed, activations="int8"), expected)
    assert torch.equal(multiply(x[:1], packed, activations="int8"), expected[:1])


@pytest.mark.parametrize("cols", [32768, 32832])  # the last that fit in int32, and the next
@pytest.mark.parametrize("scale", [17, 34])
@pytest.mark.parametrize("zero", [0, 15])
def test_largest_totals(isa, cols, scale, zero):
    """Every product is 127 times the largest weight that the format has, of one sign."""
    shape = (2, -(-cols // 128))
    packed = QTensor.from_codes(
        torch.full((2, cols), 15 - zero, dtype=torch.uint8),
        torch.full(shape, scale, dtype=torch.uint8),
        torch.full(shape, zero, dtype=torch.uint8),
        bits=4,
        group_size=128,
        row_scale=torch.ones(2),
    )
    x = torch.ones(50, cols)
    for rows in (1, 8, 50):
        y = multiply(x[:rows], packed, activations="int8")
        assert torch.equal(y, reference(x[:rows], packed))
        assert float(y[0, 0]) == pytest.approx((15 - 2 * zero) * scale * cols)
