"""Steps with gradients written out: those of the same step recorded operation by operation."""

import pytest
import torch

from pyrobust import _native
from pyrobust.certify.relaxation.bent import bent, unbent
from pyrobust.certify.relaxation.convolution import pulled_convolution
from pyrobust.certify.relaxation.gradients import bend, bend_and_pull, pull, relu_chord
from pyrobust.certify.relaxation.layers import Layer


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def by_formula(a, lines):
    lower, low_shift, upper, up_shift = lines
    above, below = a.clamp(min=0), a.clamp(max=0)
    value = (above * low_shift + below * up_shift).flatten(2).sum(2)
    return above * lower + below * upper, value


def test_a_bend_equals_its_formula_and_gradients():
    torch.manual_seed(0)
    a = numbers(3, 2, 4, 5)
    lines = [numbers(2, 4, 5) for _ in range(4)]
    assert torch.autograd.gradcheck(bend, (a, *lines))
    for found, expected in zip(bend(a, *lines), by_formula(a, lines), strict=True):
        torch.testing.assert_close(found, expected)
    # a ReLU's lower line passes through 0
    lines[1] = torch.zeros(2, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(bend, (a, *lines))


def test_a_bend_of_images():
    torch.manual_seed(0)
    a = numbers(2, 2, 3, 4, 2)
    lines = [numbers(2, 3, 4, 2) for _ in range(4)]
    assert torch.autograd.gradcheck(bend, (a, *lines))
    for found, expected in zip(bend(a, *lines), by_formula(a, lines), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_linear_layer_alone_and_behind_a_bend():
    torch.manual_seed(0)
    a, weight, bias = numbers(3, 2, 4), numbers(4, 5), numbers(4)
    lines = tuple(numbers(2, 4) for _ in range(4))
    layer = Layer(None)
    for shift in (bias, None):
        assert torch.autograd.gradcheck(lambda *x: pull(*x, layer), (a, weight, shift))
        assert torch.autograd.gradcheck(
            lambda a, *x: bend_and_pull(a, x[:4], *x[4:], layer), (a, *lines, weight, shift)
        )
    between, raised = by_formula(a, lines)
    pulled, value = bend_and_pull(a, lines, weight, bias, layer)
    torch.testing.assert_close(pulled, between @ weight)
    torch.testing.assert_close(value, raised + between @ bias)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_convolution_alone_and_behind_a_bend(stride, channels):
    torch.manual_seed(0)
    size = [4, 5]
    options = {"stride": (stride,) * 2, "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    out = [(n + 2 - 3) // stride + 1 for n in size]
    layer = Layer(options, tuple(size), out[0] * out[1])
    weight, bias = numbers(3, channels, 3, 3), numbers(3)
    a = numbers(2, 2, 3, *out)
    lines = tuple(numbers(2, 3, *out) for _ in range(4))
    for shift in (bias, None):
        assert torch.autograd.gradcheck(lambda *x: pull(*x, layer), (a, weight, shift))
        assert torch.autograd.gradcheck(
            lambda a, *x: bend_and_pull(a, x[:4], *x[4:], layer), (a, *lines, weight, shift)
        )
    between, raised = by_formula(a, lines)
    pulled, value = bend_and_pull(a, lines, weight, bias, layer)
    expected = pulled_convolution(between.flatten(0, 1), weight, options, size)
    torch.testing.assert_close(pulled, expected.unflatten(0, (2, 2)))
    torch.testing.assert_close(value, raised + between.sum((3, 4)) @ bias)


@pytest.mark.parametrize("size", [1, 15, 16, 33, 1100])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_computes_what_torch_does(isa, size, biased):
    torch.manual_seed(size)
    a = torch.randn(3, 2, size)
    a[0, 0, 0] = 0.0
    lines = tuple(torch.randn(2, size) for _ in range(4))
    bias = torch.randn(size) if biased else None
    by_pulled, by_value = torch.randn(3, 2, size), torch.randn(3, 2)

    def results(dtype):
        wide = [t if t is None else t.to(dtype) for t in (a, bias, by_pulled, by_value)]
        four = tuple(k.to(dtype) for k in lines)
        by_a = torch.empty_like(wide[0])
        wants = (True, True, True, True, True, biased)
        found = unbent(wide[0], four, wide[1], wide[2], wide[3], by_a, wants)
        return [*bent(wide[0], four, wide[1]), *found]

    for ours, exact in zip(results(torch.float32), results(torch.float64), strict=True):
        if exact is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


def test_the_kernel_writes_only_what_is_asked_for_and_keeps_nan(isa):
    a = torch.randn(2, 3, 40)
    a[1, 2, 7] = torch.nan
    lines = tuple(torch.rand(3, 40) for _ in range(4))
    pulled, value = bent(a, lines, None)
    assert pulled.isnan().sum() == 1
    assert value.isnan().sum() == 1
    by_pulled, by_value = torch.randn(2, 3, 40), torch.randn(2, 3)
    kept = by_pulled.clone()
    wants = (False, False, False, True, True, False)
    found = unbent(a, lines, None, by_pulled, by_value, None, wants)
    assert [f is None for f in found] == [True, True, True, False, False, True]
    assert torch.equal(by_pulled, kept)
    # in place
    whole = (True, *wants[1:])
    apart = unbent(a, lines, None, by_pulled, by_value, torch.empty_like(a), whole)
    within = unbent(a, lines, None, by_pulled, by_value, by_pulled, whole)
    assert within[0] is by_pulled
    torch.testing.assert_close(within[0], apart[0], rtol=0, atol=0, equal_nan=True)


def test_the_kernel_has_equal_bits_with_any_number_of_threads(isa):
    torch.manual_seed(0)
    a, lines = torch.randn(4, 9, 3000), tuple(torch.randn(9, 3000) for _ in range(4))
    results = []
    for threads in (1, 2, 5):
        pulled, value = torch.empty_like(a), torch.empty(4, 9)
        _native.relaxation_bend(a, lines, None, pulled, value, threads)
        results.append((pulled, value))
    assert all(torch.equal(results[0][i], r[i]) for r in results for i in (0, 1))


def test_the_binding_refuses_what_does_not_fit():
    a, lines = torch.ones(2, 3, 4), tuple(torch.ones(3, 4) for _ in range(4))
    out, value = torch.empty(2, 3, 4), torch.empty(2, 3)
    with pytest.raises(ValueError, match="lines"):
        _native.relaxation_bend(a, (*lines[:3], torch.ones(3, 5)), None, out, value, 1)
    with pytest.raises(TypeError, match="bias"):
        _native.relaxation_bend(a, lines, torch.ones(4).double(), out, value, 1)
    with pytest.raises(ValueError, match="pulled"):
        _native.relaxation_bend(a, lines, None, torch.empty(2, 3, 5), value, 1)


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
