import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.train import Distillation, cosine_decay, distillation_loss


def logits(seed):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).double()


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_without_a_teacher_it_is_cross_entropy():
    assert torch.equal(distillation_loss(logits(0), LABELS), F.cross_entropy(logits(0), LABELS))


def test_soft_part_is_the_divergence_up_to_the_entropy_of_the_teacher():
    student, teacher = logits(0), logits(1)
    soft = distillation_loss(student, LABELS, teacher, temperature=2.0, soft_weight=3.0)
    soft = (soft - F.cross_entropy(student, LABELS)) / (3.0 * 4.0)
    p = (teacher / 2).softmax(1)
    divergence = (p * (p.log() - (student / 2).log_softmax(1))).sum(1).mean()
    entropy = -(p * p.log()).sum(1).mean()
    assert torch.allclose(soft, divergence + entropy)


def test_gradient_reaches_the_student_only_and_vanishes_in_the_soft_part_when_both_agree():
    student = logits(0).requires_grad_()
    teacher = logits(0).requires_grad_()
    hard = distillation_loss(student, LABELS)
    (distillation_loss(student, LABELS, teacher) - hard).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() < 1e-15


def test_objective_runs_the_teacher_without_gradient():
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4).eval()
    loss = Distillation(teacher, label_smoothing=0.1)(student, torch.randn(6, 3), LABELS)
    loss.backward()
    assert student.weight.grad is not None
    assert teacher.weight.grad is None


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        Distillation(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="temperature must be finite and positive"):
        distillation_loss(logits(0), LABELS, temperature=0.0)
    with pytest.raises(ValueError, match="soft_weight must be finite and at least 0"):
        distillation_loss(logits(0), LABELS, soft_weight=-1.0)
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        distillation_loss(logits(0), LABELS, label_smoothing=1.5)


def test_cosine_rises_to_one_and_falls_to_its_end():
    values = [cosine_decay(i / 100, warmup=0.1, end=0.2) for i in range(101)]
    assert values[0] == 0.0
    assert max(values) == values[10] == 1.0
    assert values[100] == pytest.approx(0.2)
    assert values[55] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert values[10:] == sorted(values[10:], reverse=True)
