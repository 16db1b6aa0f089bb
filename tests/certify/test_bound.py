"""bound: against exact rationals, corners, and its own unfolded form."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

from pyrobust import Interval
from pyrobust import nn as rnn
from pyrobust.certify import bound, margin_specification


def network(classes=4):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


def test_a_linear_model_is_bounded_exactly_up_to_rounding():
    weight, x = torch.randn(3, 5), torch.rand(2, 5)
    model = nn.Linear(5, 3)
    model.weight.data = weight
    model.requires_grad_(False)
    spec = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.25, -3.0]])
    for rounding in ("real", "deployed"):
        box = Interval.ball(x, 0.1, rounding=rounding)
        result = bound(model, box, spec)
        assert result.rounding == rounding
        for b in range(2):
            for s in range(2):
                rows = [Fraction(v) for v in spec[s].tolist()]
                total = [Fraction(0)] * 2
                columns = weight.T.tolist()
                ends = zip(columns, box.lower[b].tolist(), box.upper[b].tolist(), strict=True)
                for column, low, high in ends:
                    slope = sum(r * Fraction(w) for r, w in zip(rows, column, strict=True))
                    products = slope * Fraction(low), slope * Fraction(high)
                    total = [total[0] + min(products), total[1] + max(products)]
                shift = sum(r * Fraction(v) for r, v in zip(rows, model.bias.tolist(), strict=True))
                low, high = float(result.lower[b, s]), float(result.upper[b, s])
                assert Fraction(low) <= total[0] + shift
                assert total[1] + shift <= Fraction(high)
                assert high - low <= float(total[1] - total[0]) * 1.0001 + 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
def test_folding_the_specification_is_tighter_and_contains_the_values(packed, rounding):
    model = network()
    if packed:
        model[2] = rnn.PackedLinear.from_linear(model[2], bits=4, group_size=4)
    x, labels = torch.rand(5, 6), torch.tensor([0, 1, 2, 3, 0])
    spec = margin_specification(labels, 4)
    box = Interval.ball(x, 0.05, rounding=rounding)
    margins = bound(model, box, spec)
    loose = bound(nn.Sequential(model, nn.Identity(), nn.Flatten(0, 0)), box, spec)
    assert margins.shape == loose.shape == (5, 3)
    assert bool((margins.width() <= loose.width() + 1e-5).all())
    assert bool((margins.width() < 0.9 * loose.width()).any())
    if rounding == "nearest":
        return
    for _ in range(50):
        corner = torch.where(torch.rand(5, 6) > 0.5, box.upper, box.lower)
        logits = model(corner).double() if rounding == "deployed" else exact(model)(corner.double())
        values = torch.einsum("bsk,bk->bs", spec.double(), logits)
        slack = 0.0 if rounding == "deployed" else 1e-13
        assert bool((margins.lower - slack <= values).all())
        assert bool((values <= margins.upper + slack).all())


def exact(model):
    """The model in float64, with the stored weights."""
    layers = [
        layer if not isinstance(layer, rnn.PackedLinear) else float_layer(layer) for layer in model
    ]
    return copy.deepcopy(nn.Sequential(*layers)).double()


def float_layer(layer):
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.weight.data, twin.bias.data = layer.dequantize(), layer.bias.data
    return twin


def test_without_a_specification_it_is_the_model_itself():
    model, box = network(), Interval.ball(torch.rand(2, 6), 0.1)
    assert torch.equal(bound(model, box).lower, model(box).lower)


def test_a_layer_changed_in_place_afterwards_is_not_folded():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, x):
            y = self.layer(x)
            y *= 0.5
            return y

    model, box = Halved(), Interval.ball(torch.rand(1, 3), 0.1)
    result = bound(model, box, torch.eye(2))
    torch.testing.assert_close(result.upper, model(box).upper, rtol=1e-4, atol=1e-6)


def test_margins_take_the_other_classes_from_the_label():
    spec = margin_specification(torch.tensor([1]), 3)
    logits = torch.tensor([2.0, 7.0, 3.0])
    assert (spec[0] @ logits).tolist() == [5.0, 4.0]


def test_gradients_reach_box_and_weights_through_the_specification():
    model = network().double()
    spec = margin_specification(torch.tensor([1, 2]), 4)
    x = torch.rand(2, 6, dtype=torch.float64)

    def worst(weight, x):
        box = Interval(x - 0.1, x + 0.1, rounding="nearest")
        parameters = {"2.weight": weight}
        return torch.func.functional_call(_Bounded(model, spec), parameters_of(parameters), (box,))

    def parameters_of(named):
        return {f"model.{name}": value for name, value in named.items()}

    weight = model[2].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(worst, (weight, x.requires_grad_()))


class _Bounded(nn.Module):
    def __init__(self, model, spec):
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, box):
        return bound(self.model, box, self.spec).lower


def test_bad_arguments_of_bound():
    model, box = network(), Interval.ball(torch.rand(2, 6), 0.1)
    with pytest.raises(TypeError, match="x must be an Interval; got Tensor"):
        bound(model, torch.rand(2, 6))
    with pytest.raises(ValueError, match=r"spec must have shape \(\*, 4\); got \(1, 3\)"):
        bound(model, box, torch.ones(1, 3))
    with pytest.raises(ValueError, match="method must be one of ibp"):
        bound(model, box, method="magic")


class Ending(nn.Module):
    """A network whose last layer's input changes after it was read, or is named."""

    def __init__(self, named):
        super().__init__()
        self.first, self.last, self.named = nn.Linear(6, 5), nn.Linear(5, 4), named

    def forward(self, x):
        entering = self.first(x)
        made = self.last(input=entering) if self.named else self.last(entering)
        if not self.named:
            entering += 100.0
        return made


@pytest.mark.parametrize("named", [False, True])
def test_a_layer_whose_input_changed_afterwards_is_not_folded_with_it(named):
    model, x = Ending(named).eval(), torch.rand(3, 6)
    with torch.no_grad():
        result = bound(model, Interval.ball(x, 0.0), torch.eye(4))
        assert bool(result.contains(model(x)).all())


def test_specifications_must_be_finite_and_margins_need_two_classes():
    box = Interval.ball(torch.rand(2, 6), 0.1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="spec must be finite"):
            bound(network(), box, torch.full((1, 4), value))
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        margin_specification(torch.tensor([0]), 1)


@pytest.mark.parametrize("seed", range(3))
def test_folding_in_float64_pays_for_its_rounding(seed):
    torch.manual_seed(seed)
    layer = nn.Linear(40, 6).double().requires_grad_(False)
    x, spec = torch.randn(1, 40, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    result = bound(layer, Interval.ball(x, 0.0), spec)
    logits = [
        Fraction(b)
        + sum(Fraction(w) * Fraction(v) for w, v in zip(row, x[0].tolist(), strict=True))
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]
    for row, lower, upper in zip(spec.tolist(), result.lower[0], result.upper[0], strict=True):
        exact = sum(Fraction(s) * z for s, z in zip(row, logits, strict=True))
        assert Fraction(lower.item()) <= exact <= Fraction(upper.item())
