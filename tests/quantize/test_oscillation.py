import pytest
import torch
from torch import nn

from pyrobust.quantize import OscillationTracker, QKReparamAttention, QuantLinear


def feed(tracker, codes):
    for row in codes:
        tracker.update({"w": torch.tensor(row, dtype=torch.uint8)})


def test_counts_only_changes_against_the_previous_change():
    tracker = OscillationTracker(momentum=0.5)
    # element 0 flips back and forth; 1 climbs; 2 waits between its two changes; 3 stays
    feed(tracker, [[0, 0, 1, 3], [1, 1, 2, 3], [0, 2, 2, 3], [1, 3, 2, 3], [1, 3, 1, 3]])
    assert tracker.reversals["w"].tolist() == [2, 0, 1, 0]
    assert tracker.rate() == pytest.approx(1000 * 3 / 16)
    assert tracker.frequency["w"].tolist() == pytest.approx([0.375, 0, 0.5, 0])


def test_large_jumps_and_unsigned_codes_have_the_right_direction():
    tracker = OscillationTracker()
    feed(tracker, [[0], [255], [3], [200]])
    assert tracker.reversals["w"].tolist() == [2]


def test_reset_counts_anew_and_remembers_directions():
    tracker = OscillationTracker()
    feed(tracker, [[0], [1], [0]])
    tracker.reset()
    assert tracker.rate() == 0.0
    feed(tracker, [[1]])
    assert tracker.rate() == 1000.0


def test_finds_every_simulated_weight_of_a_model():
    torch.manual_seed(0)
    attention = QKReparamAttention(8, 2, w_bits=2)
    net = nn.ModuleDict({"a": QuantLinear(8, 4, 2, weight_quantizer="lsq"), "b": attention})
    tracker = OscillationTracker()
    tracker.update(net)
    tracker.update(net)
    assert set(tracker.frequency) == {"a", "b.value", "b.proj", "b.qk"}
    assert tracker.frequency["b.qk"].shape == (16, 8)
    assert tracker.rate() == 0.0


def test_bad_input_is_refused():
    for momentum in (0.0, 1.0):
        with pytest.raises(ValueError, match="momentum must lie in the open interval"):
            OscillationTracker(momentum)
    with pytest.raises(ValueError, match="must have simulated low-bit weights"):
        OscillationTracker().update(nn.Linear(2, 2))
    tracker = OscillationTracker()
    feed(tracker, [[0, 1]])
    with pytest.raises(ValueError, match=r"must keep the shape \(2,\); got \(1,\)"):
        feed(tracker, [[0]])
