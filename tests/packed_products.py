"""Random packed weights and their products, for the tests of every kernel."""

import torch

from pyrobust.ops import packed_linear
from pyrobust.quantize import QTensor

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}


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
