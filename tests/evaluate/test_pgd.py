"""PGD against exact answers: linear models, brute force over corners, closed-form l2 radii."""

import itertools
import math

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.evaluate import attack_loss, auto_pgd, evaluation_mode, pgd, targeted_auto_pgd


def linear(inputs=6, classes=4):
    return nn.Linear(inputs, classes).eval()


def mlp(inputs=6, classes=4):
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, classes)).eval()


@pytest.mark.parametrize("attack", [pgd, auto_pgd])
def test_a_linear_margin_is_attacked_to_its_exact_minimum(attack):
    model, x = linear(classes=2), 0.3 + 0.4 * torch.rand(16, 6)
    y = model(x).argmax(1)
    options = {"step_size": 0.1} if attack is pgd else {}
    for norm, dual in (("linf", 1), ("l2", 2)):
        options |= {"eps": 0.1, "norm": norm, "steps": 60, "objective": "margin", "clamp": None}
        points = attack(model, x, y, **options)
        reached = attack_loss(model(points), y, kind="margin")
        slope = (model.weight[0] - model.weight[1]).norm(p=dual)
        exact = attack_loss(model(x), y, kind="margin") + 0.1 * slope
        torch.testing.assert_close(reached, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attack", [pgd, auto_pgd])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_stay_in_the_ball_and_in_the_range(attack, norm):
    model, x = mlp(), torch.rand(20, 6)
    y = torch.arange(20) % 4
    eps = torch.linspace(0.0, 0.4, 20)
    points = attack(model, x, y, eps=eps, norm=norm, steps=15, restarts=2)
    size = (points - x).norm(p=math.inf if norm == "linf" else 2, dim=1)
    assert bool((size <= eps + 1e-6).all())
    assert bool(((points >= 0) & (points <= 1)).all())
    assert torch.equal(points[0], x[0])


def test_it_finds_what_an_exhaustive_search_over_corners_finds():
    # A ReLU network with one hidden layer in 4 dimensions: a grid of 9 per axis is brute force.
    model = mlp(inputs=4)
    with torch.no_grad():
        model[2].bias.zero_()
        model[0].weight.mul_(4)
    x = 0.2 + 0.6 * torch.rand(12, 4)
    y = model(x).argmax(1)
    steps = torch.linspace(-0.2, 0.2, 9)
    grid = torch.tensor(list(itertools.product(steps.tolist(), repeat=4)))
    answers = torch.stack([model(point + grid).argmax(1) for point in x])
    broken = (answers != y[:, None]).any(1)
    found = model(auto_pgd(model, x, y, eps=0.2, steps=40, restarts=8)).argmax(1) != y
    plain = model(pgd(model, x, y, eps=0.2, steps=40, restarts=8)).argmax(1) != y
    assert 0 < int(broken.sum()) < 12
    assert torch.equal(found, broken | found)
    assert int((broken & ~plain).sum()) <= 1  # plain PGD stops in a local optimum once here


def test_the_result_is_never_better_than_the_clean_input_nor_with_more_restarts():
    model, x = mlp(), torch.rand(30, 6)
    y = model(x).argmax(1)
    y[:10] = (y[:10] + 1) % 4
    clean = nn.functional.cross_entropy(model(x), y, reduction="none")
    one = pgd(model, x, y, eps=0.05, steps=5)
    more = pgd(model, x, y, eps=0.05, steps=5, restarts=3)
    worst = [nn.functional.cross_entropy(model(p), y, reduction="none") for p in (one, more)]
    wrong = [model(p).argmax(1) != y for p in (x, one, more)]
    assert bool((wrong[1] | ~wrong[0]).all())
    assert bool((wrong[2] | ~wrong[1]).all())
    same = wrong[0] == wrong[1]
    assert bool((worst[0] >= clean - 1e-6)[same].all())
    same = wrong[1] == wrong[2]
    assert bool((worst[1] >= worst[0] - 1e-6)[same].all())


def test_targets_are_reached_where_they_can_be():
    model, x = linear(), 0.5 * torch.ones(4, 6)
    y = model(x).argmax(1)
    for kind in ("ce", "margin", "dlr"):
        for target in range(4):
            goal = torch.full((4,), target)
            points = pgd(model, x, y, eps=20.0, steps=50, objective=kind, targets=goal, clamp=None)
            reached = model(points)
            if kind == "ce":
                assert reached.argmax(1).tolist() == [target] * 4
            assert bool((reached[:, target] >= reached.gather(1, y[:, None])[:, 0]).all())
    broken = targeted_auto_pgd(model, x, y, eps=20.0, steps=30, clamp=None)
    assert bool((model(broken).argmax(1) != y).all())


def test_losses_follow_their_formulas():
    logits, y = torch.randn(50, 5, dtype=torch.float64), torch.arange(50) % 5
    top = logits.sort(1, descending=True).values
    own = logits[torch.arange(50), y]
    other = torch.stack([row[torch.arange(5) != c].max() for row, c in zip(logits, y, strict=True)])
    margin = attack_loss(logits, y, kind="margin")
    torch.testing.assert_close(margin, other - own)
    torch.testing.assert_close(
        attack_loss(logits, y, kind="dlr"), (other - own) / (top[:, 0] - top[:, 2])
    )
    target = (y + 1) % 5
    wanted = logits[torch.arange(50), target]
    torch.testing.assert_close(
        attack_loss(logits, y, kind="dlr", targets=target),
        (wanted - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2),
    )
    dlr = attack_loss(7 * logits + 3, y, kind="dlr")
    torch.testing.assert_close(dlr, attack_loss(logits, y, kind="dlr"))
    assert bool(((margin > 0) == (logits.argmax(1) != y)).all())


class Drops(nn.Module):
    """Random: each call hides half of the inputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * 2 * (torch.rand_like(x) < 0.5))


def test_random_models_are_reproducible_and_the_global_state_is_untouched():
    model, x, y = Drops(mlp()).eval(), torch.rand(8, 6), torch.arange(8) % 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = pgd(model, x, y, eps=0.1, steps=4, samples=3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first, pgd(model, x, y, eps=0.1, steps=4, samples=3, seed=7))
    assert not torch.equal(first, pgd(model, x, y, eps=0.1, steps=4, samples=3, seed=8))


def test_the_mean_over_draws_is_the_gradient_of_the_mean():
    # With 400 draws the direction is that of the linear model without the random mask.
    inner = linear(classes=2)
    x, y = torch.full((1, 6), 0.5), torch.tensor([0])
    options = {"eps": 0.1, "norm": "l2", "steps": 1, "step_size": 0.1, "random_start": False}
    points = pgd(Drops(inner).eval(), x, y, objective="margin", samples=400, keep="last", **options)
    wanted = inner.weight[1] - inner.weight[0]
    cosine = nn.functional.cosine_similarity(points - x, wanted[None])
    assert float(cosine.detach()) > 0.98


def test_a_surrogate_gives_gradients_where_the_model_has_none():
    inner, x = mlp(), torch.rand(30, 6)

    def rounded(points):
        return inner((points * 20).round() / 20)

    y = inner(x).argmax(1)
    blind = pgd(rounded, x, y, eps=0.3, steps=20)
    through = pgd(rounded, x, y, eps=0.3, steps=20, surrogate=inner)
    missed, hit = ((rounded(p).argmax(1) != y).sum() for p in (blind, through))
    assert hit > missed


def test_modes_and_gradients_of_the_model_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    model[2].eval()
    flags = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pgd(model, torch.rand(8, 6), torch.arange(8) % 4, eps=0.1, steps=3)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        1 / any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags


def test_steps_per_input_and_the_last_point():
    model, x, y = linear(), torch.rand(3, 6), torch.tensor([0, 1, 2])
    options = {"eps": 1.0, "clamp": None, "random_start": False, "step_size": 0.01, "keep": "last"}
    points = pgd(model, x, y, steps=torch.tensor([1, 5, 9]), **options)
    torch.testing.assert_close(
        (points - x).abs().amax(1), torch.tensor([0.01, 0.05, 0.09]), atol=1e-6, rtol=0
    )
    mask = torch.tensor([1.0, 0, 0, 0, 0, 0])
    points = pgd(
        model, x, y, steps=5, projection=lambda p, origin: origin + mask * (p - origin), **options
    )
    assert bool(((points - x).abs() > 0).sum(0).tolist()[1:] == [0] * 5)


def test_packed_models_are_attacked():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    packed = pyrobust.pack(model, bits=4, group_size=16)
    x = torch.rand(10, 64)
    y = packed(x).argmax(1)
    points = pgd(packed, x, y, eps=0.2, steps=20)
    assert int((packed(points).argmax(1) != y).sum()) >= 8


def test_bad_input_is_refused():
    model, x, y = linear(), torch.rand(2, 6), torch.tensor([0, 1])
    for options, message in [
        ({"eps": -0.1}, "eps"),
        ({"eps": torch.rand(3)}, r"\(2,\)"),
        ({"eps": 0.1, "norm": "l0"}, "linf, l2"),
        ({"eps": 0.1, "steps": 0}, "steps"),
        ({"eps": 0.1, "restarts": 0}, "restarts"),
        ({"eps": 0.1, "samples": 0}, "samples"),
        ({"eps": 0.1, "momentum": 1.0}, "momentum"),
        ({"eps": 0.1, "objective": "mse"}, "objective"),
        ({"eps": 0.1, "keep": "first"}, "keep"),
        ({"eps": 0.1, "clamp": (1.0, 0.0)}, "clamp"),
        ({"eps": 0.1, "objective": lambda out, y: out.sum()}, "objective"),
    ]:
        with pytest.raises(ValueError, match=message):
            pgd(model, x, y, **options)
    with pytest.raises(ValueError, match="at least 3 classes"):
        pgd(linear(classes=2), x, y, eps=0.1, objective="dlr")
    with pytest.raises(ValueError, match="NaN"):
        pgd(lambda p: model(p) * math.nan, x, y, eps=0.1)
    with pytest.raises(TypeError, match="floating-point"):
        pgd(model, torch.zeros(2, 6, dtype=torch.int64), y, eps=0.1)
    with pytest.raises(ValueError, match="y must have shape"):
        pgd(model, x, y[:1], eps=0.1)
