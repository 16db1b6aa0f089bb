"""Coins per element or pixel, and noise on two complementary parts."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.library import opcheck

from pyrobust import _native
from pyrobust.ops import gaussian_samples, masked_samples, split_gaussian_samples


def test_kept_elements_are_the_input_and_the_others_the_fill(isa):
    x = torch.rand(3, 2, 5, 37) + 1
    masked = masked_samples(x, 0.3, 7, seed=1, fill=-2.5)
    kept = masked != -2.5
    assert torch.equal(torch.where(kept, x[:, None], -2.5), masked)
    assert 0.25 < kept.float().mean() < 0.35
    gone = masked_samples(x, 0.3, 7, seed=1, fill=math.nan)
    assert torch.equal(gone.isnan(), ~kept)
    x[0, 0, 0, 0] = math.nan  # hidden values leave no trace
    again = masked_samples(x, 0.3, 7, seed=1, fill=-2.5)
    assert torch.equal(again[:, :, 1], masked[:, :, 1])
    assert torch.equal(again[0, :, 0, 0, 0].isnan(), kept[0, :, 0, 0, 0])


@pytest.mark.parametrize("keep", [2.0**-60, 0.01, 0.5, 0.9])
def test_instruction_sets_and_dtypes_agree_to_the_bit(isa, keep):
    x = torch.randn(3, 5, 37)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = masked_samples(x, keep, 90, seed=11, dtype=dtype)
        _native.set_isa("portable")
        expected = masked_samples(x, keep, 90, seed=11, dtype=dtype)
        _native.set_isa(isa)
        assert torch.equal(got, expected)
        assert torch.equal(got, masked_samples(x, keep, 90, seed=11).to(dtype))


@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 1 - 1e-4])
def test_frequency_is_the_probability(keep):
    ones = torch.ones(10, 1000)
    kept = masked_samples(ones, keep, 500, seed=4)
    assert stats.binomtest(int(kept.sum()), kept.numel(), keep).pvalue > 1e-4
    per_place = kept.sum((0, 1)).numpy()
    assert stats.chisquare(per_place).statistic < (1 - keep) * stats.chi2.isf(1e-4, 999)


def test_first_words_that_do_not_decide_are_settled_by_more():
    half_word = (5 << 32) | 2**31  # probability (5 + 1/2) / 2^32
    assert _native.keep_value(half_word, 4, 0) == (True, 1)
    assert _native.keep_value(half_word, 6, 0) == (False, 1)
    assert _native.keep_value(half_word, 5, 2**31 - 1) == (True, 2)
    assert _native.keep_value(half_word, 5, 2**31) == (False, 2)


def test_undecided_coins_are_settled_in_the_kernels(isa):
    """A threshold made of the very word of an element: the kernel must look at more bits."""
    for element in (0, 17, 200, 301):
        block, word = element // 64 * 16 + element % 16, element % 64 // 16
        bits = _native.philox_words([block, 0, 0, 7 << 24], 3)[word]
        extra = _native.philox_words([block, 0, 0, 8 << 24], 3)[word]
        for low, kept in ((extra, 0.0), (extra + 1, 1.0)):
            out = torch.empty(1, 1, 1, 302)
            _native.masked_samples(torch.ones(1, 1, 302), bits << 32 | low, 0.0, out, 3, 0, 0, 1)
            assert out[0, 0, 0, element] == kept


def test_channels_of_a_pixel_share_a_coin(isa):
    x = torch.rand(2, 3, 9, 11) + 1
    masked = masked_samples(x, 0.5, 6, seed=2, per="pixel")
    kept = masked != 0
    assert torch.equal(kept[:, :, 0], kept[:, :, 1])
    assert torch.equal(kept[:, :, 0], kept[:, :, 2])
    assert torch.equal(masked, x[:, None] * kept)
    single = masked_samples(x[:, 0], 0.5, 6, seed=2)
    assert torch.equal(masked[:, :, 0], single)


def test_splits_and_threads_change_no_bit(isa):
    x = torch.rand(4, 3, 333)
    options = {"seed": 3, "per": "pixel"}
    whole = masked_samples(x, 0.4, 30, first_sample=9, first_index=2, **options)
    for begin, size in ((0, 1), (1, 7), (8, 22)):
        part = masked_samples(x, 0.4, size, first_sample=9 + begin, first_index=2, **options)
        assert torch.equal(part, whole[:, begin : begin + size])
    alone = masked_samples(x[3:], 0.4, 30, first_sample=9, first_index=5, **options)
    assert torch.equal(alone, whole[3:])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(
                masked_samples(x, 0.4, 30, first_sample=9, first_index=2, **options), whole
            )
    finally:
        torch.set_num_threads(before)


def test_coins_and_noise_are_independent():
    ones = torch.ones(4, 4096)
    kept = masked_samples(ones, 0.5, 50, seed=6) - 0.5
    z = gaussian_samples(0 * ones, 1.0, 50, seed=6)
    assert abs((kept * z).mean().item()) < 5 * 0.5 / kept.numel() ** 0.5
    assert abs((kept[1:] * kept[:-1]).mean().item()) < 5 * 0.25 / (0.75 * kept.numel()) ** 0.5
    assert abs((kept[:, 1:] * kept[:, :-1]).mean().item()) < 1.3 / kept.numel() ** 0.5


@pytest.mark.parametrize("sigma", [0.5, (0.25, 2.0)])
def test_parts_are_the_gaussian_noise_on_their_elements(isa, sigma):
    x = torch.randn(2, 3, 7, 29)
    mask = torch.rand(1, 7, 29) < 0.4
    left, right = split_gaussian_samples(x, mask, sigma, 11, seed=9, first_sample=5, first_index=3)
    pair = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    position = {"seed": 9, "first_sample": 5, "first_index": 3}
    for part, keep, value in ((left, mask, pair[0]), (right, ~mask, pair[1])):
        assert torch.equal(part, gaussian_samples(x, value, 11, **position) * keep)
    x[:, :, ~mask[0]] = math.nan  # hidden values leave no trace
    again, _ = split_gaussian_samples(x, mask, sigma, 11, **position)
    assert torch.equal(again, left)


def test_split_gradients_reach_their_part():
    x = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.rand(3, 4) < 0.5
    left, right = split_gaussian_samples(x, mask, 0.5, 6, seed=0)
    (2 * left.sum() + 3 * right.sum()).backward()
    assert torch.equal(x.grad, torch.where(mask, 12.0, 18.0).expand(2, 3, 4))


def test_masked_gradient_is_the_coins():
    x = torch.rand(2, 5, requires_grad=True)
    masked = masked_samples(x, 0.5, 7, seed=8, fill=1.0)
    masked.sum().backward()
    kept = masked_samples(torch.ones(2, 5), 0.5, 7, seed=8)
    assert torch.equal(x.grad, kept.sum(1))


def test_empty_and_strided_inputs():
    assert masked_samples(torch.zeros(0, 3), 0.5, 4, seed=0).shape == (0, 4, 3)
    assert masked_samples(torch.zeros(2, 0), 0.5, 4, seed=0).shape == (2, 4, 0)
    assert masked_samples(torch.zeros(2, 3, 0), 0.5, 4, seed=0, per="pixel").shape == (2, 4, 3, 0)
    x = torch.rand(6, 4, 10).transpose(0, 2)[::2]
    assert torch.equal(
        masked_samples(x, 0.5, 3, seed=0), masked_samples(x.contiguous(), 0.5, 3, seed=0)
    )
    left, right = split_gaussian_samples(x, x[0] > 0.5, 0.5, 0, seed=0)
    assert left.shape == right.shape == (5, 0, 4, 6)


def test_operators_pass_opcheck():
    x = torch.rand(2, 3, 5, requires_grad=True)
    arguments = (x, 0.5, 0.0, True, 3, 1, 2, 3, torch.float32)
    opcheck(torch.ops.pyrobust.masked_samples.default, arguments)
    mask = torch.from_numpy(np.arange(15) % 2 == 0)
    opcheck(torch.ops.pyrobust.split_gaussian_samples.default, (x, mask, 0.5, 1.0, 3, 1, 2, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.zeros(1, 2, dtype=torch.uint8)}, TypeError, "floating-point tensor"),
        ({"keep": 0.0}, ValueError, r"keep must lie in the open interval \(0, 1\)"),
        ({"keep": 1.0}, ValueError, r"keep must lie in the open interval \(0, 1\)"),
        ({"per": "patch"}, ValueError, "per must be one of element, pixel"),
        ({"per": "pixel"}, ValueError, r"x must be \(B, C, ...\) where per='pixel'"),
        ({"n": -1}, ValueError, "n must be at least 0"),
        ({"dtype": torch.int16}, TypeError, "dtype must be float32"),
    ],
)
def test_bad_arguments_of_masks_are_refused(options, error, message):
    arguments = {"x": torch.zeros(1, 2), "keep": 0.5, "n": 1, "seed": 0, **options}
    with pytest.raises(error, match=message):
        masked_samples(arguments.pop("x"), arguments.pop("keep"), arguments.pop("n"), **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.zeros(1, 2).bfloat16()}, TypeError, "x must have dtype float32"),
        ({"mask": torch.ones(2)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "broadcastable to one input"),
        ({"sigma": (0.5, 0.0)}, ValueError, "sigma must be finite and positive"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_arguments_of_splits_are_refused(options, error, message):
    mask = torch.ones(2, dtype=torch.bool)
    arguments = {"x": torch.zeros(1, 2), "mask": mask, "sigma": 0.5, "n": 1, "seed": 0, **options}
    order = [arguments.pop(name) for name in ("x", "mask", "sigma", "n")]
    with pytest.raises(error, match=message):
        split_gaussian_samples(*order, **arguments)
