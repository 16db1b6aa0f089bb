"""The CUDA sampling kernels on fibres: the bits of the CPU, and index arithmetic beyond 2^31."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust import ops
from pyrobust.ops import _cuda_module, _cuda_sampling

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOISES = ["gaussian_samples", "uniform_samples", "laplace_samples"]
POSITION = {"seed": 7, "first_sample": 2**40 - 40, "first_index": 2**48 - 9}
ACROSS = {"seed": 5, "first_sample": 2**32 - 3, "first_index": 2**32 - 1}  # high words change


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("shape", [(2, 196), (3, 67), (1, 4), (1, 1)])
def test_noise_has_the_bits_of_the_cpu(emulated_cuda, name, dtype, shape):
    x, scale = torch.randn(shape), torch.rand(shape[0]) + 0.1
    seen = _cuda_sampling.noise(name, x, scale, 5, *POSITION.values(), dtype)
    assert torch.equal(seen, getattr(ops, name)(x, scale, 5, dtype=dtype, **POSITION))


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("skipped", [1, 2])
def test_views_that_begin_between_vectors(emulated_cuda, name, skipped):
    x, scale = torch.randn(2 * 196 + skipped)[skipped:].view(2, 196), torch.rand(2) + 0.1
    assert x.is_contiguous()
    assert x.data_ptr() % 16 != 0
    seen = _cuda_sampling.noise(name, x, scale, 3, *POSITION.values(), torch.float32)
    assert torch.equal(seen, getattr(ops, name)(x.clone(), scale, 3, **POSITION))


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("elements", [4, 60, 124, 128, 132, 388])
def test_samples_whose_numbers_have_other_high_words(emulated_cuda, name, elements):
    x, scale = torch.randn(2, elements), torch.rand(2) + 0.1
    seen = _cuda_sampling.noise(name, x, scale, 7, *ACROSS.values(), torch.bfloat16)
    assert torch.equal(seen, getattr(ops, name)(x, scale, 7, dtype=torch.bfloat16, **ACROSS))


@pytest.mark.parametrize(("elements", "samples"), [(512, 1601), (196, 3001)])
def test_many_samples_make_runs_and_meet_refined_words(emulated_cuda, elements, samples):
    """Enough values that some words are refined (one in 2^13), and runs of three to five samples,
    some of them one short, of whole and of broken tiles."""
    x, scale = torch.zeros(1, elements), torch.ones(1)
    for name in NOISES:
        seen = _cuda_sampling.noise(name, x, scale, samples, 3, 0, 0, torch.float32)
        expected = getattr(ops, name)(x, scale, samples, seed=3)
        assert (expected.abs() > 3.9).any() or name == "uniform_samples"
        assert torch.equal(seen, expected)


def test_scales_too_small_to_be_made_smaller(emulated_cuda):
    """Gaussians are drawn 2^48 times too large, uniform numbers 2^31; scales make up for it."""
    x, scale = torch.zeros(6, 64), torch.tensor([2e-24, 4e-24, 2e-29, 3e-29, 1e-38, 1e-42])
    for name in NOISES:
        seen = _cuda_sampling.noise(name, x, scale, 5, 3, 0, 0, torch.float32)
        assert torch.equal(seen, getattr(ops, name)(x, scale, 5, seed=3))
        assert (seen != 0).any(-1).all()


def test_split_masked_grid_and_tokens_have_the_bits_of_the_cpu(emulated_cuda):
    x = torch.randn(2, 3, 5, 7)
    mask = torch.rand(3 * 5 * 7) < 0.5
    halves = _cuda_sampling.split(x, mask, 0.5, 0.25, 4, *POSITION.values())
    expected = ops.split_gaussian_samples(x, mask.view(3, 5, 7), (0.5, 0.25), 4, **POSITION)
    assert all(torch.equal(a, b) for a, b in zip(halves, expected, strict=True))
    for pixels, per in ((True, "pixel"), (False, "element")):
        for dtype in DTYPES:
            seen = _cuda_sampling.masked(x, 0.3, 2.0, pixels, 4, *POSITION.values(), dtype)
            expected = ops.masked_samples(x, 0.3, 4, fill=2.0, per=per, dtype=dtype, **POSITION)
            assert torch.equal(seen, expected)
    images = torch.randint(0, 256, (2, 67), dtype=torch.uint8)
    for dtype in (torch.int16, *DTYPES):
        seen = _cuda_sampling.grid(images, 0.25, 255, 4, *POSITION.values(), dtype)
        assert torch.equal(seen, ops.grid_samples(images, 0.25, 4, dtype=dtype, **POSITION))


def test_rounding_borders_of_the_grid_are_decided_alike(emulated_cuda):
    """One step a standard deviation and many values: words that do not decide alone occur."""
    images = torch.zeros(1, 4096, dtype=torch.uint8)
    seen = _cuda_sampling.grid(images, 2000.0 / 255, 255, 20, 1, 0, 0, torch.int16)
    assert torch.equal(seen, ops.grid_samples(images, 2000.0 / 255, 20, seed=1))


def test_tokens(emulated_cuda):
    offsets, candidates = torch.tensor([0, 1, 1, 4]), torch.tensor([9, 8, 7, 6])
    tokens = torch.tensor([[0, 1, 2, -1, 3, 2] * 12])
    position = (3, 7, 0, 0)
    seen = _cuda_sampling.substituted(tokens, offsets, candidates, *position)
    assert torch.equal(seen, ops.substituted_tokens(tokens, offsets, candidates, 3, seed=7))
    beyond = torch.tensor([0, 1, -5, 400])  # no lists: the tokens stay, nothing is read
    seen = _cuda_sampling.substituted(tokens, beyond, candidates, *position)
    assert torch.equal(seen[:, :, 1::6], tokens[:, None, 1::6].expand(-1, 3, -1))
    assert torch.equal(seen[:, :, 2::6], tokens[:, None, 2::6].expand(-1, 3, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 41, 10), (300, 1), (2, 600, 3), (1, 5, 1000), (9, 33), (70, 24), (2, 3, 4104)]
)
@pytest.mark.parametrize("skipped", [0, 1], ids=["vectors", "values"])
def test_votes_match_the_cpu(emulated_cuda, dtype, shape, skipped):
    """Also of rows that begin beside the borders of vectors."""
    values = torch.randint(-3, 4, (math.prod(shape) + skipped,)).to(dtype)  # many ties
    logits = values[skipped:].view(shape)
    counts, first_nan = _cuda_sampling.count_votes(logits)
    assert torch.equal(counts, ops.count_votes(logits))
    assert first_nan.item() == 0


def test_histograms_too_large_for_shared_memory(emulated_cuda):
    logits = torch.randn(4, 9000)
    assert torch.equal(_cuda_sampling.count_votes(logits)[0], ops.count_votes(logits))


def test_infinite_logits_vote_and_nan_is_reported_with_its_place(emulated_cuda):
    logits = torch.full((2, 40, 5), float("-inf"))
    logits[1, 3, 2] = float("inf")
    counts, _ = _cuda_sampling.count_votes(logits)
    assert torch.equal(counts, ops.count_votes(logits))
    logits[1, 7, 4] = logits[1, 30, 0] = float("nan")
    counts, first_nan = _cuda_sampling.count_votes(logits)
    assert first_nan.item() == 40 + 7 - 2 * 40
    assert counts.sum(1).tolist() == [40, 38]
    from pyrobust.ops.votes import _votes_cuda

    with pytest.raises(ValueError, match=r"sample \(1, 7\)"):
        _votes_cuda(logits)


def test_nothing_to_do(emulated_cuda):
    empty = torch.zeros(0, 8)
    args = (torch.zeros(0), 4, 0, 0, 0, torch.float32)
    assert _cuda_sampling.noise("gaussian_samples", empty, *args).shape == (0, 4, 8)
    assert _cuda_sampling.count_votes(torch.zeros(2, 0, 5))[0].tolist() == [[0] * 5] * 2


def test_old_devices_and_missing_modules_are_refused(emulated_cuda, monkeypatch):
    emulated_cuda.check_device(0)
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 or above; device 1 .* has 7.0"):
        emulated_cuda.check_device(1)
    monkeypatch.setattr(_cuda_module, "_load", lambda: None)
    with pytest.raises(RuntimeError, match="_cuda is not built here"):
        _cuda_module.cuda_module("gaussian_samples")


# --- transforms -----------------------------------------------------------------------------------


def border_words():
    """Every power of two and its neighbours, words that round up to the next, ties; both signs."""
    near = np.arange(-260, 260)
    magnitudes = np.concatenate([2**k + near for k in range(32)] + [np.arange(2**18 - 2000, 2**18)])
    ties = np.concatenate([(2**k - 2 ** (k - 24) + near) for k in range(25, 32)])
    magnitudes = np.concatenate([magnitudes, ties])
    magnitudes = magnitudes[(magnitudes >= 0) & (magnitudes < 2**31)].astype(np.uint32)
    return np.concatenate([magnitudes, magnitudes | np.uint32(1 << 31)])


def test_transforms_have_the_bits_of_the_cpu_at_every_border():
    shim = pytest.importorskip("pyrobust._cuda_shim")
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    small = random >> np.random.default_rng(1).integers(0, 31, random.size, dtype=np.uint32)
    words = np.concatenate([border_words(), random, small])
    normal, laplace, redrawn, *expected = shim.variates_both_ways(words)
    assert np.array_equal(redrawn, (words & 0x7FFFFFFF) < 2**18)
    assert np.array_equal(normal[~redrawn], expected[0][~redrawn])
    assert np.array_equal(laplace[~redrawn], expected[1][~redrawn])


# --- index arithmetic ---------------------------------------------------------------------------

LARGE = st.integers(1, 2**33)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2**20), st.integers(1, 2**24), LARGE, st.integers(1, 2**22), st.data())
def test_items_of_noise_cover_everything_once(images, samples, elements, wanted, data):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    quads = -(-elements // 64) * 4
    if images * samples * quads >= 2**62:
        samples = 1
    count, *_, runs = shim.noise_place(images, samples, elements, wanted, 0)[:5]
    index = data.draw(st.integers(0, count - 1))
    _, image, first, length, _, quad, block, element = shim.noise_place(
        images, samples, elements, wanted, index
    )
    assert count == images * runs * quads
    assert index == (image * runs + first) * quads + quad
    assert first < runs
    assert length == len(range(first, samples, runs)) <= 16
    assert shim.element_place(element) == (block, 0)
    for word in range(4):
        for i in range(4):
            assert shim.element_place(element + 16 * word + i) == (block + i, word)


@given(st.integers(0, 2**40 - 1), st.integers(1, 2**36))
def test_samples_of_a_launch_share_their_high_word(first, samples):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    count = shim.samples_together(first, samples)
    assert 0 < count <= samples
    assert first >> 32 == (first + count - 1) >> 32
    assert count == samples or (first + count) >> 32 != first >> 32


WORD = st.integers(0, 2**32 - 1)


@given(WORD, WORD, WORD, WORD, st.integers(0, 2**64 - 1))
def test_philox_of_block_and_sample_parts_is_philox(block, sample, image, last, seed):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    whole, parts = shim.philox_both_ways(block, sample, image, last, seed)
    assert whole == parts


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2**20), st.integers(1, 64), LARGE, st.integers(0, 2**61), st.integers(0, 3))
def test_rows_split_into_image_sample_channel_and_block(samples, channels, elements, index, word):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    blocks = -(-elements // 64) * 16
    image, sample, channel, block, row, element = shim.row_place(
        index, samples, channels, blocks, word
    )
    assert row == (image * samples + sample) * channels + channel
    assert index == row * blocks + block
    assert shim.element_place(element) == (block, word)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2**20), st.integers(1, 2**30), st.integers(1, 4096), st.data())
def test_stretches_of_votes_tile_every_histogram(histograms, samples, wanted, data):
    shim = pytest.importorskip("pyrobust._cuda_shim")
    rows = histograms * samples
    stretches = shim.vote_place(rows, samples, 256, wanted, 0)[0]
    index = data.draw(st.integers(0, stretches - 1))
    _, histogram, begin, end = shim.vote_place(rows, samples, 256, wanted, index)
    assert begin < end <= (histogram + 1) * samples
    assert begin // samples == histogram
    if index + 1 < stretches:
        assert shim.vote_place(rows, samples, 256, wanted, index + 1)[2] == end
    else:
        assert end == rows
