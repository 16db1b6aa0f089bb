import numpy as np
import torch
from sklearn.datasets import load_digits as sklearn_digits

from pyrobust.data import load_digits


def test_digits_are_a_fixed_split_of_the_whole_set():
    digits = load_digits()
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.num_classes == 10
    assert digits.train_images.dtype == torch.float32
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    raw = sklearn_digits()
    ours = torch.cat([digits.train_images, digits.test_images]).flatten(1).numpy() * 16
    labels = torch.cat([digits.train_labels, digits.test_labels]).numpy()
    pairs = lambda x, y: sorted(map(tuple, np.column_stack([x, y]).tolist()))  # noqa: E731
    assert pairs(ours, labels) == pairs(raw.data, raw.target)
    assert torch.equal(load_digits().test_labels, digits.test_labels)


def test_head_cuts_both_parts():
    small = load_digits().head(20, 5)
    assert len(small.train_images) == len(small.train_labels) == 20
    assert len(small.test_images) == len(small.test_labels) == 5
