"""Robust weight signatures: the projection, layer choice, refusals, and patches on digits."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import corrupt, load_digits, load_idx
from pyrobust.weights import (
    Patcher,
    TaskVector,
    WeightDelta,
    compose_signatures,
    project_out,
    robust_weight_signature,
    signature_parameters,
)

TWO = 2  # the first two convolutions


def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def three():
    """Pretrained, clean and robust; all different."""
    return [small() for _ in range(3)]


def test_the_signature_is_orthogonal_to_the_clean_direction():
    pretrained, clean, robust = three()
    signature = robust_weight_signature(robust, clean, pretrained)
    assert isinstance(signature, WeightDelta)
    assert list(signature) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    p, c, r = (m.state_dict() for m in (pretrained, clean, robust))
    moved = 0
    for name, value in signature.items():
        direction = (c[name] - p[name]).double().flatten()
        if not bool(direction.any()):  # affine terms of the norm start equal
            assert torch.equal(value, r[name] - p[name])
            continue
        moved += 1
        cosine = value.double().flatten() @ direction / (value.double().norm() * direction.norm())
        assert abs(float(cosine)) < 1e-6
    assert moved == 2
    signature.check_base(p)


def test_without_projection_the_patch_makes_the_robust_model():
    pretrained, clean, robust = three()
    names = [name for name, _ in robust.named_parameters()]
    signature = robust_weight_signature(robust, clean, pretrained, params=names, project=False)
    before = copy.deepcopy(pretrained.state_dict())
    with Patcher(pretrained) as patcher:
        patcher.apply(signature)
        for name, value in robust.named_parameters():
            assert float((pretrained.state_dict()[name] - value.detach()).abs().max()) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in pretrained.state_dict().items())


def test_projection_agrees_with_numpy_and_a_null_space():
    r, c = (torch.randn(5, 10, dtype=torch.float64) for _ in range(2))
    ours = project_out(r, c).flatten().numpy()
    flat_r, flat_c = r.flatten().numpy(), c.flatten().numpy()
    np.testing.assert_allclose(ours, flat_r - flat_c * (flat_r @ flat_c) / (flat_c @ flat_c))
    basis = scipy.linalg.null_space(flat_c[None])
    np.testing.assert_allclose(ours, basis @ (basis.T @ flat_r), atol=1e-12)
    assert torch.equal(project_out(r, torch.zeros_like(r)), r)


def test_layers_are_counted_or_named():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)),
        nn.Linear(2, 2),
    )
    assert signature_parameters(model, 1) == ["0.weight", "0.bias"]
    assert signature_parameters(model, 2)[2:] == ["1.weight", "1.bias"]
    block = ["2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"]
    assert signature_parameters(model, ["2"]) == block
    assert signature_parameters(model) == signature_parameters(model, 4)
    assert signature_parameters(model.state_dict(), 4)[-4:] == block
    for layers in (0, 5, ["head"], [], ["1.running_mean"]):
        with pytest.raises(ValueError, match="layers must"):
            signature_parameters(model, layers)


def test_composition_is_the_weighted_sum():
    first, second = (
        TaskVector.from_deltas({"w": torch.randn(7), "b": torch.randn(2)}) for _ in range(2)
    )
    mean = compose_signatures([first, second])
    mixed = compose_signatures([first, second], [0.3, -2.0])
    for name in first:
        torch.testing.assert_close(mean[name], (first[name] + second[name]) / 2)
        torch.testing.assert_close(mixed[name], 0.3 * first[name] - 2 * second[name])
    with pytest.raises(ValueError, match="at least one"):
        compose_signatures([])
    with pytest.raises(ValueError, match="one number for each of 2"):
        compose_signatures([first, second], [1.0])
    with pytest.raises(ValueError, match="missing b"):
        compose_signatures([first, second.select(["w"])])


def test_refusals():
    pretrained, clean, robust = three()
    p, c, r = (dict(m.state_dict()) for m in (pretrained, clean, robust))
    without = {k: v for k, v in c.items() if k != "0.bias"}
    with pytest.raises(ValueError, match=r"unexpected|missing 0\.bias"):
        robust_weight_signature(r, without, p)
    with pytest.raises(ValueError, match=r"'0\.bias' must have one shape"):
        robust_weight_signature(r, c, {**p, "0.bias": torch.zeros(3)})
    with pytest.raises(TypeError, match=r"'0\.bias' must have one dtype"):
        robust_weight_signature(r, c, {**p, "0.bias": torch.zeros(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"'0\.bias' must be finite"):
        robust_weight_signature(r, c, {**p, "0.bias": torch.full((4,), torch.nan)})
    with pytest.raises(TypeError, match=r"num_batches_tracked' is torch\.int64"):
        robust_weight_signature(r, c, p, params=["1.num_batches_tracked"])
    with pytest.raises(ValueError, match="must not name running statistics"):
        robust_weight_signature(r, c, p, params=["1.running_var"])
    with pytest.raises(ValueError, match=r"unknown 9\.weight"):
        robust_weight_signature(r, c, p, params=["9.weight"])
    with pytest.raises(ValueError, match="at least one entry"):
        robust_weight_signature(r, c, p, params=[])
    with pytest.raises(ValueError, match="must not both"):
        robust_weight_signature(r, c, p, params=["0.bias"], layers=1)
    with pytest.warns(UserWarning, match="nothing is projected out"):
        signature = robust_weight_signature(r, p, p)
    assert torch.equal(signature["0.weight"], r["0.weight"] - p["0.weight"])
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be tied"):
        robust_weight_signature(tied, tied, tied)
    with pytest.raises(ValueError, match="is not the base"):
        signature.check_base(r)
    patcher = Patcher(clean)
    patcher.apply(signature, name="fog")
    with pytest.raises(ValueError, match="must be new; 'fog' is on already"):
        patcher.apply(signature, name="fog")


# -- what the paper claims, on 8x8 digits ---------------------------------------------------------


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def tuned(model, images, labels, epochs, seed):
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def pretrained_on_150(digits, seed):
    torch.manual_seed(seed)
    chosen = torch.randperm(len(digits.train_labels))[:150]
    return tuned(network(), digits.train_images[chosen], digits.train_labels[chosen], 20, seed)


def dimmed(images):
    """Contrast about black."""
    return 0.15 * images


def faded(images):
    """Contrast about the image's mean, as ImageNet-C has it."""
    return corrupt(images, "contrast", 5)


