"""Matching of residual and plain convolution networks with batch norm: two, three, five models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.evaluate import loss_barrier, singular_alignment
from pyrobust.weights import (
    apply_permutation,
    invert_permutation,
    match_many,
    merge_models,
    trace_spec,
    weight_match,
)


class Block(nn.Module):
    def __init__(self, width, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Identity()
        if width != out:
            shortcut = nn.Conv2d(width, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


def resnet(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width), Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def vgg(width):
    def stage(a, b):
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(
        *stage(1, width), nn.MaxPool2d(2),
        *stage(width, 2 * width), *stage(2 * width, 2 * width), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10),
    )  # fmt: skip


@pytest.mark.parametrize("make", [resnet, vgg])
def test_permutations_of_one_network_are_undone_exactly(make):
    model = make(8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = torch.randn(16, 1, 8, 8)
    spec, state = trace_spec(model.eval(), x), model.state_dict()
    plants = [{name: torch.randperm(size) for name, size in spec.sizes.items()} for _ in range(5)]
    noisy = {n: v + 1e-4 * torch.randn_like(v) if v.ndim > 1 else v for n, v in state.items()}
    copies = [apply_permutation(noisy, plant, spec) for plant in plants]
    for plant, moved in zip(plants, copies, strict=True):
        found = weight_match(state, moved, spec)
        for name, inverse in invert_permutation(plant).items():
            assert torch.equal(found[name], inverse)
    for count in (2, 3, 5):
        perms = match_many(copies[:count], spec)
        back = [apply_permutation(s, p, spec) for s, p in zip(copies, perms, strict=False)]
        merged = merge_models(copy.deepcopy(model), back, reset_bn=False)
        torch.testing.assert_close(merged(x), model(x), rtol=0, atol=0.02)
        torch.testing.assert_close(back[-1], back[0])


@pytest.mark.slow
@pytest.mark.parametrize(("make", "epochs", "rate"), [(vgg, 15, 2e-3), (resnet, 12, 3e-3)])
def test_trained_networks_average_better_once_matched(make, epochs, rate):
    digits = load_digits()
    images = torch.cat([digits.train_images, digits.test_images])
    labels = torch.cat([digits.train_labels, digits.test_labels])
    cut = int(0.6 * len(labels))
    x, y, test_x, test_y = images[:cut], labels[:cut], images[cut:], labels[cut:]
    batches = x.split(128)

    def trained(seed):
        torch.manual_seed(seed)
        model = make(32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            schedule.step()
        return model.eval()

    @torch.no_grad()
    def loss(model):
        return float(F.cross_entropy(model(test_x), test_y))

    @torch.no_grad()
    def merged(states, **options):
        options = options or {"loader": batches}
        model = merge_models(copy.deepcopy(models[0]), states, **options)
        return float((model(test_x).argmax(1) == test_y).float().mean())

    models = [trained(seed) for seed in range(5)]
    spec, states = trace_spec(models[0], x[:1]), [m.state_dict() for m in models]
    moved = apply_permutation(states[1], weight_match(*states[:2], spec), spec)
    second = copy.deepcopy(models[1])
    second.load_state_dict(moved)
    naive, flat = (
        loss_barrier(models[0], m, loss, 11, loader=batches).barrier for m in (models[1], second)
    )
    scores = [singular_alignment(states[0], s) for s in (states[1], moved)]
    print(
        f"\n{make.__name__}: barrier {naive:.3f} to {flat:.3f}, R {scores[0]:.3f}, {scores[1]:.3f}"
    )
    assert flat < 0.6 * naive
    assert scores[1] > 0.08 > scores[0]
    for count in (2, 3, 5):
        perms = match_many(states[:count], spec)
        group = [apply_permutation(s, p, spec) for s, p in zip(states, perms, strict=False)]
        row = merged(states[:count]), merged(group), merged(group, reset_bn=False)
        print(
            f"{count} models: {row[0]:.3f} as trained, {row[1]:.3f} matched, {row[2]:.3f} "
            "with averaged running statistics"
        )
        assert row[1] > row[0] + 0.15
