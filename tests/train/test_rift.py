"""RiFT: what may change, what is kept by construction, and the gain on digits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.evaluate import pgd
from pyrobust.train import (
    adversarial_batches,
    module_robust_criticality,
    pgd_runs,
    robust_critical_finetune,
)
from pyrobust.train.rift import accuracy_on


def loader(x, y, size=64):
    return list(zip(x.split(size), y.split(size), strict=True))


def adversarially_trained(model, x, y, eps, epochs, seed, steps=7):
    """PGD training; the radius grows over the first third, without which it may diverge."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    total = 0
    count = epochs * -(-len(x) // 64)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            radius = eps * min(1.0, 3 * total / count)
            model.eval()
            points = pgd(
                model, x[batch], y[batch], eps=radius, steps=steps, step_size=radius / 3,
                keep="last", seed=total,
            )  # fmt: skip
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(points), y[batch]).backward()
            optimizer.step()
            total += 1
    return model.eval()


@pytest.fixture(scope="module")
def small():
    """A robust perceptron with batch norms, and clean data in two parts."""
    digits = load_digits()
    x, y = digits.train_images, digits.train_labels
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip
    adversarially_trained(model, x[:700], y[:700], 0.2, 8, 0, steps=3)
    return model, loader(x[:700], y[:700]), loader(x[700:1100], y[700:1100], 200)


def attacks():
    return pgd_runs(0.2, steps=5, runs=2)


def test_only_the_chosen_module_moves_and_robustness_is_kept(small):
    model, train, held = small
    before = copy.deepcopy(model.state_dict())
    result = robust_critical_finetune(
        model, train, val_clean=held, val_attack=attacks(), module="4", epochs=4, lr=0.01
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in result.model.parameters())
    assert not result.model.training
    for name, value in result.model.state_dict().items():
        if not name.startswith("4."):
            assert torch.equal(value, before[name]), name
    start = result.curve[0]
    assert start[0] == 0
    assert start[1:] == (accuracy_on(model, held), accuracy_on(model, held, attacks()))
    chosen = next(row for row in result.curve if row[0] == result.alpha)
    assert chosen[1] == accuracy_on(result.model, held) >= start[1]
    assert chosen[2] == accuracy_on(result.model, held, attacks()) >= start[2] - 0.001
    feasible = [row for row in result.curve if row[2] >= start[2] - 0.001]
    assert chosen[1] == max(row[1] for row in feasible)
    assert len(result.curve) == 11
    assert f"{result.alpha:6.2f}" in result.summary()
    pytest.importorskip("matplotlib").use("Agg")
    assert len(result.plot().lines) == 3


def test_statistics_may_move_on_demand(small):
    model, train, held = small
    before = model.state_dict()
    result = robust_critical_finetune(
        model, train, val_clean=held, val_attack=attacks()[0], module="4", epochs=2, lr=0.01,
        alphas=[1.0], tolerance=1.0, freeze_norm_stats=False,
    )  # fmt: skip
    after = result.model.state_dict()
    assert torch.equal(after["2.num_batches_tracked"], before["2.num_batches_tracked"])
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    if result.alpha == 1.0:
        statistics = {f"{i}.running_{kind}" for i in (2, 5) for kind in ("mean", "var")}
        assert moved == {"4.weight", "4.bias"} | statistics
    assert [row[0] for row in result.curve] == [0.0, 1.0]


def test_auto_takes_the_least_critical_layer_between_the_ends(small):
    model, train, held = small
    result = robust_critical_finetune(
        model, train, val_clean=held, val_attack=attacks(), epochs=1, alphas=[0.5]
    )
    fixed = adversarial_batches(model, held, attacks()[0])
    table = module_robust_criticality(model, fixed)
    assert dict(result.criticality) == table
    assert list(table) == ["1", "4", "7"]
    assert result.module == "4"


def test_the_fixed_set_is_adversarial_and_reproducible(small):
    model, _, held = small
    first, again = (adversarial_batches(model, held, attacks()[0]) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    other = adversarial_batches(model, held, attacks()[1])
    assert not torch.equal(first[0][0], other[0][0])
    for (points, y), (x, z) in zip(first, held, strict=True):
        assert torch.equal(y, z)
        assert float((points - x).abs().max()) <= 0.2 + 1e-6
    assert accuracy_on(model, first) < accuracy_on(model, held)
    assert accuracy_on(model, held, attacks()) <= accuracy_on(model, held, attacks()[:1])


def test_refusals(small):
    model, train, held = small
    options = {"val_clean": held, "val_attack": attacks(), "epochs": 1}
    with pytest.raises(ValueError, match="modules must be among 1, 4, 7; got 'conv'"):
        robust_critical_finetune(model, train, module="conv", **options)
    with pytest.raises(ValueError, match="'3' must have a weight parameter"):
        robust_critical_finetune(model, train, module="3", **options)
    with pytest.raises(ValueError, match="val_attack must hold at least one attack"):
        robust_critical_finetune(model, train, val_clean=held, val_attack=[])
    with pytest.raises(ValueError, match="train_loader must yield at least one batch"):
        robust_critical_finetune(model, [], module="4", **options)
    with pytest.raises(ValueError, match="val_clean must yield at least one batch"):
        robust_critical_finetune(model, train, val_clean=[], val_attack=attacks())
    with pytest.raises(ValueError, match=r"alphas must lie in \[0, 1\]"):
        robust_critical_finetune(model, train, module="4", alphas=[1.5], **options)
    with pytest.raises(ValueError, match="tolerance must be finite and at least 0"):
        robust_critical_finetune(model, train, module="4", tolerance=-1.0, **options)
    with pytest.raises(ValueError, match="fewer than three layers"):
        robust_critical_finetune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), train, **options)
    with pytest.raises(ValueError, match="loader must yield at least one batch"):
        adversarial_batches(model, [], attacks()[0])
    with pytest.raises(ValueError, match="runs must be at least 1"):
        pgd_runs(0.1, runs=0)


@pytest.mark.slow
def test_one_module_and_a_line_keep_what_full_fine_tuning_destroys():
    digits = load_digits()
    x, y = digits.train_images, digits.train_labels
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    adversarially_trained(model, x[:1000], y[:1000], 0.3, 40, 0)
    runs = pgd_runs(0.3, steps=10, step_size=0.075, runs=1)
    held = loader(x[1000:], y[1000:], 219)
    test = loader(digits.test_images, digits.test_labels, 180)
    train = loader(x[:1000], y[:1000])
    result = robust_critical_finetune(
        model, train, val_clean=held, val_attack=runs, module="9", lr=0.003, epochs=40,
        alphas=[0.25, 0.5, 0.75],
    )  # fmt: skip
    print(f"\n{result.summary()}")
    start, chosen = (
        next(row for row in result.curve if row[0] == place) for place in (0.0, result.alpha)
    )
    # how much is gained differs from nothing to a point between starts (docs/methods.md, row 30)
    assert chosen[1] >= start[1]
    assert chosen[2] >= start[2] - 0.001  # the default tolerance
    whole = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(whole.parameters(), 0.01, 0.9, weight_decay=5e-4)
    for _ in range(10):
        for u, v in train:
            optimizer.zero_grad()
            F.cross_entropy(whole(u), v).backward()
            optimizer.step()
    before, after = (accuracy_on(m.eval(), test, runs) for m in (model, whole))
    print("full fine-tuning, robust before and after", before, after)
    assert after <= before - 0.05
