"""Losses without labels: what counts, what is trusted, where gradients flow."""

import math

import pytest
import torch
from torch.nn import functional as F

from pyrobust.train import pseudo_label_consistency, softmax_entropy


def test_only_confident_or_trusted_samples_teach():
    weak = torch.tensor([[9.0, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 0.1, 0.0]], requires_grad=True)
    strong = torch.randn(3, 3, requires_grad=True)
    loss = pseudo_label_consistency(weak, strong, threshold=0.9)
    assert float(loss) == pytest.approx(float(F.cross_entropy(strong[:1], torch.tensor([0]))) / 3)
    trusted = torch.tensor([-1, 2, -1])
    with_trust = pseudo_label_consistency(weak, strong, trusted, 0.9)
    extra = F.cross_entropy(strong[1:2], torch.tensor([2])) / 3
    assert float(with_trust.detach()) == pytest.approx(float((loss + extra).detach()), rel=1e-5)
    with_trust.backward()
    assert weak.grad is None
    assert torch.equal(strong.grad[2], torch.zeros(3))
    assert float(pseudo_label_consistency(weak, strong, threshold=1.0)) == 0


def test_entropy():
    logits = torch.randn(5, 7)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(softmax_entropy(logits), expected)
    assert float(softmax_entropy(torch.zeros(1, 8))) == pytest.approx(math.log(8))


def test_refusals():
    with pytest.raises(ValueError, match="threshold must lie"):
        pseudo_label_consistency(torch.zeros(1, 2), torch.zeros(1, 2), threshold=2.0)
    with pytest.raises(ValueError, match="logits_strong must have shape"):
        pseudo_label_consistency(torch.zeros(1, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="trusted must have shape"):
        pseudo_label_consistency(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2))