@torch.no_grad()
def accuracies(model, images, labels, corruption):
    return [
        float((model(x).argmax(1) == labels).float().mean()) for x in (images, corruption(images))
    ]


def before_and_after(clean, signature, images, labels, corruption):
    """Clean and corrupted accuracy before, then after the patch."""
    before = accuracies(clean, images, labels, corruption)
    with Patcher(clean) as patcher:
        patcher.apply(signature)
        return before + accuracies(clean, images, labels, corruption)


def transfer_between_classes(digits, seed, corruption):
    base = pretrained_on_150(digits, seed)
    x, y = digits.train_images, digits.train_labels
    low, high, test = y < 5, y >= 5, digits.test_labels >= 5
    clean = tuned(base, x[low], y[low], 15, seed + 10)
    other = tuned(base, x[high], y[high], 15, seed + 20)
    robust = tuned(base, corruption(x[low]), y[low], 30, seed + 30)
    signature = robust_weight_signature(robust, clean, base, layers=TWO)
    return before_and_after(
        other, signature, digits.test_images[test], digits.test_labels[test], corruption
    )


def test_a_signature_of_some_classes_protects_a_model_of_others():
    figures = transfer_between_classes(load_digits(), 0, dimmed)
    assert figures[3] >= figures[1] + 0.15
    assert figures[2] >= figures[0] - 0.15


