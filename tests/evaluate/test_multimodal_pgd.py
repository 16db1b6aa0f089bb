"""The attack on several inputs at once."""

import math

import pytest
import torch
from torch import nn

from pyrobust.evaluate import multimodal_pgd


class Sum(nn.Module):
    """Two linear modalities whose logits add: the best attack is known."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Sum().eval()
    inputs = (torch.randn(32, 6), torch.randn(32, 4))
    return model, inputs, model(*inputs).argmax(1)


def joint(found, inputs):
    return torch.cat([f - x for f, x in zip(found, inputs, strict=True)], 1).norm(dim=1)


def test_it_finds_the_known_joint_optimum(case):
    model, inputs, y = case
    found = multimodal_pgd(model, inputs, y, eps=0.7, steps=30)
    assert float(joint(found, inputs).max()) <= 0.7 * (1 + 1e-5)
    logits = model(*found)
    gap = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None]))[:, 0]
    before = model(*inputs)
    margin = (before.gather(1, y[:, None]) - before.gather(1, 1 - y[:, None]))[:, 0]
    weight = torch.cat([model.a.weight, model.b.weight], 1)
    slope = (weight[0] - weight[1]).norm()
    # once the class is wrong a sample stops at its loss; the others reach margin - 0.7 slope
    right = logits.argmax(1) == y
    torch.testing.assert_close(gap[right], (margin - 0.7 * slope)[right], rtol=1e-3, atol=1e-4)
    assert int((~right).sum()) == int((margin < 0.7 * slope).sum())


def test_one_modality_leaves_the_other_alone(case):
    model, inputs, y = case
    found = multimodal_pgd(model, inputs, y, eps=0.5, modalities=[1], steps=5)
    assert found[0] is inputs[0]
    assert float((found[1] - inputs[1]).norm(dim=1).max()) <= 0.5 * (1 + 1e-5)


def test_infinity_norm_clamp_and_restarts(case):
    model, inputs, y = case
    inside = tuple(x.clamp(0, 1) for x in inputs)
    found = multimodal_pgd(
        model, inside, y, eps=0.2, norm=math.inf, clamp=(0, 1), restarts=3, steps=10, seed=4
    )
    for f, x in zip(found, inside, strict=True):
        assert float((f - x).abs().max()) <= 0.2 + 1e-6
        assert float(f.min()) >= 0
        assert float(f.max()) <= 1
    again = multimodal_pgd(
        model, inside, y, eps=0.2, norm=math.inf, clamp=(0, 1), restarts=3, steps=10, seed=4
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_refusals(case):
    model, inputs, y = case
    with pytest.raises(ValueError, match=r"modalities must be among 0\.\.1"):
        multimodal_pgd(model, inputs, y, eps=0.1, modalities=[2])
    with pytest.raises(ValueError, match="eps must be finite and at least"):
        multimodal_pgd(model, inputs, y, eps=-1)
    with pytest.raises(ValueError, match="norm must be one of"):
        multimodal_pgd(model, inputs, y, eps=0.1, norm=1)
    with pytest.raises(TypeError, match="must return logits"):
        multimodal_pgd(lambda *x: None, inputs, y, eps=0.1)
