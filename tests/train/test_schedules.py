import pytest

from pyrobust.train import linear_ramp, step_decay


def test_linear_ramp_is_flat_then_straight_then_flat():
    values = [linear_ramp(d, begin=0.2, end=0.6, low=1, high=3) for d in (0, 0.2, 0.4, 0.6, 1)]
    assert values == pytest.approx([1, 1, 2, 3, 3])
    assert linear_ramp(0.5, begin=0.5, end=0.5) == 1.0


def test_linear_ramp_refuses_an_end_before_the_beginning():
    with pytest.raises(ValueError, match="linear_ramp: end must be finite and at least"):
        linear_ramp(0.1, begin=0.5, end=0.4)


def test_step_decay_drops_at_each_step():
    assert [step_decay(d) for d in (0.0, 0.7, 0.95)] == pytest.approx([1, 0.2, 0.04])
