"""The orthogonal fusion head."""

import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.nn import LateFusion, OrthogonalFusion
from pyrobust.nn.orthogonal_fusion import inverse_square_root


@pytest.mark.parametrize("center", [True, False])
def test_full_rows_are_orthonormal_and_centred(center):
    head = OrthogonalFusion([12, 7], 6, center=center)
    for m in range(2):
        rows = head.classifier(m)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(6), rtol=0, atol=1e-5)
        if center:
            assert float(rows.sum(1).abs().max()) < 1e-5


def test_row_normalises_each_row_by_itself():
    head = OrthogonalFusion([4], 9, orthogonal="row")
    rows = head.classifier(0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(9))
    assert float(rows.sum(1).abs().max()) < 1e-5


@pytest.mark.parametrize("orthogonal", ["full", "row"])
def test_gradcheck(orthogonal):
    head = OrthogonalFusion([6, 5], 4, orthogonal=orthogonal, dtype=torch.float64)
    features = [torch.randn(3, d, dtype=torch.float64, requires_grad=True) for d in (6, 5)]
    parameters = [p for p in head.parameters() if p.requires_grad]

    def run(*values):
        names = [name for name, _ in head.named_parameters()]
        state = dict(zip(names, values[2:], strict=True))
        output = torch.func.functional_call(head, state, values[:2])
        return output.logits, *output.modality_logits

    assert torch.autograd.gradcheck(run, (*features, *parameters))


def test_the_root_has_a_gradient_where_eigenvalues_agree():
    """An eigendecomposition's own gradient is NaN there."""
    matrix = torch.eye(3, dtype=torch.float64, requires_grad=True)
    inverse_square_root(matrix).sum().backward()
    assert bool(torch.isfinite(matrix.grad).all())
    moved = torch.diag(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)).requires_grad_()
    symmetric = lambda a: inverse_square_root((a + a.mT) / 2)  # noqa: E731
    assert torch.autograd.gradcheck(symmetric, (moved,))


def test_logits_are_the_scaled_sum():
    head = OrthogonalFusion([8, 6], 3)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p))
    features = [torch.randn(5, 8), torch.randn(5, 6)]
    output = head(*features)
    by_hand = head.bias + sum(
        head.scale[m] * (f @ head.classifier(m).mT) for m, f in enumerate(features)
    )
    torch.testing.assert_close(output.logits, by_hand)
    linear = head.to_linear()
    torch.testing.assert_close(linear(torch.cat(features, 1)), output.logits)
    assert linear.weight.shape == (3, 14)


def test_scales_start_at_a_tenth_and_state_travels():
    head = OrthogonalFusion([8, 6], 3)
    assert all(torch.equal(a, torch.full((3,), 0.1)) for a in head.scale)
    other = OrthogonalFusion([8, 6], 3)
    other.load_state_dict(head.state_dict())
    features = [torch.randn(5, 8), torch.randn(5, 6)]
    for twin in (other, copy.deepcopy(head)):
        assert torch.equal(twin(*features).logits, head(*features).logits)
    assert head.double()(*(f.double() for f in features)).logits.dtype == torch.float64


def test_late_fusion_packs():
    torch.manual_seed(0)
    encoders = [nn.Sequential(nn.Linear(d, 16), nn.ReLU()) for d in (10, 12)]
    model = LateFusion(encoders, OrthogonalFusion([16, 16], 4)).eval()
    x = [torch.randn(6, 10), torch.randn(6, 12)]
    packed = pyrobust.pack(model, bits=8, group_size=4)
    torch.testing.assert_close(packed(*x).logits, model(*x).logits, rtol=0.05, atol=0.02)


def test_refusals():
    with pytest.raises(ValueError, match=r'at most 3 .* got 4. orthogonal="row" has no such limit'):
        OrthogonalFusion([8, 4], 4)
    OrthogonalFusion([4], 4, center=False)
    with pytest.raises(ValueError, match="number of modalities must be at least 1"):
        OrthogonalFusion([], 2)
    with pytest.raises(ValueError, match="orthogonal must be one of full, row"):
        OrthogonalFusion([4], 2, orthogonal="none")
    head = OrthogonalFusion([8, 6], 3)
    with pytest.raises(ValueError, match="must be 2 modalities; got 1"):
        head(torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"modality 1 must have shape \(B, 6\)"):
        head(torch.zeros(1, 8), torch.zeros(1, 7))
    with pytest.raises(ValueError, match="encoders must number 2"):
        LateFusion([nn.Identity()], head)
    with pytest.raises(ValueError, match="must be 2 inputs"):
        LateFusion([nn.Identity(), nn.Identity()], head)(torch.zeros(1, 8))
