"""What the demo trains and measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyrobust._checks import check_integer, check_open_unit, check_positive
from pyrobust.data import ImageSet

__all__ = ["DemoSettings"]

_DIGITS_TRAIN, _DIGITS_TEST = 1437, 360


@dataclass(frozen=True)
class DemoSettings:
    """All choices of a run; they are written into the report.

    Both networks see Gaussian noise of ``sigma`` in their clean loss, so that both can be smoothed;
    they differ in the interval term only.

    Attributes:
        seed: of initial weights, batches, training noise and certification noise.
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: of Adam.
        sigma: noise of training and of smoothing, in pixel units.
        eps: l-infinity radius of interval training, a little above the one to be certified.
        bits: 32 for float, others packed.
        group_size: weights that share a scale.
        eps_grid: l-infinity radii of the report.
        radius_grid: l2 radii of the report.
        selection_samples: noisy copies that choose a class.
        samples: noisy copies that bound its probability.
        alpha: probability of error per image of the l2 statements.
    """

    seed: int = 0
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 3e-3
    sigma: float = 0.25
    eps: float = 0.12
    bits: tuple[int, ...] = (32, 8, 4, 2)
    group_size: int = 32
    eps_grid: tuple[float, ...] = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.12, 0.15)
    radius_grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
    selection_samples: int = 100
    samples: int = 1000
    alpha: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "group_size", "selection_samples", "samples"):
            check_integer("DemoSettings", name, getattr(self, name), 1)
        check_integer("DemoSettings", "seed", self.seed, 0)
        for name in ("learning_rate", "sigma", "eps"):
            check_positive("DemoSettings", name, getattr(self, name))
        check_open_unit("DemoSettings", "alpha", self.alpha)

    def fitted_to(self, data: ImageSet) -> DemoSettings:
        """Fewer epochs and samples where there are more images than digits has."""
        epochs = round(self.epochs * _DIGITS_TRAIN / len(data.train_images))
        samples = round(self.samples * _DIGITS_TEST / len(data.test_images))
        return replace(
            self,
            epochs=min(self.epochs, max(4, epochs)),
            samples=min(self.samples, max(200, samples)),
        )

    def quick(self) -> DemoSettings:
        """A look at the machinery within seconds; the figures mean little."""
        return replace(self, epochs=min(self.epochs, 8), samples=100, selection_samples=20)