@pytest.mark.slow
def test_transfer_between_classes_over_seeds():
    rows = np.array([transfer_between_classes(load_digits(), seed, dimmed) for seed in range(4)])
    print(f"\nclean, corrupted -> clean, corrupted\n{rows.round(3)}")
    before_clean, before, after_clean, after = rows.mean(0)
    assert after >= before + 0.15
    assert after_clean >= before_clean - 0.10


@pytest.mark.slow
def test_a_patch_restores_low_contrast():
    digits, rows = load_digits(), []
    x, y = digits.train_images, digits.train_labels
    for seed in range(3):
        base = pretrained_on_150(digits, seed)
        clean = tuned(base, x, y, 15, seed + 1)
        robust = tuned(base, faded(x), y, 30, seed + 2)
        signature = robust_weight_signature(robust, clean, base, layers=TWO)
        test = digits.test_images, digits.test_labels
        rows.append(before_and_after(clean, signature, *test, faded))
    print(f"\nclean, corrupted -> clean, corrupted\n{np.array(rows).round(3)}")
    before_clean, before, after_clean, after = np.mean(rows, 0)
    assert after >= before + 0.15
    assert after_clean >= before_clean - 0.10


def mnist_at_8_pixels(mnist, first, last):
    pixels = mnist.test_images[first:last, :, 2:26, 2:26]
    return F.interpolate(pixels, 8, mode="area"), mnist.test_labels[first:last]


@pytest.mark.slow
def test_a_signature_moves_from_digits_to_mnist(data_folder):
    """Extracted on one data set, put on a model of another; both started from one base."""
    digits, mnist, rows = load_digits(), load_idx(data_folder / "mnist"), []
    x, y = digits.train_images, digits.train_labels
    for seed in range(3):
        base = pretrained_on_150(digits, seed)
        clean, robust = tuned(base, x, y, 15, seed + 1), tuned(base, faded(x), y, 30, seed + 2)
        signature = robust_weight_signature(robust, clean, base, layers=TWO)
        other = tuned(base, *mnist_at_8_pixels(mnist, 0, 1500), 15, seed + 3)
        test = mnist_at_8_pixels(mnist, 5000, 6000)
        rows.append(before_and_after(other, signature, *test, faded))
    print(f"\nclean, corrupted -> clean, corrupted\n{np.array(rows).round(3)}")
    before_clean, before, after_clean, after = np.mean(rows, 0)
    assert after >= before + 0.05
    assert after_clean >= before_clean - 0.15


def blurred(images):
    """Gaussian blur of 1.3 pixels, as kornia computes it."""
    return corrupt(images, "gaussian_blur", 5)


@pytest.mark.slow
def test_a_signature_of_blur_helps_at_home_and_on_mnist(data_folder):
    pytest.importorskip("kornia")
    digits, mnist, rows = load_digits(), load_idx(data_folder / "mnist"), []
    x, y = digits.train_images, digits.train_labels
    for seed in range(3):
        base = pretrained_on_150(digits, seed)
        clean, robust = tuned(base, x, y, 15, seed + 1), tuned(base, blurred(x), y, 30, seed + 2)
        signature = robust_weight_signature(robust, clean, base, layers=TWO)
        other = tuned(base, *mnist_at_8_pixels(mnist, 0, 1500), 15, seed + 3)
        home = before_and_after(clean, signature, digits.test_images, digits.test_labels, blurred)
        away = before_and_after(other, signature, *mnist_at_8_pixels(mnist, 5000, 6000), blurred)
        rows.append(home + away)
    print(f"\nclean, corrupted -> clean, corrupted; the same on MNIST\n{np.array(rows).round(3)}")
    for before_clean, before, after_clean, after in np.mean(rows, 0).reshape(2, 4):
        assert after >= before + 0.05
        assert after_clean >= before_clean - 0.06
