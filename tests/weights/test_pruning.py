"""SparseGPT inside layers, ratios by block, rules of layer-wise rates."""

import pytest
import torch
from torch import nn

from pyrobust.train import TempBalance
from pyrobust.weights import layer_sparsity, prune_, spectral_report


def correlated(count, columns):
    """Inputs of falling variance along random directions, as activations have."""
    spread = torch.arange(1, columns + 1) ** -0.7
    return torch.randn(count, columns) * spread @ torch.linalg.qr(torch.randn(columns, columns))[0]


def output_error(layer, before, x):
    return float((x @ (layer.weight.detach() - before).T).square().mean())


@pytest.mark.parametrize("columns", [40, 200])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_sparse_gpt_meets_the_ratio_and_keeps_the_output_best(columns, ratio):
    x, errors = correlated(400, columns), {}
    start = nn.Linear(columns, 24)
    for method in ("magnitude", "wanda", "sparsegpt"):
        layer = nn.Linear(columns, 24)
        layer.load_state_dict(start.state_dict())
        prune_(layer, {"weight": ratio}, method, {"weight": x})
        assert int((layer.weight == 0).sum()) == pytest.approx(ratio * 24 * columns, abs=24)
        errors[method] = output_error(layer, start.weight.detach(), x)
    assert errors["sparsegpt"] < 0.8 * min(errors["magnitude"], errors["wanda"])


def test_one_pruned_weight_is_made_up_for_as_by_least_squares():
    x, layer = correlated(500, 12).double(), nn.Linear(12, 1, bias=False).double()
    before = layer.weight.detach().clone()
    prune_(layer, {"weight": 1 / 12}, "sparsegpt", {"weight": x})
    (gone,) = (layer.weight[0] == 0).nonzero().flatten().tolist()
    # columns before the pruned one stay; those behind it are free: damped least squares
    assert torch.equal(layer.weight[0, :gone], before[0, :gone])
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.double)
    behind = slice(gone + 1, 12)
    step = torch.linalg.solve(hessian[behind, behind], hessian[behind, gone] * before[0, gone])
    torch.testing.assert_close(layer.weight[0, behind], before[0, behind] + step)
    cost = (
        before[0].square()
        / torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal().square()
    )
    assert gone == int(cost.argmin())


def test_inputs_without_correlation_leave_magnitude_pruning():
    layer, twin = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 6, 3)
    twin.load_state_dict(layer.state_dict())
    prune_(layer, {"weight": 0.5})
    prune_(twin, {"weight": 0.5}, "sparsegpt", {"weight": torch.eye(18)})
    torch.testing.assert_close(twin.weight, layer.weight)


def test_inputs_that_never_occur_go_first():
    x = torch.randn(50, 6)
    x[:, 2] = 0
    layer = nn.Linear(6, 4)
    prune_(layer, {"weight": 1 / 6}, "sparsegpt", {"weight": x})
    assert bool((layer.weight[:, 2] == 0).all())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_refusals(method):
    layer = nn.Linear(6, 4)
    for inputs, message in (
        (None, "must hold calibration inputs"),
        ({"weight": torch.randn(5, 7)}, r"must be \(N, 6\)"),
        ({"weight": torch.full((5, 6), torch.nan)}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(layer, {"weight": 0.5}, method, inputs)
    with pytest.raises(ValueError, match="weights of the model, such as weight, bias; got '0'"):
        prune_(layer, {"0": 0.5})
    with pytest.raises(ValueError, match=r"the ratio of 'weight' must lie in \[0, 1\); got 1\.0"):
        prune_(layer, {"weight": 1.0})


def test_layers_of_a_block_share_a_ratio():
    alphas, numel = torch.tensor([2.0, 4.0, 5.0, 3.0, 6.0]), torch.tensor([10, 20, 30, 40, 50])
    labels = ["a", "b", "a", "b", "c"]
    ratios = layer_sparsity(alphas, numel, 0.5, 0.2, blocks=labels)
    assert ratios[0] == ratios[2]
    assert ratios[1] == ratios[3]
    assert ratios[4] > ratios[0]
    assert float((ratios * numel).sum() / numel.sum()) == pytest.approx(0.5, abs=1e-9)
    means = torch.tensor([3.5, 3.5, 3.5, 3.5, 6.0])
    torch.testing.assert_close(ratios, layer_sparsity(means, numel, 0.5, 0.2))
    with pytest.raises(ValueError, match="one label a layer"):
        layer_sparsity(alphas, numel, 0.5, blocks=["a"])


def test_rules_of_layer_wise_rates():
    widths = [16, 64, 16, 48, 12]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])  # noqa: RUF007
    alphas = {row.name: row.alpha for row in spectral_report(model)}
    rates = {rule: TempBalance(model, rule=rule).ratios() for rule in ("rank", "sqrt", "log2")}
    order = sorted(alphas, key=alphas.get)
    assert [rates["rank"][n] for n in order] == pytest.approx([0.5, 0.5 + 1 / 3, 0.5 + 2 / 3, 1.5])
    for rule, power in (("sqrt", torch.sqrt), ("log2", torch.log2)):
        expected = power(torch.tensor([alphas[n] for n in order], dtype=torch.float64))
        expected = expected / expected.mean()
        assert [rates[rule][n] for n in order] == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match="rule must be one of"):
        TempBalance(model, rule="cubic")


def test_shares_of_blocks_of_columns_add_up():
    """Three blocks of 128 columns: 38.4 weights each, 115 in all and not three times 38."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(384, 1, bias=False)
    prune_(
        layer, {"weight": 0.3}, "sparsegpt", {"weight": torch.randn(500, 384, generator=generator)}
    )
    assert int((layer.weight == 0).sum()) == 115
