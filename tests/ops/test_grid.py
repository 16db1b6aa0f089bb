"""The rounded Gaussian is the exact inversion of its random bits, on every instruction set."""

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.library import opcheck

from pyrobust import _native
from pyrobust.ops import gaussian_samples, grid_samples
from pyrobust.ops._grid_thresholds import grid_thresholds

SIGMAS = [0.12, 0.25, 0.5, 1.0]


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def words_numpy(elements, samples, seed, purpose):
    """The random words of image 0 as csrc/sampling/sampling.h places them."""
    e = np.arange(elements, dtype=np.uint64)
    block = np.tile(e // 64 * 16 + e % 16, samples)
    sample = np.repeat(np.arange(samples, dtype=np.uint64), elements)
    columns = [block, sample, np.zeros_like(block), np.full_like(block, purpose << 24)]
    low, mask = np.stack(columns, axis=1), np.uint64(0xFFFFFFFF)
    for turn in range(10):
        k0 = np.uint64((seed + turn * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64(((seed >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = low[:, 0] * np.uint64(0xD2511F53), low[:, 2] * np.uint64(0xCD9E8D57)
        columns = [(b >> 32) ^ low[:, 1] ^ k0, b & mask, (a >> 32) ^ low[:, 3] ^ k1, a & mask]
        low = np.stack(columns, axis=1)
    return low[np.arange(len(low)), np.tile((e % 64 // 16).astype(int), samples)]


@pytest.fixture(scope="module")
def draws():
    """64-bit uniform numbers of 1,024,000 elements: sign, and 63 bits of tail probability."""
    first, second = (words_numpy(3072, 334, 11, purpose) for purpose in (0, 1))
    tail = ((first & np.uint64(0x7FFFFFFF)) << np.uint64(32)) | second
    return tail, (first >> np.uint64(31)).astype(bool)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_million_draws_equal_exact_inversion(sigma, draws):
    """Reference: the thresholds of mpmath, 64 places, searched in the sorted table."""
    tail, negative = draws
    with mpmath.workprec(160):
        scale = mpmath.mpf(sigma) * 255 * mpmath.sqrt(2)
        count = int(9.3 * sigma * 255)
        exact = [mpmath.erfc((2 * j - 1) / scale / 2) / 2 for j in range(1, count + 1)]
        table = np.array([int(mpmath.floor(q * 2**64)) for q in exact], dtype=np.uint64)
    assert not np.isin(tail, table).any()  # 64 places decide every one of these draws
    k = np.searchsorted(np.sort(table), tail, side="right")
    k = count - k
    expected = torch.from_numpy(np.where(negative, -k, k)).view(334, 3072)
    got = grid_samples(zeros(1, 3072), sigma, 334, seed=11)[0]
    assert torch.equal(got.long(), expected)


@pytest.mark.parametrize("sigma", [0.004, 0.12, 1.0, 9.4])
def test_instruction_sets_and_dtypes_agree_to_the_bit(isa, sigma):
    x = torch.randint(0, 256, (2, 3, 331), dtype=torch.uint8)
    for dtype in (torch.int16, torch.float32, torch.bfloat16, torch.float16):
        got = grid_samples(x, sigma, 40, seed=5, dtype=dtype)
        _native.set_isa("portable")
        expected = grid_samples(x, sigma, 40, seed=5, dtype=dtype)
        integers = grid_samples(x, sigma, 40, seed=5)
        _native.set_isa(isa)
        assert torch.equal(got, expected)
        if dtype != torch.int16:
            assert torch.equal(got, (integers.float() / 255).to(dtype))


@pytest.mark.parametrize("grid", [1, 3, 100, 255, 1023, 65535])
def test_division_by_the_grid_is_correctly_rounded(isa, grid):
    """The widest noise that is accepted, on both sides."""
    x = torch.arange(256, dtype=torch.uint8).repeat(20)[None]
    sigma = 2400 / grid
    integers = grid_samples(x, sigma, 10, seed=1, grid=grid)
    assert integers.unique().numel() > 6_000
    floats = grid_samples(x, sigma, 10, seed=1, grid=grid, dtype=torch.float32)
    assert torch.equal(floats, integers.float() / grid)


def test_it_rounds_the_gaussian_noise():
    x = torch.randint(0, 256, (2, 1000), dtype=torch.uint8)
    noisy = gaussian_samples(x.float(), 0.5 * 255, 50, seed=3)
    got = grid_samples(x, 0.5, 50, seed=3).float()
    assert (got - noisy).abs().max() < 0.502
    assert (got == noisy.round()).float().mean() > 0.998


def test_splits_and_threads_change_no_bit(isa):
    x = torch.randint(0, 256, (4, 333), dtype=torch.uint8)
    whole = grid_samples(x, 0.25, 30, seed=3, first_sample=9, first_index=2)
    for begin, size in ((0, 1), (1, 7), (8, 22)):
        part = grid_samples(x, 0.25, size, seed=3, first_sample=9 + begin, first_index=2)
        assert torch.equal(part, whole[:, begin : begin + size])
    alone = grid_samples(x[3:], 0.25, 30, seed=3, first_sample=9, first_index=5)
    assert torch.equal(alone, whole[3:])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            many = grid_samples(x.repeat(1, 40), 0.25, 30, seed=3)
            if threads == 1:
                one = many
            assert torch.equal(many, one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_frequencies_are_those_of_the_rounded_gaussian(sigma):
    scale = 255 * sigma
    k = grid_samples(zeros(8, 3072), sigma, 100, seed=2).flatten().numpy().astype(int)
    edge = int(4.5 * scale)
    seen = np.bincount(np.clip(k, -edge, edge) + edge, minlength=2 * edge + 1)
    borders = (np.arange(-edge, edge) + 0.5) / scale
    expected = len(k) * np.diff(special.ndtr(borders), prepend=0, append=1)
    groups = np.arange(len(seen)) * 200 // len(seen)  # 200 bins
    pooled = [np.bincount(groups, weights=w) for w in (seen, expected)]
    order = pooled[1] >= 5
    tails = [[w[order].tolist(), w[~order].sum()] for w in pooled]
    seen, expected = ([*body, tail] for body, tail in tails)
    assert stats.chisquare(seen, expected, sum_check=False).pvalue > 1e-4


def test_grid_takes_sigma_in_units_and_never_clamps():
    x = torch.full((1, 4096), 255, dtype=torch.uint8)
    noisy = grid_samples(x, 0.5, 4, seed=0)
    assert noisy.dtype == torch.int16
    assert noisy.max() > 255
    fine = grid_samples(x, 0.5, 4, seed=0, grid=1020)
    assert abs((fine - 255).float().std().item() - 510) < 12
    assert not grid_samples(zeros(1, 1000), 1e-4, 3, seed=0).any()


def test_empty_strided_and_cut_inputs(isa):
    assert grid_samples(zeros(0, 3), 0.5, 4, seed=0).shape == (0, 4, 3)
    assert grid_samples(zeros(2, 3), 0.5, 0, seed=0).shape == (2, 0, 3)
    x = torch.randint(0, 256, (6, 4, 10), dtype=torch.uint8)
    strided = x.transpose(0, 2)[::2]
    assert torch.equal(
        grid_samples(strided, 0.5, 3, seed=0), grid_samples(strided.contiguous(), 0.5, 3, seed=0)
    )
    guarded = torch.full((70 + 64,), 123, dtype=torch.int16)
    table = grid_thresholds(0.5, 255)
    out = guarded[:70].view(1, 1, 70)
    _native.grid_samples(zeros(1, 70), table, 127.5, 255.0, out, 0, 0, 0, 1)
    assert (guarded[70:] == 123).all()
    assert torch.equal(guarded[:70], grid_samples(zeros(1, 70), 0.5, 1, seed=0).flatten())


def test_operator_passes_opcheck():
    x = torch.randint(0, 256, (2, 5), dtype=torch.uint8)
    for dtype in (torch.int16, torch.float32):
        opcheck(torch.ops.pyrobust.grid_samples.default, (x, 0.5, 255, 3, 1, 2, 3, dtype))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.zeros(1, 2)}, TypeError, "x must be a uint8 tensor"),
        ({"sigma": 0.0}, ValueError, "sigma must be finite and positive"),
        ({"sigma": 10.0}, ValueError, "sigma must be at most 9.41176 for grid=255"),
        ({"grid": 0}, ValueError, "grid must be at least 1"),
        ({"grid": 65536}, ValueError, "grid must be at most 65535"),
        ({"n": -1}, ValueError, "n must be at least 0; got -1"),
        ({"seed": 2**63}, ValueError, r"seed must not exceed 2\*\*63"),
        ({"dtype": torch.int32}, TypeError, "dtype must be int16, float32"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    arguments = {"x": zeros(1, 2), "sigma": 0.5, "n": 1, "seed": 0, **options}
    with pytest.raises(error, match=message):
        grid_samples(arguments.pop("x"), arguments.pop("sigma"), arguments.pop("n"), **arguments)
