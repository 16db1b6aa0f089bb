"""aTLAS: addition, negation under its floor, few shots, test time, block budgets, on digits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.weights import (
    AnisotropicComposition,
    NoFeasibleCoefficients,
    TaskVector,
    adapt_few_shot,
    adapt_test_time,
    learn_task_addition,
    learn_task_negation,
    select_blocks,
    trusted_samples,
)

HEAD = nn.Identity()
TASKS = {
    "transpose": lambda x: x.transpose(2, 3),
    "flip": lambda x: x.flip(3),
    "invert": lambda x: 1 - x,
    "shift": lambda x: x.roll(2, 3),
}


def network():
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def fitted(model, x, y, epochs, seed):
    torch.manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).float().mean())


class Skills:
    """A base for upright digits and one fine-tuned model for each change of them."""

    def __init__(self, seed):
        digits = load_digits()
        x, y = digits.train_images, digits.train_labels
        self.train = x[:1000], y[:1000]
        self.test = digits.test_images, digits.test_labels
        self.held = x[1000:], y[1000:]
        self.base = fitted(network(), *self.train, 15, seed)
        self.tuned = [
            fitted(self.base, f(self.train[0]), self.train[1], 15, seed + 1 + i)
            for i, f in enumerate(TASKS.values())
        ]
        self.vectors = [TaskVector.from_modules(self.base, model) for model in self.tuned]

    def compose(self, **options):
        return AnisotropicComposition(self.base, self.vectors, **options)

    def loaders(self, count=200, size=50):
        x, y = self.held[0][:count], self.held[1][:count]
        return [list(zip(f(x).split(size), y.split(size), strict=True)) for f in TASKS.values()]

    def mean_accuracy(self, model):
        x, y = self.test
        return sum(accuracy(model, f(x), y) for f in TASKS.values()) / len(TASKS)

    def searched_isotropic(self):
        """The best single coefficient, chosen on the validation samples."""
        x, y = self.held[0][:200], self.held[1][:200]
        best, chosen = -1.0, None
        total = self.vectors[0]
        for vector in self.vectors[1:]:
            total = total + vector
        for step in range(21):
            model = total.apply_to(copy.deepcopy(self.base), step / 20)
            seen = sum(accuracy(model, f(x), y) for f in TASKS.values())
            if seen > best:
                best, chosen = seen, model
        return chosen


@pytest.fixture(scope="module")
def skills():
    return Skills(0)


def addition(skills, **options):
    model = skills.compose(**options)
    heads, loaders = [HEAD] * 4, skills.loaders()
    # 50 epochs of 4 batches: 200 steps
    found = learn_task_addition(model, heads, loaders, epochs=50, lr=0.05, clip=None)
    return model, found


def test_addition_beats_one_coefficient(skills):
    model, found = addition(skills)
    assert found.score == max(row["score"] for row in found.history)
    assert found.history[0]["score"] < found.score
    blocks = skills.mean_accuracy(model)
    isotropic = skills.mean_accuracy(skills.searched_isotropic())
    assert blocks >= isotropic + 0.06


@pytest.mark.slow
def test_addition_over_seeds():
    rows = []
    for seed in range(4):
        skills = Skills(10 * seed)
        x, y = skills.test
        own = [accuracy(m, f(x), y) for m, f in zip(skills.tuned, TASKS.values(), strict=True)]
        rows.append(
            [
                skills.mean_accuracy(skills.base),
                skills.mean_accuracy(skills.searched_isotropic()),
                skills.mean_accuracy(addition(skills, granularity="vector")[0]),
                skills.mean_accuracy(addition(skills)[0]),
                skills.mean_accuracy(addition(skills, granularity="partition", partitions=20)[0]),
                sum(own) / len(own),
            ]
        )
    table = torch.tensor(rows)
    print(
        f"\nbase, searched, per vector, per block, 20 parts, own models\n{table}\n{table.mean(0)}"
    )
    mean = table.mean(0)
    assert mean[3] >= mean[1] + 0.06
    assert mean[4] > mean[3]


def test_normalised_selection_and_penalty(skills):
    heads, loaders = [HEAD] * 4, skills.loaders()
    model = skills.compose()
    found = learn_task_addition(
        model, heads, loaders, epochs=2, reference_accuracies=[0.5] * 4, penalty=(1, 0.1)
    )
    for row in found.history:
        seen = [row[f"accuracy_{i}"] for i in range(4)]
        assert row["score"] == pytest.approx(sum(seen) / 4 / 0.5)
    held = skills.compose()
    learn_task_addition(held, heads, loaders, epochs=2, penalty=(1, 1e6), clip=None, lr=1e-6)
    assert float(held.coefficients.abs().max()) < 1e-4


def batches(x, y, size=50):
    return list(zip(x.split(size), y.split(size), strict=True))


def test_negation_keeps_the_control_task():
    """Forget the digits 0-4 with the vector of a model tuned on them; keep 5-9."""
    skills = Skills.__new__(Skills)
    digits = load_digits()
    x, y = digits.train_images, digits.train_labels
    base = fitted(network(), x[:1000], y[:1000], 15, 0)
    low = y[:1000] < 5
    tuned = fitted(base, x[:1000][low], y[:1000][low], 15, 1)
    skills.base, skills.vectors = base, [TaskVector.from_modules(base, tuned)]
    held = y[1000:] < 5
    target = batches(x[1000:][held], y[1000:][held])
    control = batches(x[1000:][~held], y[1000:][~held])
    heads = {"target_head": HEAD, "control_head": HEAD}
    model = skills.compose()
    found = learn_task_negation(model, target, control, lr=0.02, epochs=20, **heads)
    start = found.history[0]
    kept = found.history[found.epoch]
    assert kept["control"] >= 0.95 * start["control"]
    assert found.score == kept["target"] <= start["target"] - 0.3
    seen = [row["target"] for row in found.history[1:] if row["control"] >= 0.95 * start["control"]]
    assert found.score == min(seen)
    stuck = skills.compose()
    with torch.no_grad():
        stuck.coefficients.fill_(0.01)
    before = stuck.coefficients.detach().clone()
    # the control task is the target: whatever is forgotten breaks the floor
    unlearnable = [(u, (v + 1) % 10) for u, v in target]
    with pytest.raises(NoFeasibleCoefficients, match="the first epoch gave"):
        learn_task_negation(
            stuck, target, unlearnable, 0.999, control_selection=target, lr=5.0, epochs=3, **heads
        )
    assert torch.equal(stuck.coefficients, before)


def test_few_shots_of_a_task_that_is_not_in_the_pool(skills):
    """Digits shifted by one pixel, from ten samples a class and the vectors of other tasks."""
    pool = skills.compose()

    def f(images):
        return images.roll(1, 3)

    x, y = f(skills.held[0]), skills.held[1]
    shots = torch.cat([(y == c).nonzero()[:10, 0] for c in range(10)])
    loader = batches(x[shots], y[shots])
    assert len(loader) == 2
    calls = []

    def augment(images):
        calls.append(len(images))
        return images

    found = adapt_few_shot(pool, HEAD, loader, augment=augment, epochs=5)
    assert len(calls) == 5 * 2 * 6  # two batches are repeated int(10 / 2) + 1 times
    tx, ty = f(skills.test[0]), skills.test[1]
    assert accuracy(pool, tx, ty) >= accuracy(skills.base, tx, ty) + 0.05
    assert found.score == max(row["score"] for row in found.history)


def test_test_time_adaptation_without_labels(skills):
    """Upright digits of low contrast, unlabelled: the inverted vector and its kin can help."""
    x, y = skills.test
    seen = 0.5 * x + 0.25
    generator = torch.Generator().manual_seed(0)

    def strong(images):
        return images + 0.1 * torch.randn(images.shape, generator=generator)

    before = accuracy(skills.base, seen, y)
    model = skills.compose()
    found = adapt_test_time(
        model, HEAD, seen, weak=lambda v: v, strong=strong, epochs=10, lr=0.02, batch_size=64
    )
    assert found.epoch == 10
    assert found.history[-1]["score"] > found.history[0]["score"]
    assert accuracy(model, seen, y) >= before
    sharp = skills.compose()
    adapt_test_time(
        sharp, HEAD, seen, weak=lambda v: v, strong=strong, objective="entropy", epochs=2, lr=0.02
    )
    with torch.no_grad():
        spread = [torch.distributions.Categorical(logits=m(seen)).entropy().mean()
                  for m in (skills.base, sharp)]  # fmt: skip
    assert spread[1] < spread[0]


def test_trust_goes_to_the_most_confident_of_each_class():
    logits = torch.randn(300, 4) * 3
    labels = trusted_samples(logits, 7)
    confidence, predicted = logits.softmax(1).max(1)
    for c in range(4):
        chosen, members = labels == c, predicted == c
        assert int(chosen.sum()) == 7
        assert bool(members[chosen].all())
        assert float(confidence[chosen].min()) >= float(confidence[members & ~chosen].max())
    assert int((labels >= 0).sum()) == 28


def test_block_budget_takes_the_steepest(skills):
    model = skills.compose()
    x, y = skills.held

    def loss(composition, batch):
        return F.cross_entropy(composition(batch[0]), batch[1])

    data = batches(TASKS["flip"](x[:100]), y[:100])
    small = select_blocks(model, loss, 2, batches=data)
    slopes = sum(torch.autograd.grad(loss(model, b), model.coefficients)[0] for b in data).abs()
    for j in range(len(model.names)):
        assert set(small.members[:, j].tolist()) == set(slopes[:, j].topk(2).indices.tolist())
    assert small.coefficients.shape == (2, len(model.names))
    found = adapt_few_shot(small, HEAD, data, epochs=2)
    assert found.score > found.history[0]["score"]
    random = select_blocks(model, loss, 2, "random", seed=1)
    assert bool((random.members[0] != random.members[1]).all())
    whole = select_blocks(model, lambda c: loss(c, data[0]), 4)
    assert torch.equal(whole.members, model.members)
    with pytest.raises(ValueError, match="budget must be at most 4"):
        select_blocks(model, loss, 5, batches=data)
    with pytest.raises(ValueError, match="granularity 'vector'"):
        select_blocks(skills.compose(granularity="vector"), loss, 1, batches=data)


def test_refusals(skills):
    model, loaders = skills.compose(), skills.loaders(20)
    before = model.coefficients.detach().clone()
    with pytest.raises(ValueError, match="one entry for each task; got 4, 3, 3, 4"):
        learn_task_addition(model, [HEAD] * 4, loaders[:3])
    with pytest.raises(ValueError, match="at least one batch; got 0"):
        learn_task_addition(model, [HEAD], [[]])
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        learn_task_addition(model, [HEAD] * 4, loaders, epochs=0)
    heads = {"target_head": HEAD, "control_head": HEAD}
    with pytest.raises(ValueError, match="control_floor must lie in the open interval"):
        learn_task_negation(model, loaders[0], loaders[1], 1.0, **heads)
    with pytest.raises(ValueError, match="at least one batch; got 0"):
        adapt_few_shot(model, HEAD, [])
    views = {"weak": HEAD, "strong": HEAD}
    x = skills.test[0]
    with pytest.raises(ValueError, match="threshold must lie in the interval"):
        adapt_test_time(model, HEAD, x, threshold=1.5, **views)
    with pytest.raises(ValueError, match="threshold must be one of adaptive"):
        adapt_test_time(model, HEAD, x, threshold="free", **views)
    with pytest.raises(ValueError, match="objective must be one of"):
        adapt_test_time(model, HEAD, x, objective="rotation", **views)
    with pytest.raises(ValueError, match="at least one input"):
        adapt_test_time(model, HEAD, x[:0], **views)
    with pytest.raises(FloatingPointError, match="the loss became"):
        learn_task_addition(model, [lambda v: v * float("nan")], [loaders[0]])
    assert torch.equal(model.coefficients, before)
