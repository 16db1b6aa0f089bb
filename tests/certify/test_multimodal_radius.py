"""Certified radii of late fusion: attacked inside, broken outside."""

import copy

import pytest
import torch
from torch import nn

from pyrobust.certify import (
    ModalityLipschitz,
    certify_multimodal,
    fused_radius,
    modality_lipschitz,
    multimodal_radius,
)
from pyrobust.evaluate import multimodal_pgd
from pyrobust.nn import LateFusion, OrthogonalFusion, PackedLinear


def model_of(seed=0, classes=4, sizes=(10, 8), width=12):
    torch.manual_seed(seed)
    encoders = [nn.Sequential(nn.Linear(d, width), nn.Tanh()) for d in sizes]
    model = LateFusion(encoders, OrthogonalFusion([width] * len(sizes), classes)).double().eval()
    with torch.no_grad():
        for scale in model.head.scale:
            scale.uniform_(0.2, 1.5)
        model.head.bias.normal_(0, 0.1)
    return model


def inputs_of(count, sizes=(10, 8)):
    return [torch.randn(count, d, dtype=torch.float64) for d in sizes]


@pytest.fixture(scope="module")
def attacked():
    model = model_of()
    torch.manual_seed(1)
    inputs = inputs_of(500)
    constants = modality_lipschitz(model, method="spectral")
    output = model(*inputs)
    top = output.logits.argmax(1)
    radii = {
        kind: multimodal_radius(model.head, output.modality_logits, value)
        for kind, value in (("class", constants.per_class), ("pair", constants.encoder))
    }
    return model, inputs, top, radii


def broken(model, inputs, top, radius, modalities=None):
    """How many samples an attack of each one's own radius flips."""
    unit = [x / radius.view(-1, 1) for x in inputs]  # one radius for all: 1 in these units

    def scaled(*moved):
        return model(*(x * radius.view(-1, 1) for x in moved)).logits

    found = multimodal_pgd(scaled, unit, top, eps=1.0, steps=40, restarts=5, modalities=modalities)
    return int((scaled(*found).argmax(1) != top).sum())


@pytest.mark.parametrize("kind", ["class", "pair"])
def test_no_attack_inside_flips(attacked, kind):
    model, inputs, top, radii = attacked
    assert broken(model, inputs, top, 0.999 * radii[kind].clamp(min=1e-6)) == 0


def test_the_attack_has_power(attacked):
    model, inputs, top, radii = attacked
    flipped = broken(model, inputs, top, 4 * radii["pair"].clamp(min=1e-6))
    print(flipped, "of 500 flip at four times the pairwise radius")
    assert flipped > 250


def test_the_pairwise_bound_is_the_tighter(attacked):
    radii = attacked[3]
    assert bool((radii["pair"] >= radii["class"] * (1 - 1e-12)).all())
    assert float(radii["pair"].detach().mean()) > 1.1 * float(radii["class"].detach().mean())


@pytest.mark.parametrize("modality", [0, 1])
def test_one_modality(attacked, modality):
    model, inputs, top, radii = attacked
    constants = modality_lipschitz(model, method="spectral")
    logits = model(*inputs).modality_logits
    radius = multimodal_radius(model.head, logits, constants, attacked=modality)
    assert bool((radius >= radii["pair"] * (1 - 1e-12)).all())
    assert broken(model, inputs, top, 0.999 * radius.clamp(min=1e-6), [modality]) == 0


