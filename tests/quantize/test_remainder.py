"""SparseRemainder and QTensor.with_remainder."""

import pytest
import torch

from pyrobust.quantize import BITS, QTensor, SparseRemainder, round_to_nearest


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kept_weights_are_exact_and_others_unchanged(bits, group_dim, symmetric):
    weight = torch.randn(12, 70)
    weight[torch.rand(12, 70) < 0.03] *= 20
    packed = round_to_nearest(
        weight, bits=bits, group_size=16, group_dim=group_dim, symmetric=symmetric
    )
    mask = weight.abs() > 5
    kept = packed.with_remainder(weight, mask, dtype=torch.float16)
    assert torch.equal(kept.dequantize()[~mask], packed.dequantize()[~mask])
    if bits > 1:  # a code for 0: the value itself is stored
        assert torch.equal(kept.dequantize()[mask], weight[mask].half().float())
    torch.testing.assert_close(kept.dequantize()[mask], weight[mask], rtol=1e-3, atol=0)
    assert kept.remainder.count == int(mask.sum())
    assert kept.nbytes == packed.nbytes + kept.remainder.nbytes


def parts(**change):
    base = {
        "values": torch.ones(3),
        "columns": torch.tensor([0, 2, 1], dtype=torch.int32),
        "offsets": torch.tensor([0, 2, 3]),
    }
    return {**base, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.ones(3).double()}, TypeError, "values must be float32"),
        ({"columns": torch.tensor([0, 2, 1])}, TypeError, "columns must have dtype torch.int32"),
        ({"values": torch.tensor([1.0, torch.inf, 0.0])}, ValueError, "values must be finite"),
        ({"offsets": torch.tensor([0, 2, 2])}, ValueError, "offsets must rise from 0 to the 3"),
        ({"offsets": torch.tensor([0, 4, 3])}, ValueError, "offsets must rise"),
        ({"columns": torch.tensor([2, 2, 1]).int()}, ValueError, "strictly ascending"),
        ({"columns": torch.tensor([-1, 2, 1]).int()}, ValueError, "at least 0"),
        ({"columns": torch.ones(2).int()}, ValueError, "columns must have shape"),
    ],
)
def test_bad_parts_are_named(change, error, message):
    with pytest.raises(error, match=message):
        SparseRemainder(**parts(**change))


def test_qtensor_refuses_what_breaks_its_law():
    packed = QTensor.from_codes(
        torch.full((2, 3), 9, dtype=torch.uint8), torch.full((2, 1), 3.0), bits=4, group_size=3
    )
    fields = (packed.codes, packed.scale, None, 4, (2, 3), 3)
    with pytest.raises(ValueError, match="columns of the remainder must be below 3"):
        QTensor(*fields, remainder=SparseRemainder(**parts(columns=torch.tensor([0, 3, 1]).int())))
    for values in (torch.full((3,), 2.0**-30), torch.full((3,), -2.9)):  # no float32; too small
        with pytest.raises(ValueError, match="must be a float32 and at least 4/5"):
            QTensor(*fields, remainder=SparseRemainder(**parts(values=values)))
    with pytest.raises(ValueError, match="at most 511; got 1024"):
        QTensor(
            packed.codes, torch.full((2, 1), 128, dtype=torch.uint8), None, 4, (2, 3), 3,
            row_scale=torch.ones(2),
        )  # fmt: skip
