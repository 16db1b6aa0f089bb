"""Interval training on digits: the example moves images as it says, and its figures hold (slow)."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "certified_training_digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("certified_training_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shifts_and_turns_move_images_by_what_they_say(example):
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3:5, 3:5] = 1.0
    generator = torch.Generator().manual_seed(0)
    many = image.expand(2000, 1, 8, 8)
    assert torch.allclose(example.moved(many, 0.0, 0.0, generator), many, atol=1e-6)
    shifted = example.moved(many, 0.2, 0.0, generator)
    # the centre of mass moves by the shift, which is uniform in [-0.2, 0.2] along both axes
    for axis in (2, 3):
        profile = shifted.sum((1, 5 - axis))
        place = (profile * torch.arange(8.0)).sum(1) / profile.sum(1) - 3.5
        assert 0.19 < float(place.abs().max()) < 0.21
        assert float(place.std()) == pytest.approx(0.2 / 3**0.5, rel=0.05)
    turned = example.moved(many, 0.0, 0.07, generator)
    assert float((turned - many).abs().max()) < 0.2
    assert float((turned - turned.flip(3).transpose(2, 3)).abs().max()) < 1e-5  # symmetric


@pytest.mark.slow
def test_the_mean_of_three_seeds_is_certified(example):
    results = torch.tensor([example.train_and_certify(seed) for seed in range(3)])
    clean, certified = results.mean(0).tolist()
    assert clean >= 0.978
    assert certified >= 0.85
