"""Steps with gradients written out: those of the same step recorded operation by operation."""

import torch

from pyrobust.certify.relaxation.gradients import bend, relu_chord


def test_a_bend_equals_its_formula_and_gradients():
    torch.manual_seed(0)
    a = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    lines = [torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(bend, (a, *lines))
    pulled, value = bend(a, *lines)
    lower, low_shift, upper, up_shift = lines
    above, below = a.clamp(min=0), a.clamp(max=0)
    torch.testing.assert_close(pulled, above * lower + below * upper)
    expected = (above * low_shift + below * up_shift).flatten(2).sum(2)
    torch.testing.assert_close(value, expected)
    # a ReLU's lower line passes through 0
    lines[1] = torch.zeros(2, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(bend, (a, *lines))


def test_chords_of_relu():
    torch.manual_seed(0)
    low = torch.tensor([-2.0, -1, -3, 0.5, 0, 0, -1], dtype=torch.float64)
    high = torch.tensor([1.0, 3, -1, 2, 0, 2, 0], dtype=torch.float64)
    slope, shift = relu_chord(low, high)
    assert slope.tolist() == [1 / 3, 0.75, 0, 1, 0, 1, 0]
    torch.testing.assert_close(shift, torch.tensor([2 / 3, 0.75, 0, 0, 0, 0, 0]).double())
    low = -torch.rand(20, dtype=torch.float64) - 0.1
    high = torch.rand(20, dtype=torch.float64) + 0.1
    ends = low.requires_grad_(), high.requires_grad_()
    assert torch.autograd.gradcheck(relu_chord, ends)
