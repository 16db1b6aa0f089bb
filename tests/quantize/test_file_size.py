"""A packed file takes the bits that its format counts, within 1%, for every quantizer."""

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.quantize import GWQ, QUANTIZERS, AdaDim, LearnedRounding, PowerQuantizer, QuantLinear

ROWS, COLUMNS, GROUP = 1024, 512, 128
COUNT, GROUPS = ROWS * COLUMNS, ROWS * COLUMNS // GROUP
AFFINE = 16 + 8  # float16 scale and byte zero-point of a group
FAST = {"iterations": 1, "batch_size": 1, "descent": 1}


def squared_output(model, batch):
    return model(batch).square().mean()


CASES = {  # quantizer, bits, bits of side data, bits of kept weights
    "rtn": (lambda: "rtn", 2, GROUPS * AFFINE),
    "gptq": (lambda: "gptq", 3, GROUPS * AFFINE),
    "adadim": (lambda: AdaDim("rtn"), 4, GROUPS * AFFINE),
    "learned_rounding": (lambda: LearnedRounding(**FAST), 2, GROUPS * AFFINE),
    "learned_rounding from gptq": (
        lambda: LearnedRounding(start="gptq", **FAST), 3, GROUPS * AFFINE,
    ),
    "gwq": (
        lambda: GWQ(0.01, loss=squared_output, whole_columns=False),
        4,
        GROUPS * AFFINE + COUNT // 100 * (16 + 32) + (ROWS + 1) * 64,
    ),
    "nf4": (lambda: "nf4", 4, GROUPS * 16 + 16 * 8),
    "two-level": (lambda: "two-level", 2, GROUPS * (8 + 8) + ROWS * 32),
    "power": (lambda: PowerQuantizer(0.6), 3, GROUPS * 16 + 8 * 8),
}  # fmt: skip


def test_every_name_is_here():
    assert set(QUANTIZERS) <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_file_has_the_counted_bits(case, tmp_path):
    make, bits, side = CASES[case]
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False)).eval()
    quantizer = make()
    name = quantizer if isinstance(quantizer, str) else ""
    calibrated = name == "gptq" or hasattr(quantizer, "float_stream") or case == "gwq"
    packed = pyrobust.pack(
        model,
        bits=bits,
        group_size=GROUP,
        quantizer=quantizer,
        calibration=[torch.randn(64, COLUMNS)] if calibrated else None,
    )
    counted = (bits * COUNT + side) / 8
    assert packed[0].nbytes_packed == pytest.approx(counted, rel=1e-3)
    (row,) = pyrobust.pack_report(packed).packed
    assert row.bytes_after == packed[0].nbytes_packed
    pyrobust.save(packed, tmp_path / "packed")
    assert (tmp_path / "packed").stat().st_size == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("weights", ["statsq", "lsq"])
def test_networks_trained_in_low_bits_have_the_counted_bits(bits, weights, tmp_path):
    if (bits, weights) == (8, "statsq"):
        pytest.skip("256 half-integer levels have no packed format")
    layer = QuantLinear(COLUMNS, ROWS, bits, None, weights, bias=False)
    layer(torch.randn(2, COLUMNS))
    packed = pyrobust.pack(nn.Sequential(layer).eval())
    pyrobust.save(packed, tmp_path / "packed")
    book = 8 * 2**bits if weights == "statsq" and 1 < bits <= 4 else 0
    counted = (bits * COUNT + ROWS * 32 + book) / 8
    assert (tmp_path / "packed").stat().st_size == pytest.approx(counted, rel=0.01)
