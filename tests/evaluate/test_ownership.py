"""The ownership test: exact under independent bits, and under a random message without that."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

from pyrobust.evaluate import bit_accuracy, ownership_threshold, verify_ownership


@pytest.mark.parametrize(
    ("n", "fpr", "threshold"), [(48, 0.005, 34), (16, 0.005, 14), (80, 0.005, 52)]
)
def test_known_thresholds(n, fpr, threshold):
    assert ownership_threshold(n, fpr) == threshold


def test_known_tail_probabilities():
    assert stats.binom.sf(33, 48, 0.5) == pytest.approx(0.0027576, abs=1e-7)
    assert stats.binom.sf(32, 48, 0.5) == pytest.approx(0.0066416, abs=1e-7)


@pytest.mark.parametrize("fpr", [0.5, 0.1, 0.005, 1e-6, 1e-12])
def test_threshold_is_the_smallest_by_scan(fpr):
    for n in (1, 2, 7, 48, 100, 333):
        scan = next(t for t in range(n + 2) if stats.binom.sf(t - 1, n, 0.5) <= fpr)
        assert ownership_threshold(n, fpr) == scan


def test_false_positive_rate_on_random_messages():
    generator = torch.Generator().manual_seed(0)
    matches = (torch.rand(2000, 48, generator=generator) < 0.5).sum(1)
    rate = (matches >= ownership_threshold(48, 0.005)).double().mean().item()
    exact = stats.binom.sf(33, 48, 0.5)
    assert abs(rate - exact) <= 3 * (exact * (1 - exact) / 2000) ** 0.5


@pytest.mark.parametrize(("images", "threshold"), [(1, 34), (16, 421), (64, 1608)])
def test_thresholds_of_48_bits_over_several_images(images, threshold):
    """The bit accuracy that is claimed falls from 0.708 over 0.548 to 0.523."""
    assert ownership_threshold(48 * images, 0.005) == threshold
    assert stats.binom.sf(threshold - 1, 48 * images, 0.5) <= 0.005
    assert stats.binom.sf(threshold - 2, 48 * images, 0.5) > 0.005


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits[: len(images)]


def test_verification_counts_over_images():
    message = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    logits = (2.0 * message - 1).repeat(10, 1)
    logits[0] = -logits[0]
    images, extractor = torch.zeros(10, 1, 2, 2), Fixed(logits).eval()
    result = verify_ownership(images, extractor, message, null="binomial")
    assert (result.matches, result.bits, result.threshold) == (72, 80, 52)
    assert result.claimed
    assert result.p_value == pytest.approx(stats.binom.sf(71, 80, 0.5))
    assert result.summary().startswith("claimed: 72 of 80")
    assert not verify_ownership(images[:1], extractor, message).claimed
    by_default = verify_ownership(images, extractor, message)
    assert (by_default.matches, by_default.bits) == (72, 80)
    assert by_default.p_value == pytest.approx(2.0**-8)  # no other message matches as well


def test_the_null_of_a_random_message_is_exact_by_enumeration():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    extractor, images = Fixed(logits).eval(), torch.zeros(5, 1, 2, 2)
    every = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    matches = ((logits > 0)[None] == (every > 0)[:, None]).sum((1, 2))
    for message, own in zip(every, matches, strict=True):
        result = verify_ownership(images, extractor, message, fpr=0.1, null="message")
        assert result.p_value == pytest.approx((matches >= own).double().mean().item())
        assert result.claimed == (result.p_value <= 0.1)
    own_means = (2 * every - 1).double() @ logits.double().mean(0)
    for message, own in zip(every, own_means, strict=True):
        result = verify_ownership(images, extractor, message, fpr=0.1, statistic="logits")
        # rounding to 10,000 parts moves no sum by as much as two of these lie apart
        assert result.p_value == pytest.approx((own_means >= own - 1e-9).double().mean().item())
        assert result.claimed == (result.p_value <= 0.1)


def test_one_image_is_the_binomial_test_of_its_bits():
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    extractor, image = Fixed(logits).eval(), torch.zeros(1, 1, 2, 2)
    for message in torch.randint(2, (20, 16), generator=torch.Generator().manual_seed(4)):
        one, other = (
            verify_ownership(image, extractor, message, null=null)
            for null in ("message", "binomial")
        )
        assert (one.matches, one.threshold) == (other.matches, other.threshold)
        assert one.p_value == pytest.approx(other.p_value)


def test_mean_logits_find_a_mark_that_is_faint_in_every_image():
    """Bits right in 55% of the images, and a strong bias of all images of the decoder."""
    generator = torch.Generator().manual_seed(0)
    message = torch.randint(2, (24,), generator=generator)
    bias = torch.zeros(24)
    bias[:6] = 0.5 * torch.randn(6, generator=generator)
    logits = torch.randn(400, 24, generator=generator) + 0.13 * (2 * message - 1) + bias
    extractor, images = Fixed(logits).eval(), torch.zeros(400, 1, 2, 2)
    result = verify_ownership(images, extractor, message, fpr=1e-3, statistic="logits")
    assert result.claimed
    assert 9_990 <= result.bits <= 10_010
    claims = [
        verify_ownership(images, extractor, other, fpr=0.05, statistic="logits").claimed
        for other in torch.randint(2, (400, 24), generator=generator)
    ]
    assert 0 < sum(claims) <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5
    nothing = verify_ownership(images, Fixed(0 * logits).eval(), message, statistic="logits")
    assert not nothing.claimed


def test_dependent_images_break_the_binomial_null_and_not_that_of_the_message():
    """One row of foreign bits a hundred times: all bits of one image, nothing more."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 16, generator=generator).repeat(100, 1)
    extractor, images = Fixed(logits).eval(), torch.zeros(100, 1, 2, 2)
    claims = {"binomial": 0, "message": 0}
    for message in torch.randint(2, (400, 16), generator=generator):
        for null in claims:
            claims[null] += verify_ownership(
                images, extractor, message, fpr=0.05, null=null
            ).claimed
    assert claims["binomial"] > 0.3 * 400
    assert claims["message"] <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5
    assert claims["message"] > 0
    whole = verify_ownership(images, extractor, (logits[0] > 0).long(), fpr=1e-4, null="message")
    assert whole.claimed
    assert whole.p_value == pytest.approx(2.0**-16)
    never = verify_ownership(images, extractor, (logits[0] > 0).long(), fpr=1e-5, null="message")
    assert not never.claimed


