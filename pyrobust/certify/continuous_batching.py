"""Sequential certification of many images at once: their samples share every forward batch.

An image that can be decided early stops early; its place in the batch goes to the next image, so
early stopping pays at any batch size. The last images fill their batches with samples of later
looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrobust.certify.design import SequentialDesign
from pyrobust.certify.noise import Noise
from pyrobust.certify.voting import classify

__all__ = ["ImageDecision", "decide_radii"]

_GROUP = 10  # selection samples between looks
_LEAD = 10  # votes ahead that end the selection
_LEAST = 64  # rows below which a forward pass is filled with samples of later looks: a call of a
# small network costs as much as some twenty copies, and an image throws away at most these rows


@dataclass
class ImageDecision:
    """The state of one image: selection first, then one test per radius on common samples.

    Attributes:
        position: row of the image in the input.
        selection: ``(K,)`` votes that choose the class.
        label: the chosen class, -1 during selection.
        successes: votes for ``label`` among the test samples.
        trials: test samples looked at.
        certified: radii certified, counted from the smallest without a gap.
    """

    position: int
    selection: NDArray[np.int64]
    label: int = -1
    successes: int = 0
    trials: int = 0
    certified: int = 0
    finished: bool = False
    target: int = 0  # selection samples at which the selection is looked at next
    selected: int = 0  # selection samples put into batches
    issued: int = 0  # test samples put into batches
    look: int = 0
    status: NDArray[np.int8] | None = None  # per radius: 0 open, 1 certified, -1 given up
    ahead: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # classes of the test samples that no look has seen yet, in order

    @property
    def samples(self) -> int:
        """Samples that the decision rests on, selection included."""
        return int(self.selection.sum()) + self.trials


class _Rules:
    """When a selection ends, when a test ends, and how many samples the next look needs."""

    def __init__(self, designs: list[SequentialDesign], n0: int) -> None:
        self.n0 = n0
        self.looks = designs[0].looks
        self.upper = np.stack([design.upper for design in designs])
        self.lower = np.stack([design.lower for design in designs])

    def start(self, image: ImageDecision) -> None:
        image.status = np.zeros(len(self.upper), dtype=np.int8)
        image.target = min(_GROUP, self.n0)

    def wanted(self, image: ImageDecision) -> int:
        """Samples still to be put into batches before the next look."""
        if image.label < 0:
            return image.target - image.selected
        return int(self.looks[image.look]) - image.issued

    def take(self, image: ImageDecision, size: int, *, early: bool = False) -> tuple[int, int]:
        """First index and number of the next samples; ``early``: of the test, come what may.

        Test samples begin at index n0 however early the selection ended.
        """
        if image.label < 0 and not early:
            image.selected += size
            return image.selected - size, size
        size = min(size, int(self.looks[-1]) - image.issued)
        image.issued += size
        return self.n0 + image.issued - size, size

    def absorb(self, image: ImageDecision, first: int, classes: NDArray[np.int64]) -> None:
        """Keep the classes of the samples from index ``first`` on."""
        if first < self.n0:
            image.selection += np.bincount(classes, minlength=len(image.selection))
        else:
            image.ahead = np.concatenate([image.ahead, classes])

    def decide(self, image: ImageDecision) -> None:
        """Every look whose samples are complete."""
        if image.label < 0:
            self._select(image)
        while image.label >= 0 and not image.finished and self.wanted(image) <= 0:
            size = int(self.looks[image.look]) - image.trials
            image.successes += int((image.ahead[:size] == image.label).sum())
            image.ahead = image.ahead[size:]
            image.trials += size
            self._test(image)
            image.look += 1

    def _select(self, image: ImageDecision) -> None:
        second, first = np.sort(image.selection)[-2:]
        if image.target == self.n0 or first - second >= _LEAD:
            image.label = int(image.selection.argmax())
        else:
            image.target = min(image.target + _GROUP, self.n0)

    def _test(self, image: ImageDecision) -> None:
        status = image.status
        assert status is not None
        passed = image.successes >= self.upper[:, image.look]
        failed = image.successes <= self.lower[:, image.look]
        status[(status == 0) & passed] = 1
        status[(status == 0) & failed] = -1
        # Nested hypotheses: a radius counts only where every smaller one is certified.
        ones = status == 1
        image.certified = len(ones) if ones.all() else int(np.argmin(ones))
        image.finished = image.certified == len(ones) or bool(status[image.certified] < 0)


def decide_radii(
    base: nn.Module,
    x: Tensor,
    noise: Noise,
    designs: list[SequentialDesign],
    *,
    num_classes: int,
    n0: int,
    seed: int,
    first_index: int = 0,
    batch_size: int = 512,
    subject: str = "decide_radii",
    bar: Any = None,
) -> list[ImageDecision]:
    """Run the tests of ``designs`` (one per radius, smallest first, common looks) on each image.

    Args:
        base: classifier, ``(N, ...)`` to ``(N, num_classes)``, in evaluation mode, any device.
        x: ``(B, ...)`` inputs of a kind that the noise accepts.
        noise: what is added to them.
        designs: one test per radius, in increasing order of ``p_null``.
        num_classes: ``K``.
        n0: most samples that the selection of the class may take.
        seed: key of the noise.
        first_index: image index of ``x[0]``.
        batch_size: rows per forward pass.
        subject: who asks, for error messages.
        bar: a tqdm bar to advance by the images done, or None.

    Returns:
        One decision per image, in order.

    Raises:
        ValueError: the base returns another shape, or NaN for a sample (which is named).
    """
    rules = _Rules(designs, n0)
    images = [ImageDecision(b, np.zeros(num_classes, np.int64)) for b in range(x.shape[0])]
    inputs = x.detach().cpu()
    buffer = torch.empty((batch_size, *noise.shape(tuple(x.shape[1:]))))
    dtype = x.dtype if x.is_floating_point() else torch.float32
    waiting: deque[ImageDecision] = deque()
    newcomers = iter(images)
    while True:
        pieces = _fill(rules, waiting, newcomers, batch_size)
        if not pieces:
            return images
        row = 0
        for image, first, size in pieces:
            b = image.position
            noise.fill(
                inputs[b : b + 1],
                buffer[row : row + size],
                seed=seed,
                first_sample=first,
                first_index=first_index + b,
            )
            row += size
        classes, nan = classify(base, buffer[:row].to(dtype), num_classes, subject)
        row = 0
        for image, first, size in pieces:
            if row <= nan < row + size:
                raise ValueError(
                    f"{subject}: the base must not return NaN; it does for sample "
                    f"{first + nan - row} of image {first_index + image.position} (seed {seed})."
                )
            rules.absorb(image, first, classes[row : row + size].numpy())
            row += size
        for image in {id(image): image for image, _, _ in pieces}.values():
            if rules.wanted(image) > 0:  # its group goes on first in the next batch
                continue
            rules.decide(image)
            if not image.finished:
                waiting.append(image)
            elif bar is not None:
                bar.update(1)


def _fill(
    rules: _Rules,
    waiting: deque[ImageDecision],
    newcomers: Iterator[ImageDecision],
    batch_size: int,
) -> list[tuple[ImageDecision, int, int]]:
    """Pieces (image, first sample, size) of one batch: images under way first, then new ones.

    Where these leave a batch nearly empty, samples of later looks fill it: which samples a look
    sees, and so every decision, stays as planned.
    """
    pieces: list[tuple[ImageDecision, int, int]] = []
    space = batch_size
    while space > 0:
        if waiting:
            image = waiting.popleft()
        else:
            newcomer = next(newcomers, None)
            if newcomer is None:
                break
            image = newcomer
            rules.start(image)
        size = min(space, rules.wanted(image))
        pieces.append((image, *rules.take(image, size)))
        space -= size
        if rules.wanted(image) > 0:
            waiting.appendleft(image)
    spare = min(_LEAST, batch_size) - (batch_size - space)
    if not pieces or spare <= 0:
        return pieces
    share = -(-spare // len(pieces))
    for image in [image for image, _, _ in pieces]:
        first, size = rules.take(image, min(share, spare), early=True)
        spare -= size
        if size > 0:
            pieces.append((image, first, size))
    return pieces