def test_thousands_of_linear_models_have_exactly_the_pairwise_radius():
    """Without encoders the nearest input of another class is known in closed form."""
    cases = 0
    for seed in range(40):
        torch.manual_seed(seed)
        head = OrthogonalFusion([7, 6, 9], 4).double()
        with torch.no_grad():
            for scale in head.scale:
                scale.normal_()
            head.bias.normal_(0, 0.3)
        inputs = [torch.randn(100, d, dtype=torch.float64) for d in (7, 6, 9)]
        with torch.no_grad():
            output = head(*inputs)
            rows = head.to_linear()
            joined = torch.cat(inputs, 1)
            top = output.logits.argmax(1)
            gap = rows.weight[top][:, None] - rows.weight
            margin = output.logits.gather(1, top[:, None]) - output.logits
            own = nn.functional.one_hot(top, 4).bool()
            distance = (margin / gap.norm(dim=2)).masked_fill(own, torch.inf)
            pair = multimodal_radius(head, output.modality_logits, torch.ones(3))
            norms = torch.stack([head.classifier(m).norm(dim=1) for m in range(3)])
            wide = multimodal_radius(head, output.modality_logits, norms)
            nearest = distance.min(1)
            torch.testing.assert_close(pair, nearest.values)
            assert bool((wide <= pair * (1 + 1e-12)).all())
            step = gap[torch.arange(100), nearest.indices]
            step = step / step.norm(dim=1, keepdim=True)
            inside, outside = (
                rows(joined - s * pair[:, None] * step).argmax(1) for s in (1 - 1e-9, 1 + 1e-9)
            )
        assert torch.equal(inside, top)
        assert not bool((outside == top).any())
        cases += len(top)
    assert cases == 4000


def test_negative_scales_stay_sound():
    """The published formula without absolute values certifies too much here."""
    model = model_of(3)
    with torch.no_grad():
        for scale in model.head.scale:
            scale.copy_(torch.tensor([1.0, -1.01, 1.0, -1.01]))
    inputs = inputs_of(300)
    constants = modality_lipschitz(model, method="spectral").per_class
    output = model(*inputs)
    top = output.logits.argmax(1)
    radius = multimodal_radius(model.head, output.modality_logits, constants)
    assert broken(model, inputs, top, 0.999 * radius.clamp(min=1e-6)) == 0
    # without |.| a scale of the other sign cancels in the denominator, and the radius explodes
    rates = torch.stack(list(model.head.scale)).detach() * constants
    signed = (rates[:, :, None] + rates[:, None, :]).square().sum(0).sqrt()[top]
    margin = output.logits.gather(1, top[:, None]) - output.logits
    own = nn.functional.one_hot(top, 4).bool()
    published = (margin / signed).masked_fill(own, torch.inf).amin(1).detach()
    assert broken(model, inputs, top, 0.999 * published.clamp(min=1e-6)) > 0


def test_scaling_and_permuting_change_nothing():
    model = model_of(5)
    logits = [h.detach() for h in model(*inputs_of(50)).modality_logits]
    constants = torch.rand(2, 4, dtype=torch.float64) + 0.5
    before = multimodal_radius(model.head, logits, constants)
    with torch.no_grad():
        for p in (*model.head.scale, model.head.bias):
            p.mul_(3.7)
    torch.testing.assert_close(multimodal_radius(model.head, logits, constants), before)
    turned = OrthogonalFusion([12, 12], 4).double()
    with torch.no_grad():
        for a, b in zip(turned.scale, reversed(list(model.head.scale)), strict=True):
            a.copy_(b)
        turned.bias.copy_(model.head.bias)
    torch.testing.assert_close(multimodal_radius(turned, logits[::-1], constants.flip(0)), before)


def test_one_modality_reduces_to_margin_over_rates():
    head = OrthogonalFusion([9], 3).double()
    with torch.no_grad():
        head.scale[0].fill_(1.0)
    logits = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
    rates = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    radius = multimodal_radius(head, [logits], rates)
    assert float(radius) == pytest.approx(min(1.5 / 1.5, 3.0 / 2.5))
    lost = multimodal_radius(head, [logits], rates, torch.tensor([1]))
    assert float(lost) == 0.0


def test_a_packed_classifier():
    model = model_of(7)
    linear = model.head.to_linear().float()
    packed = PackedLinear.from_linear(linear, bits=4, group_size=12)
    inputs = inputs_of(200)
    features = [f.detach() for f in model.features(*inputs)]
    constants = modality_lipschitz(model, method="spectral").encoder
    radius = fused_radius(packed, features, constants)
    weight, bias = packed.dequantize().double(), packed.bias.detach().double()

    def fused(*x):
        return torch.cat(model.features(*x), 1) @ weight.mT + bias

    top = fused(*inputs).argmax(1)
    assert float(radius.mean()) > 0
    unit = [x / radius.clamp(min=1e-6).view(-1, 1) for x in inputs]
    scaled = lambda *x: fused(*(v * radius.clamp(min=1e-6).view(-1, 1) for v in x))  # noqa: E731
    found = multimodal_pgd(scaled, unit, top, eps=0.999, steps=40, restarts=3)
    assert int((scaled(*found).argmax(1) != top).sum()) == 0
    plain = fused_radius(linear, features, constants)
    tight = multimodal_radius(model.head, model(*inputs).modality_logits, constants)
    torch.testing.assert_close(plain, tight.detach(), rtol=1e-3, atol=1e-5)


