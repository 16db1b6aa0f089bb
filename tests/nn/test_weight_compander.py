"""Weight Compander: derivatives, function preservation, folding, and its effect on the weights."""

import copy
import io

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pyrobust.nn import (
    WeightCompander,
    apply_weight_compander,
    compander_param_groups,
    fold_weight_compander,
    weight_compander,
    weight_statistics,
)

from ..two_processes import run_two_processes


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


def mlp():
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def test_value_is_a_times_arctan():
    compander = WeightCompander(2.0, 1.5, learnable=False)
    v = torch.tensor([-3.0, 0.0, 1.5])
    torch.testing.assert_close(compander(v), 2 * torch.atan(v / 1.5))
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(compander(v), 2 * torch.atan(v / 1.5))
    half = v.half()
    assert torch.equal(compander(half), (2 * torch.atan(half.float() / 1.5)).half())


def test_derivatives_match_the_formulas():
    compander = WeightCompander(0.7, 0.9).double()
    v = torch.randn(50, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, dtype=torch.float64)
    (compander(v) * upstream).sum().backward()
    a, b = compander.a.item(), compander.b.item()
    torch.testing.assert_close(
        v.grad, upstream * (a / b) / (1 + (v.detach() / b) ** 2), rtol=0, atol=1e-12
    )
    grad_a = (upstream * torch.atan(v.detach() / b)).sum()
    grad_b = -(upstream * a * v.detach() / (b**2 + v.detach() ** 2)).sum()
    # the scales are trained through their logarithms: d/d log a = a d/da
    assert compander.log_a.grad.item() == pytest.approx(a * grad_a.item(), abs=1e-12)
    assert compander.log_b.grad.item() == pytest.approx(b * grad_b.item(), abs=1e-12)


def test_gradcheck():
    compander = WeightCompander(1.1, 0.8).double()
    v = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, la, lb: torch.func.functional_call(compander, {"log_a": la, "log_b": lb}, v),
        (v, compander.log_a.detach().requires_grad_(), compander.log_b.detach().requires_grad_()),
    )


def test_range_oddness_and_identity_limit():
    compander = WeightCompander(0.5, 0.5, learnable=False)
    huge = torch.tensor([1e30, -1e30, float("inf")], requires_grad=True)
    out = compander(huge)
    assert (out.abs() <= 0.5 * torch.pi / 2).all()
    out.sum().backward()
    assert torch.equal(huge.grad, torch.zeros(3))
    v = torch.randn(100)
    assert torch.equal(compander(-v), -compander(v))
    near_identity = WeightCompander(100.0, 100.0, learnable=False)
    v = torch.linspace(-1, 1, 101)
    assert (near_identity(v) - v).abs().max() < 1e-4


def test_right_inverse():
    compander = WeightCompander(0.3, 0.4, learnable=False)
    v = torch.linspace(-4, 4, 401)
    recovered = compander.right_inverse(compander(v))
    assert ((recovered - v).abs() / (1 + v.abs())).max() < 1e-4
    with pytest.warns(UserWarning, match="1 of 3 weights"):
        compander.right_inverse(torch.tensor([0.1, 0.0, 0.46]))


def test_apply_keeps_the_function_and_fold_restores_the_layout():
    model = small_cnn().eval()
    keys = sorted(model.state_dict())
    x = torch.randn(5, 1, 8, 8)
    before = model(x)
    apply_weight_compander(model, a=1.0, b=1.0)
    assert (model(x) - before).abs().max() < 1e-5
    companded = model(x)
    fold_weight_compander(model)
    assert sorted(model.state_dict()) == keys
    assert (model(x) - companded).abs().max() < 1e-6
    assert isinstance(model[0].weight, nn.Parameter)


def test_default_scale_is_four_standard_deviations():
    layer = nn.Linear(30, 40)
    spread = layer.weight.detach().std(unbiased=False).item()
    weight_compander(layer)
    assert layer.parametrizations.weight[0].a.item() == pytest.approx(4 * spread, rel=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(30, 40), nn.Conv2d(3, 8, 3)])
def test_it_is_a_parametrization_like_any_other(layer):
    plain, x = (
        copy.deepcopy(layer),
        torch.randn(2, *([30] if layer.weight.ndim == 2 else [3, 5, 5])),
    )
    keys, before = set(layer.state_dict()), layer(x)
    parametrize.register_parametrization(layer, "weight", WeightCompander())
    scale = layer.parametrizations.weight[0].a.item()
    assert scale == pytest.approx(4 * plain.weight.std(unbiased=False).item(), rel=1e-5)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(layer)
    with torch.no_grad():  # assigning goes through the inverse and keeps the scales
        layer.weight = 0.5 * layer.weight
    assert layer.parametrizations.weight[0].a.item() == scale
    torch.testing.assert_close(layer.weight, 0.5 * plain.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(twin(x), before, rtol=1e-5, atol=1e-6)
    other = copy.deepcopy(plain)
    parametrize.register_parametrization(other, "weight", WeightCompander(1.0, 1.0))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    value = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert torch.equal(layer.weight, value)
    assert type(layer) is type(plain)
    assert set(layer.state_dict()) == keys
    parametrize.register_parametrization(plain, "weight", WeightCompander(1.0))
    original = plain.parametrizations.weight.original.detach().clone()
    parametrize.remove_parametrizations(plain, "weight", leave_parametrized=False)
    assert torch.equal(plain.weight, original)


def test_scales_for_each_channel():
    layer = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 8).reshape(8, 1, 1, 1))
    spread, x = layer.weight.detach().flatten(1).std(1, unbiased=False), torch.randn(2, 3, 5, 5)
    before, saved = layer(x), copy.deepcopy(layer)
    weight_compander(layer, granularity="channel")
    compander = layer.parametrizations.weight[0]
    torch.testing.assert_close(compander.a.flatten(), 4 * spread)
    assert compander.log_a.shape == (8, 1, 1, 1)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert compander.log_b.grad.abs().min() > 0
    weight_compander(saved, a=3.0, granularity="channel")
    saved.load_state_dict(layer.state_dict())
    assert torch.equal(saved.weight, layer.weight)
    scales = compander_param_groups(layer, lr=0.1, weight_decay=0.1)[1]["params"]
    assert sum(p.numel() for p in scales) == 16
    fixed = weight_compander(nn.Linear(4, 3), learnable=False, granularity="channel")
    assert fixed.parametrizations.weight[0].log_a.shape == (3, 1)
    assert len(list(fixed.parameters())) == 2
    with pytest.raises(ValueError, match="granularity must be one of"):
        WeightCompander(granularity="group")
    flat = nn.Linear(4, 3)
    with torch.no_grad():
        flat.weight[1] = 0.5
    with pytest.raises(ValueError, match="no spread"):
        weight_compander(flat, granularity="channel")


