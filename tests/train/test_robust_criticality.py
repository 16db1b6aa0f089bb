"""Module robust criticality: invariants, a trust-region oracle, resumable scans, refusals."""

import copy
import json

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.nn import PackedLinear
from pyrobust.train import Criticality, criticality_modules, module_robust_criticality
from pyrobust.weights import Patcher


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def batches(count=2):
    return [(torch.rand(20, 1, 4, 4), torch.randint(3, (20,))) for _ in range(count)]


def test_it_is_never_negative_grows_with_the_ball_and_leaves_the_model_alone():
    model, data = network().train(), batches()
    before = copy.deepcopy(model.state_dict())
    rises = []
    for epsilon in (0.0, 0.05, 0.1, 0.2):
        packed = {}
        table = module_robust_criticality(model, data, epsilon=epsilon, perturbations=packed)
        assert list(table) == ["0", "5", "7"] == list(packed)
        for row in table.values():
            assert row.loss_rise >= 0
            assert row.distance <= epsilon * (1 + 1e-5)
        rises.append([row.loss_rise for row in table.values()])
    assert rises[0] == [0, 0, 0]
    assert (np.diff(rises, axis=0) >= -1e-3).all()
    assert np.min(rises[-1]) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@torch.no_grad()
def mean_loss(model, data):
    return sum(float(F.cross_entropy(model(x), y)) for x, y in data) / len(data)


def test_the_worst_perturbation_is_kept_in_eight_bits():
    model, data, packed = network().eval(), batches(), {}
    table = module_robust_criticality(model, data, epsilon=0.2, perturbations=packed)
    base = mean_loss(model, data)
    for name, row in table.items():
        with Patcher(model) as patcher:
            patcher.apply(packed[name])
            assert mean_loss(model, data) - base == pytest.approx(row.loss_rise, rel=0.02)


def test_squared_loss_of_one_layer_is_a_trust_region_problem():
    """max |A (w + d) - b|^2 / n over |d| <= r, by SLSQP from several starts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    layer = nn.Linear(4, 2, bias=False).double()
    model = nn.Sequential(layer)
    row = module_robust_criticality(
        model, [(x, y)], epsilon=0.3, lr=0.5, epochs=200, loss_fn=F.mse_loss
    )["0"]
    w = layer.weight.detach().numpy()
    radius = 0.3 * np.linalg.norm(w)

    def rise(flat):
        moved = x.numpy() @ (w + flat.reshape(w.shape)).T - y.numpy()
        return (moved**2).mean() - ((x.numpy() @ w.T - y.numpy()) ** 2).mean()

    ball = {"type": "ineq", "fun": lambda d: radius**2 - d @ d}
    best = 0.0
    for _ in range(10):
        start = np.random.default_rng(_).standard_normal(w.size)
        start *= radius / np.linalg.norm(start)
        found = scipy.optimize.minimize(
            lambda d: -rise(d), start, method="SLSQP", constraints=[ball]
        )
        best = max(best, rise(found.x * min(1, radius / np.linalg.norm(found.x))))
    assert row.loss_rise == pytest.approx(best, rel=0.02)
    assert row.loss_rise <= best * (1 + 1e-6)
    assert row.distance == pytest.approx(0.3)
    assert row.accuracy_drop == 0


def test_projection_after_every_step_or_every_epoch():
    model, data = network(), batches(3)
    for project in ("step", "epoch"):
        table = module_robust_criticality(model, data, lr=5.0, project=project)
        assert all(0 <= row.distance <= 0.1 * (1 + 1e-5) for row in table.values())
        assert max(row.loss_rise for row in table.values()) > 0


def test_a_scan_resumes_and_refuses_another_one(tmp_path, monkeypatch):
    model, data, file = network(), batches(), tmp_path / "scan.json"
    whole = module_robust_criticality(model, data, epochs=2)
    half = module_robust_criticality(model, data, epochs=2, modules=["5"], cache=file)
    assert list(json.loads(file.read_text())["modules"]) == ["5"]
    assert half["5"] == whole["5"]
    from pyrobust.train import robust_criticality

    calls = []
    run = robust_criticality._Ascent.run
    monkeypatch.setattr(
        robust_criticality._Ascent, "run", lambda self, *a: calls.append(self.name) or run(self, *a)
    )
    assert module_robust_criticality(model, data, epochs=2, cache=file) == whole
    assert calls == ["0.weight", "7.weight"]
    with pytest.raises(ValueError, match="belongs to another scan"):
        module_robust_criticality(model, data, epochs=3, cache=file)
    with pytest.raises(ValueError, match="belongs to another scan"):
        module_robust_criticality(network(), data, epochs=2, cache=file)


def test_an_interrupted_scan_leaves_the_model_alone():
    model, data = network(), batches()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def failing(out, y):
        calls.append(0)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return F.cross_entropy(out, y)

    with pytest.raises(KeyboardInterrupt):
        module_robust_criticality(model, data, loss_fn=failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_refusals():
    model, data = network(), batches()
    assert criticality_modules(model) == ["0", "5", "7"]
    with pytest.raises(ValueError, match="modules must be among 0, 5, 7; got 'head'"):
        module_robust_criticality(model, data, modules=["head"])
    with pytest.raises(ValueError, match="'2' must have a weight parameter; ReLU has none"):
        module_robust_criticality(model, data, modules=["2"])
    packed = nn.Sequential(PackedLinear.from_linear(nn.Linear(16, 4), bits=4, group_size=8))
    with pytest.raises(TypeError, match="must have a floating-point weight parameter; a PackedLi"):
        module_robust_criticality(packed, data, modules=["0"])
    with pytest.raises(ValueError, match="must hold a linear or convolution layer; got none"):
        module_robust_criticality(packed, data)
    with pytest.raises(ValueError, match="at least one batch; got 0"):
        module_robust_criticality(model, [])
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
        module_robust_criticality(model, data, epsilon=-0.1)
    with pytest.raises(ValueError, match="project must be one of step, epoch"):
        module_robust_criticality(model, data, project="never")
    with pytest.raises(ValueError, match="adv_batches must be finite"):
        module_robust_criticality(model, [(data[0][0] / 0, data[0][1])])
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.warns(UserWarning, match=r"the weight of '1' is tied to 0\.weight"):
        table = module_robust_criticality(tied, [(torch.rand(9, 3), torch.randint(3, (9,)))])
    assert isinstance(table["0"], Criticality)
    assert table["0"] == table["1"]
