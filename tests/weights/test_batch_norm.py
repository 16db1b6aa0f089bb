"""Running statistics re-estimated: the exact average, its blend, and nothing else touched."""

import pytest
import torch
from torch import nn

from pyrobust.weights import Patcher, TaskVector, recalibrate_batchnorm, reset_batchnorm


def network():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].running_mean.normal_()
        model[2].running_var.uniform_(1, 2)
    return model


def statistics(model):
    return model[2].running_mean.clone(), model[2].running_var.clone()


def test_equal_batches_average_and_uneven_ones_weigh_by_size():
    model, x = network(), torch.randn(90, 5)
    hidden = model[0](x).detach()
    reset_batchnorm(model, x.split(40))  # 40, 40, 10
    parts = hidden.split(40)
    expected = [
        sum(len(p) / 90 * f(p) for p in parts) for f in (lambda p: p.mean(0), lambda p: p.var(0))
    ]
    for got, want in zip(statistics(model), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_blend_lies_between():
    model, x = network().train(), torch.randn(64, 5)
    old = statistics(model)
    weights = [p.clone() for p in model.parameters()]
    recalibrate_batchnorm(model, [(x, None)], blend=0.25)
    mixed = statistics(model)
    recalibrate_batchnorm(model, [x], blend=1.0)
    for a, m, b in zip(old, mixed, statistics(model), strict=True):
        torch.testing.assert_close(m, a.lerp(b, 0.25))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert model.training
    assert model[2].momentum == 0.1
    assert int(model[2].num_batches_tracked) == 0


def test_a_patched_model_is_recalibrated_and_the_patch_still_comes_off_exactly():
    model, x = network().eval(), torch.randn(64, 5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with Patcher(model) as patcher:
        patcher.apply(TaskVector.from_deltas({"0.bias": torch.ones(3)}))
        reset_batchnorm(model, [x])
        torch.testing.assert_close(model[2].running_mean, model[0](x).mean(0).detach())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_failures_change_nothing():
    model, x = network().train(), torch.randn(8, 5)
    before = statistics(model)

    def broken():
        yield x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate_batchnorm(model, broken())
    with pytest.raises(ValueError, match="at least one batch; got 0"):
        recalibrate_batchnorm(model, [])
    with pytest.raises(ValueError, match=r"blend must lie in \[0, 1\]; got 2"):
        recalibrate_batchnorm(model, [x], blend=2)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    assert model.training
    assert model[2].momentum == 0.1
    assert int(model[2].num_batches_tracked) == 0
    recalibrate_batchnorm(nn.Linear(2, 2), [])  # nothing to do