def test_certificates_say_whether_they_are_proven():
    model, inputs = model_of(9), inputs_of(64)
    proven = certify_multimodal(model, inputs)
    assert proven.certified
    assert proven.alpha == 0.0
    loader = [(inputs, torch.zeros(64, dtype=torch.int64))]
    measured = modality_lipschitz(model, loader, "empirical")
    estimate = certify_multimodal(model, inputs, measured)
    assert not estimate.certified
    assert "measured at samples" in estimate.assumption
    assert bool(
        (measured.per_class <= modality_lipschitz(model, method="spectral").per_class).all()
    )


def test_empirical_constants_are_the_largest_gradients():
    model, inputs = model_of(11), inputs_of(7)
    measured = modality_lipschitz(model, [(inputs, None)], "empirical").per_class
    for m in range(2):
        encoder, rows = model.encoders[m], model.head.classifier(m).detach()
        jacobian = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda v, e=encoder, r=rows: r @ e(v), x)
                for x in inputs[m]
            ]
        )
        torch.testing.assert_close(measured[m], jacobian.norm(dim=-1).amax(0))


def test_refusals():
    model, inputs = model_of(13), inputs_of(2)
    logits = model(*inputs).modality_logits
    measured = ModalityLipschitz(torch.ones(2, 4), None, False, "empirical")
    with pytest.raises(ValueError, match="certified=True needs proven constants; got empirical"):
        multimodal_radius(model.head, logits, measured, certified=True)
    with pytest.raises(ValueError, match=r"lipschitz must have shape \(2, 4\) or \(2,\)"):
        multimodal_radius(model.head, logits, torch.ones(3))
    with pytest.raises(ValueError, match="must be positive and finite"):
        multimodal_radius(model.head, logits, torch.zeros(2))
    with pytest.raises(ValueError, match="attacked must be below 2"):
        multimodal_radius(model.head, logits, torch.ones(2), attacked=2)
    with pytest.raises(ValueError, match="needs a loader with at least one batch"):
        modality_lipschitz(model, [])
    with pytest.raises(ValueError, match="evaluation mode"):
        modality_lipschitz(model.train(), method="spectral")
    rounding = PackedLinear(24, 4, group_size=8, activations="int8")
    with pytest.raises(NotImplementedError, match="rounds its activations"):
        fused_radius(rounding, [torch.zeros(1, 12)] * 2, torch.ones(2))


def test_outputs_that_are_not_finite_are_refused():
    model, inputs = model_of(5), inputs_of(3)
    inputs[0][1] = torch.nan
    with pytest.raises(ValueError, match="the model's logits must be finite"):
        certify_multimodal(model, inputs)


def test_margins_are_those_of_the_real_function():
    """Float32 logits put a class in front that exact arithmetic puts behind."""
    torch.manual_seed(0)
    encoders = [nn.Sequential(nn.Linear(400, 12), nn.Tanh()) for _ in range(2)]
    model = LateFusion(encoders, OrthogonalFusion([12, 12], 4)).eval()
    inputs = [torch.randn(64, 400) for _ in range(2)]
    exact = copy.deepcopy(model).double()
    wide = [x.double() for x in inputs]
    wrong = 0
    with torch.no_grad():
        for sample in range(64):
            own = [x[sample : sample + 1] for x in inputs]
            true = [x[sample : sample + 1] for x in wide]
            first, second = exact(*true).logits.topk(2).indices[0].tolist()
            for net in (model, exact):
                net.head.bias.zero_()
            # within rounding of a tie, the true winner ahead or behind
            gap = model(*own).logits[0, first] - model(*own).logits[0, second]
            for net in (model, exact):
                net.head.bias[second] = gap
            certificate = certify_multimodal(model, own)
            answer = exact(*true).logits.argmax(1)
            wrong += int(model(*own).logits.argmax(1) != answer)
            assert int(certificate.prediction) in (-1, int(answer))
    assert wrong > 5
