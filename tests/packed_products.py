"""Random packed weights, their products and the bound on these, for the tests of every kernel."""

import torch

from pyrobust import _native
from pyrobust.ops import packed_linear
from pyrobust.quantize import QTensor

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
# Rows of x: none, those of kernels for few rows, both sides of blocks of 8 and 16, many.
BATCHES = [0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 200]


def random_weight(rows, cols, bits, group_size, group_dim=1, *, symmetric=False, generator=None):
    """Random codes, float16 scales in 0.1 to 1.1 and, where a width has them, zero-points."""

    def draw(high, shape):
        return torch.randint(0, high, shape, dtype=torch.uint8, generator=generator)

    along_columns, along_rows = -(-cols // group_size), -(-rows // group_size)
    shape = (rows, along_columns) if group_dim == 1 else (along_rows, cols)
    scale = (torch.rand(shape, generator=generator) + 0.1).half()
    zero = None if symmetric or bits in (1, 1.58) else draw(LEVELS[bits], shape)
    return QTensor.from_codes(
        draw(LEVELS[bits], (rows, cols)),
        scale,
        zero,
        bits=bits,
        group_size=group_size,
        group_dim=group_dim,
    )


def multiply(x, packed: QTensor, bias=None, **options):
    """``packed_linear`` with all that a packed weight holds."""
    return packed_linear(
        x,
        packed.codes,
        packed.scale,
        packed.zero,
        bias,
        in_features=packed.shape[1],
        bits=packed.bits,
        group_size=packed.group_size,
        group_dim=packed.group_dim,
        extras=packed.extras,
        **options,
    )


def check_batch_sizes(x, packed: QTensor, bias=None):
    """The bound, and that a row's result does not depend on the batch around it, to the bit."""
    whole = multiply(x, packed, bias)
    assert_within_bound(whole, x, packed, bias)
    for batch in BATCHES:
        assert torch.equal(multiply(x[:batch], packed, bias), whole[:batch])
        last = x.shape[0] - batch
        assert torch.equal(multiply(x[last:], packed, bias), whole[last:])


def assert_within_bound(result, x, packed: QTensor, bias=None):
    """The bound of ``csrc/matmul/matmul.h`` on products in float, against float64."""
    weight, wide = packed.dequantize(torch.float64), x.double()
    exact, allowance = wide @ weight.t(), wide.abs() @ weight.abs().t()
    if bias is not None:
        exact, allowance = exact + bias.double(), allowance + bias.double().abs()
    error = 1e-6 * allowance
    if x.dtype != torch.float32:
        if _takes_parts(packed):
            error = error + _rounding_to_16_bits(x, weight, step_columns(packed.group_size))
        error += (exact.abs() + error) * torch.finfo(x.dtype).eps / 2 + 2.0**-25
    assert ((result.double() - exact).abs() <= error).all()


def _takes_parts(packed: QTensor) -> bool:
    """Where x has 16 bits: of groups, or rows, of up to 65536 columns and at least 16 rows."""
    return packed.group_dim == 1 and len(packed.codes) >= 16 and _native.isa() in ("avx512", "amx")


def step_columns(group_size):
    """Columns of x with one step: those of a group, or of two that are no whole blocks of 64.

    Groups that are no whole 32 columns count as if they were filled up; those of up to 16 are
    filled up to 4, 8 or 16 columns, and 64 of these have one step.
    """
    if group_size <= 16:
        return group_size * (64 // (4 if group_size <= 4 else 8 if group_size <= 8 else 16))
    return group_size if -(-group_size // 32) % 2 == 0 else 2 * group_size


def _rounding_to_16_bits(x, weight, group_size):
    kept, error = 63 if x.dtype == torch.bfloat16 else 7, 0.0  # larger elements are exact
    for first in range(0, x.shape[1], group_size):
        columns = slice(first, first + group_size)
        size = x[:, columns].double().abs()
        largest = size.amax(1, keepdim=True)
        small = (size < largest / kept).double()
        error = error + largest / 32512 * (small @ weight[:, columns].abs().t())
    return error


def integer_sums(q, integers, packed: QTensor):
    """Rounded activations times code - zero in int64, their sums in double as matmul.h orders them.

    ``q`` ``(M, cols)`` and ``integers`` ``(rows, cols)`` are int64; the scales are those of
    ``packed``, without row scales and remainder.
    """
    if packed.group_dim == 1:
        return _sums_of_groups(q, integers, packed)
    return _sums_of_lanes(q, integers, packed)


def _sums_of_groups(q, integers, packed):
    total = torch.zeros(len(q), len(integers), dtype=torch.float64)
    for group in range(packed.scale.shape[1]):
        columns = slice(group * packed.group_size, (group + 1) * packed.group_size)
        sums = q[:, columns] @ integers[:, columns].t()
        total += sums.double() * packed.scale[:, group].double()
    return total


def _sums_of_lanes(q, integers, packed):
    rows, cols = packed.shape
    scale = packed.scale.double().repeat_interleave(packed.group_size, 0)[:rows]
    lanes = torch.zeros(8, len(q), rows, dtype=torch.float64)
    for k in range(cols):
        lanes[k // 8 % 8] += (q[:, k, None] * integers[:, k]).double() * scale[:, k]
    pairs = lanes[0::2] + lanes[1::2]
    return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