def test_parameter_groups():
    model = apply_weight_compander(small_cnn())
    weights, scales = compander_param_groups(model, lr=0.1, weight_decay=5e-4)
    assert scales["weight_decay"] == 0.0
    assert scales["lr"] == pytest.approx(0.01)
    assert len(scales["params"]) == 4
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for g in (weights, scales) for p in g["params"]) == total


def test_survives_copying_saving_compiling_and_autocast():
    model = apply_weight_compander(small_cnn()).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = apply_weight_compander(small_cnn()).eval()
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other(x), model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def parallel_part(rank):
    """Two steps on half of the batch in either of two processes."""
    torch.manual_seed(0)
    model = apply_weight_compander(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, y = torch.randn(2, 20, 6), torch.randint(3, (2, 20))
    parallel = nn.parallel.DistributedDataParallel(model) if rank is not None else model
    optimizer = torch.optim.SGD(compander_param_groups(model, lr=0.1, weight_decay=0.01))
    for images, labels in zip(x, y, strict=True):
        half = slice(None) if rank is None else slice(10 * rank, 10 * rank + 10)
        optimizer.zero_grad()
        F.cross_entropy(parallel(images[half]), labels[half]).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    alone = parallel_part(None)
    for part in run_two_processes(parallel_part, tmp_path):
        assert part.keys() == alone.keys()
        for name, value in part.items():
            torch.testing.assert_close(value, alone[name])
    torch.manual_seed(0)
    start = apply_weight_compander(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    assert all(not torch.equal(value, alone[name]) for name, value in start.named_parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightCompander(0.0, 1.0), ValueError, "a must be finite and positive"),
        (lambda: WeightCompander(1.0, -2.0), ValueError, "b must be finite and positive"),
        (lambda: weight_compander(nn.ReLU()), ValueError, "no tensor named 'weight'"),
        (lambda: weight_compander(weight_compander(nn.Linear(3, 3))), ValueError, "already"),
        (lambda: apply_weight_compander(nn.ReLU()), ValueError, "no module of the listed types"),
        (
            lambda: apply_weight_compander(nn.Linear(2, 2), skip=["head"]),
            ValueError,
            "skip names no module: head",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integer_sparse_and_shared_weights_are_refused():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="dense floating-point"):
        weight_compander(layer)
    layer.weight = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    with pytest.raises(TypeError, match="dense floating-point"):
        weight_compander(layer)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        apply_weight_compander(nn.Sequential(first, second))


def test_unbalanced_slope_warns():
    with pytest.warns(UserWarning, match="slope a/b"):
        WeightCompander(0.14, 1.0)


def train(model, groups, x, y, *, seed, epochs=60):
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def digits_pair(seed):
    """Plain and companded training from the same start, on 120 digits: models and accuracies."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    torch.manual_seed(seed)
    plain = mlp()
    companded = apply_weight_compander(copy.deepcopy(plain))
    train(
        plain,
        [{"params": plain.parameters(), "lr": 0.05, "weight_decay": 5e-4}],
        x[:120],
        y[:120],
        seed=seed,
    )
    train(
        companded,
        compander_param_groups(companded, lr=0.05, weight_decay=5e-4),
        x[:120],
        y[:120],
        seed=seed,
    )
    with torch.no_grad():
        accuracy = [(m(x[120:]).argmax(1) == y[120:]).double().mean() for m in (plain, companded)]
    return plain, companded, [float(a) for a in accuracy]


def test_flattens_the_weight_distribution():
    plain, companded, _ = digits_pair(0)
    before = weight_statistics(plain)["2"]
    after = weight_statistics(companded)["2"]
    assert after["kurtosis"] <= before["kurtosis"] - 0.5
    assert after["peak"] <= 0.7 * before["peak"]


@pytest.mark.slow
def test_accuracy_is_no_worse_in_the_paired_mean_of_ten_seeds():
    pairs = [digits_pair(seed)[2] for seed in range(10)]
    plain, companded = zip(*pairs, strict=True)
    t = stats.ttest_rel(companded, plain)
    gain = sum(companded) / 10 - sum(plain) / 10
    print(f"paired gain {gain:.4f}, t = {t.statistic:.2f}, p = {t.pvalue:.3f}")
    assert gain >= 0