def test_refusals():
    message = torch.tensor([1, 0])
    extractor = Fixed(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="training mode"):
        verify_ownership(torch.zeros(1, 1, 1, 1), extractor, message)
    with pytest.raises(ValueError, match="null must be one of"):
        verify_ownership(torch.zeros(1, 1, 1, 1), extractor, message, null="other")
    with pytest.raises(ValueError, match="statistic must be one of bits; got 'logits'"):
        verify_ownership(
            torch.zeros(1, 1, 1, 1), extractor.eval(), message, null="binomial", statistic="logits"
        )
    broken = Fixed(torch.full((1, 2), float("nan"))).eval()
    with pytest.raises(ValueError, match="logits must be finite"):
        verify_ownership(torch.zeros(1, 1, 1, 1), broken, message)
    with pytest.raises(ValueError, match="gives 3 bits, the message has 2"):
        verify_ownership(torch.zeros(1, 1, 1, 1), extractor.eval(), message)
    with pytest.raises(ValueError, match="zeros and ones"):
        bit_accuracy(torch.zeros(1, 2), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"fpr must lie in the open interval \(0, 1\)"):
        ownership_threshold(48, 1.0)
    bright = torch.full((1, 1, 2, 2), 200.0)
    with pytest.raises(ValueError, match=r"images must lie in .*; got values from 200 to 200"):
        verify_ownership(bright, extractor, torch.tensor([1, 0, 1]), image_range=(0, 1))
    verify_ownership(bright / 180, extractor, torch.tensor([1, 0, 1]), image_range=(0, 1))
