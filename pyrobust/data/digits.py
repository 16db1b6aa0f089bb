"""Digits: 1,797 handwritten digits of 8 by 8 pixels that come with scikit-learn, no download.

Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI repository,
1998 (its test part, as scikit-learn packages it).
"""

from __future__ import annotations

import numpy as np
import torch

from pyrobust._checks import require_extra
from pyrobust.data.image_set import ImageSet

__all__ = ["load_digits"]

_TRAIN = 1437


def load_digits() -> ImageSet:
    """1,437 training and 360 test images ``(N, 1, 8, 8)`` in [0, 1], split with seed 0.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise require_extra("load_digits", "scikit-learn", "demo") from error
    raw = load()
    images = torch.from_numpy(raw.images.astype(np.float32) / 16.0)[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, test = order[:_TRAIN], order[_TRAIN:]
    return ImageSet("digits", images[train], labels[train], images[test], labels[test], 10)
