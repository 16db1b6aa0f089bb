"""Ownership test for watermarked images: how many message bits must match to claim an image.

Under the null hypothesis (an image of somebody else) every extracted bit matches the message with
probability 1/2, independently; the number of matches over m images of n bits is Binomial(n m, 1/2)
and the threshold is exact. The extractor must give unbiased, independent bits on foreign images:
:func:`pyrobust.train.whiten_extractor_` makes them unbiased on average, but bits of images of one
kind stay correlated, so many similar images say less than the test counts. The second null
hypothesis needs no such assumption: whatever the images, a message that was drawn at random and
kept apart from them matches as often as any other message would, so the number of matches is
compared with its exact distribution over all ``2^n`` messages. It is the default. Over several
images it has a second statistic: the logits of each bit are averaged over the images, and every bit
counts by its mean logit, which still tells the sign where most images are read wrongly.

Source: Lin et al., "An Efficient Watermarking Method for Latent Diffusion Models via Low-Rank
Adaptation", arXiv 2410.20202, verification step; the exact binomial test over several images. The
distribution over messages is a randomisation test (Fisher 1935), our addition, as is the statistic
of mean logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from pyrobust._checks import (
    check_choice,
    check_eval_mode,
    check_finite,
    check_integer,
    check_open_unit,
)

__all__ = [
    "Ownership",
    "bit_accuracy",
    "check_image_range",
    "check_message",
    "ownership_threshold",
    "verify_ownership",
]

# Decoders overshoot their range a little; other conventions ([0, 255], [-1, 1]) leave it far.
_OVERSHOOT = 0.25


@dataclass(frozen=True)
class Ownership:
    """Result of :func:`verify_ownership`.

    Attributes:
        claimed: whether the matches reach the threshold.
        matches: matching bits over all images; with ``statistic="logits"`` the sum of the mean
            logits' sizes over the bits whose sign matches, where all of them together are
            ``10,000``, rounded bit by bit.
        bits: number of bits compared, or about 10,000.
        threshold: smallest number of matches that is claimed.
        p_value: probability of at least so many matches under the null hypothesis.
    """

    claimed: bool
    matches: int
    bits: int
    threshold: int
    p_value: float

    def summary(self) -> str:
        """One line for people."""
        verdict = "claimed" if self.claimed else "not claimed"
        return (
            f"{verdict}: {self.matches} of {self.bits} match, {self.threshold} needed "
            f"(p = {self.p_value:.3g})"
        )


def check_message(subject: str, message: Tensor) -> None:
    """Raise unless ``message`` is a non-empty 1-D tensor of zeros and ones."""
    if message.ndim != 1 or message.numel() == 0:
        raise ValueError(
            f"{subject}: message must be 1-D and not empty; got shape {tuple(message.shape)}."
        )
    if not bool(((message == 0) | (message == 1)).all()):
        raise ValueError(f"{subject}: message must hold zeros and ones only.")


def check_image_range(
    subject: str, name: str, images: Tensor, image_range: tuple[float, float] | None
) -> None:
    """Raise ValueError where images leave a declared range by more than a quarter of its width."""
    if image_range is None or not images.numel():
        return
    low, high = image_range
    if not low < high:
        raise ValueError(f"{subject}: image_range must be (low, high); got {image_range}.")
    least, most = (float(value) for value in images.detach().aminmax())
    slack = _OVERSHOOT * (high - low)
    if not (low - slack <= least and most <= high + slack):
        raise ValueError(
            f"{subject}: {name} must lie in [{low:g}, {high:g}]; got values from {least:.4g} to "
            f"{most:.4g}."
        )


def _check_bits(subject: str, logits: Tensor, message: Tensor) -> None:
    check_message(subject, message)
    if logits.shape[-1] != message.numel():
        raise ValueError(
            f"{subject}: the extractor gives {logits.shape[-1]} bits, the message has "
            f"{message.numel()}."
        )


def bit_accuracy(logits: Tensor, message: Tensor) -> float:
    """Share of bits whose logit has the message's sign.

    Args:
        logits: ``(B, n)`` float.
        message: ``(n,)`` zeros and ones.

    Raises:
        ValueError: the message is not binary or of another length.
    """
    _check_bits("bit_accuracy", logits, message)
    return float(((logits > 0) == (message > 0)).double().mean())


def ownership_threshold(n_bits: int, fpr: float) -> int:
    """Smallest T with P(Binomial(n_bits, 1/2) >= T) <= fpr.

    Args:
        n_bits: number of bits compared, ``>= 1`` (bits times images).
        fpr: false-positive rate in ``(0, 1)``.

    Returns:
        T in ``[0, n_bits + 1]``; ``n_bits + 1`` means that no outcome is rare enough.

    Example:
        >>> ownership_threshold(48, 0.005)
        34
    """
    check_integer("ownership_threshold", "n_bits", n_bits, 1)
    check_open_unit("ownership_threshold", "fpr", fpr)
    threshold = int(stats.binom.isf(fpr, n_bits, 0.5))
    while threshold > 0 and stats.binom.sf(threshold - 2, n_bits, 0.5) <= fpr:
        threshold -= 1
    while stats.binom.sf(threshold - 1, n_bits, 0.5) > fpr:
        threshold += 1
    return threshold


# Sizes of mean logits are rounded to this many parts of their sum, so that their null distribution
# can be counted exactly; the rounding is part of the statistic.
_PARTS = 10_000


def _message_scores(logits: Tensor, statistic: str) -> tuple[Tensor, Tensor]:
    """What a bit of the message adds to the statistic where it is 0 and where it is 1, ``(n,)``."""
    if statistic == "bits":
        ones = (logits > 0).sum(0)
        return len(logits) - ones, ones
    means = logits.double().mean(0)
    total = float(means.abs().sum()) or 1.0
    parts = (means * (_PARTS / total)).round().long()
    return (-parts).clamp_min(0), parts.clamp_min(0)


def _message_tail(zeros: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """``P(statistic >= t)`` for t = 0, 1, .. under a message of which every bit is a fair coin."""
    probability = np.zeros(int(np.maximum(zeros, ones).sum()) + 2)
    probability[0] = 1.0
    for zero, one in zip(zeros.tolist(), ones.tolist(), strict=True):
        probability = 0.5 * (np.roll(probability, zero) + np.roll(probability, one))
    tail: np.ndarray = probability[::-1].cumsum()[::-1]
    return tail


@torch.no_grad()
def verify_ownership(
    images: Tensor,
    extractor: nn.Module,
    message: Tensor,
    *,
    fpr: float = 0.005,
    image_range: tuple[float, float] | None = None,
    null: str = "message",
    statistic: str = "bits",
) -> Ownership:
    """Exact test of how well the bits read from a batch of images match a message.

    Args:
        images: ``(m, C, H, W)`` float in the extractor's range.
        extractor: images to ``(m, n)`` logits, in evaluation mode.
        message: ``(n,)`` zeros and ones.
        fpr: accepted false-positive rate of the whole statement, in ``(0, 1)``.
        image_range: the range that the extractor takes; images beyond it by more than a quarter of
            its width are refused. None checks nothing.
        null: "message": the message was drawn uniformly and independently of these images, which
            may depend on each other in any way (images of one decoder do). It claims nothing below
            ``fpr = 2^-n``. "binomial": all bits of all images are independent and fair, as
            published. The rate of false claims is then ``fpr`` only where that holds; over 64
            images of one decoder it was several times ``fpr``.
        statistic: "bits": matching bits over all images; "logits": bits weighted by the mean of
            their logits over the images, under the null "message" only. It finds a faint mark in
            many images of one decoder.

    Returns:
        The decision with its figures.

    Raises:
        ValueError: the extractor is in training mode, the message is not binary or of another
            length, an option is not accepted, or the images leave the declared range.
    """
    check_choice("verify_ownership", "null", null, ["message", "binomial"])
    accepted = ["bits", "logits"] if null == "message" else ["bits"]
    check_choice("verify_ownership", "statistic", statistic, accepted)
    check_image_range("verify_ownership", "images", images, image_range)
    check_eval_mode("verify_ownership", extractor)
    check_open_unit("verify_ownership", "fpr", fpr)
    logits = extractor(images)
    if null == "binomial":
        bits = logits.numel()
        matches = round(bit_accuracy(logits, message) * bits)
        threshold = ownership_threshold(bits, fpr)
        p_value = float(stats.binom.sf(matches - 1, bits, 0.5))
        return Ownership(matches >= threshold, matches, bits, threshold, p_value)
    _check_bits("verify_ownership", logits, message)
    check_finite("verify_ownership", "the extractor's logits", logits)
    zeros, ones = (score.cpu() for score in _message_scores(logits, statistic))
    matches = int(torch.where(message.cpu() > 0, ones, zeros).sum())
    tail = _message_tail(zeros.numpy(), ones.numpy())
    threshold = int(np.argmax(tail <= fpr))
    return Ownership(
        matches >= threshold, matches, int((zeros + ones).sum()), threshold, float(tail[matches])
    )
