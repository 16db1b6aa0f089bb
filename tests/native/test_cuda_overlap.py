"""Launches that begin before the one ahead has ended read nothing of its results too early.

Every first launch is held until the second has come, whose thread blocks then run before it up to
where they wait (Options::hold_launches of csrc/cuda/fibres.h).
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from pyrobust.ops import _cuda_interval
from pyrobust.quantize import round_to_nearest

sys.path.insert(0, str(Path(__file__).parent))
from interval_images import boxes
from test_cuda_matmul import draw, emulated, gpu, shim

__all__ = ["emulated"]  # the fixture

ORDERS = pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])


def held(descending, call):
    shim.set_options(descending=descending, hold_launches=True)
    try:
        return call()
    finally:
        shim.set_options()


@ORDERS
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("batch", "dtype"), [
    (3, torch.float32), (12, torch.float32), (3, torch.bfloat16), (17, torch.bfloat16),
])  # fmt: skip
def test_interval_products_wait_for_their_preparation(emulated, descending, int8, batch, dtype):
    lower, upper = boxes(batch, 1400)
    weight, bias = torch.randn(70, 1400).to(dtype), torch.randn(70)

    def ends():
        return _cuda_interval.linear(lower, upper, weight, bias, "real", int8=int8)

    expected = ends()
    assert all(torch.equal(*pair) for pair in zip(held(descending, ends), expected, strict=True))


@ORDERS
@pytest.mark.parametrize("batch", [2, 20])
def test_interval_products_of_packed_weights_wait_too(emulated, descending, batch):
    lower, upper = boxes(batch, 1280)
    weight = round_to_nearest(torch.randn(70, 1280), bits=4, group_size=128)

    def ends():
        return _cuda_interval.packed_linear(
            lower, upper, weight.codes, weight.scale, weight.zero, None, 1280, 4, 128, False, "real"
        )

    expected = ends()
    assert all(torch.equal(*pair) for pair in zip(held(descending, ends), expected, strict=True))


@ORDERS
@pytest.mark.parametrize(
    ("count", "group_size"),
    [(3, 128), (13, 128), (9, 32), (20, 64), (50, 128), (40, 64), (130, 128)],
)
def test_packed_products_wait_for_the_rows_of_x(emulated, descending, count, group_size):
    """The result of one layer is the input of the next: few rows, warps, warpgroups, many rows."""
    emulated(3)
    first, second = draw(520, 256, 4, group_size), draw(520, 520, 4, group_size)
    x = torch.randn(count, 256).half() / 64

    def both():
        return gpu.linear(second.device, gpu.linear(first.device, x, None), None)

    expected = both()  # and from then on launches may overlap
    assert expected.isfinite().all()
    assert torch.equal(held(descending, both), expected)


# --- planted faults -----------------------------------------------------------------------------

LATE_COPIES, EARLY_INPUTS, NO_FENCE = 1, 2, 3
FAULTY = pytest.mark.parametrize(
    ("name", "batch", "fault"),
    [
        ("interval_product_faulty", 5, LATE_COPIES),
        ("interval_product_faulty", 5, EARLY_INPUTS),
        ("interval_wide_faulty", 12, LATE_COPIES),
        ("interval_wide_faulty", 12, EARLY_INPUTS),
        ("interval_wide_faulty", 12, NO_FENCE),
    ],
)


@ORDERS
@FAULTY
def test_planted_faults_of_interval_products_show(emulated, descending, name, batch, fault):
    """Copies that are read too early, inputs that are copied before they are prepared, stages that
    no fence has shown to products: a message, or other ends."""
    lower, upper = boxes(batch, 2048)
    weight = torch.randn(70, 2048).bfloat16()

    def ends(planted):
        out = torch.zeros(2, batch, 70)
        scratch = torch.full((16 * 2048 * 16,), 0xFF, dtype=torch.uint8)
        tensors = (lower, upper, weight, out[0], out[1], scratch)
        getattr(shim, name)([t.data_ptr() for t in tensors], (batch, 70, 2048), planted)
        return out

    expected = held(descending, lambda: ends(0))
    assert expected.isfinite().all()
    assert torch.equal(ends(0), expected)
    try:
        found = held(descending, lambda: ends(fault))
    except RuntimeError as error:
        assert re.search("wait|fence|copies", str(error)), error  # noqa: PT017
    else:
        assert not torch.equal(found, expected)
