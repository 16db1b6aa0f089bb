"""Sampling on a GPU: the bits of the CPU, within graphs, compiled, and beyond 2^31 elements."""

import pytest
import torch

from pyrobust import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOISES = [ops.gaussian_samples, ops.uniform_samples, ops.laplace_samples]
POSITION = {"seed": 7, "first_sample": 2**40 - 4000, "first_index": 2**48 - 9}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 67), (1, 1)])
def test_noise_has_the_bits_of_the_cpu(noise, dtype, shape):
    x, scale = torch.randn(shape), torch.rand(shape[0]) + 0.1
    seen = noise(x.cuda(), scale.cuda(), 300, dtype=dtype, **POSITION)
    assert torch.equal(seen.cpu(), noise(x, scale, 300, dtype=dtype, **POSITION))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("elements", [4, 124, 784, 3072])
def test_samples_whose_numbers_have_other_high_words(noise, elements):
    """Two launches, tiles without a neighbour, and enough words that some are drawn again."""
    position = {"seed": 5, "first_sample": 2**32 - 300, "first_index": 2**32 - 1}
    x = torch.randn(2, elements)
    for dtype in DTYPES:
        seen = noise(x.cuda(), 0.5, 1000, dtype=dtype, **position)
        assert torch.equal(seen.cpu(), noise(x, 0.5, 1000, dtype=dtype, **position))


def test_the_other_distributions_have_the_bits_of_the_cpu():
    x = torch.randn(2, 3, 17, 19)
    mask = torch.rand(3, 17, 19) < 0.5
    seen = ops.split_gaussian_samples(x.cuda(), mask.cuda(), (0.5, 0.25), 50, **POSITION)
    expected = ops.split_gaussian_samples(x, mask, (0.5, 0.25), 50, **POSITION)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(seen, expected, strict=True))
    for per in ("pixel", "element"):
        options = {"fill": 2.0, "per": per, **POSITION}
        seen = ops.masked_samples(x.cuda(), 0.3, 50, **options)
        assert torch.equal(seen.cpu(), ops.masked_samples(x, 0.3, 50, **options))
    images = torch.randint(0, 256, (2, 4096), dtype=torch.uint8)
    for sigma in (0.25, 2000.0 / 255):
        for dtype in (torch.int16, torch.bfloat16):
            seen = ops.grid_samples(images.cuda(), sigma, 50, dtype=dtype, **POSITION)
            assert torch.equal(
                seen.cpu(), ops.grid_samples(images, sigma, 50, dtype=dtype, **POSITION)
            )
    offsets, candidates = torch.tensor([0, 1, 1, 4]), torch.tensor([9, 8, 7, 6])
    tokens = torch.randint(-1, 4, (5, 77))
    lists = (offsets.cuda(), candidates.cuda())
    seen = ops.substituted_tokens(tokens.cuda(), *lists, 50, **POSITION)
    expected = ops.substituted_tokens(tokens, offsets, candidates, 50, **POSITION)
    assert torch.equal(seen.cpu(), expected)


@pytest.mark.parametrize("shape", [(3, 1000, 10), (70_000, 3), (2, 50, 1000), (4, 9000)])
def test_votes_match_the_cpu(shape):
    for dtype in DTYPES:
        logits = torch.randint(-3, 4, shape).to(dtype)
        assert torch.equal(ops.count_votes(logits.cuda()).cpu(), ops.count_votes(logits))


def test_nan_is_reported_with_its_sample():
    logits = torch.randn(3, 1000, 10, device="cuda")
    logits[1, 700, 3] = float("nan")
    with pytest.raises(ValueError, match=r"sample \(1, 700\)"):
        ops.count_votes(logits)


def test_calls_are_captured_in_graphs_and_follow_the_stream():
    x, sigma = torch.randn(2, 256, device="cuda"), torch.full((2,), 0.5, device="cuda")
    logits = torch.randn(2, 40, 10, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy = ops.gaussian_samples(x, sigma, 40, seed=1)
        counts = ops.count_votes(logits)
    x.copy_(torch.randn(2, 256))
    logits.copy_(torch.randn(2, 40, 10))
    graph.replay()
    assert torch.equal(noisy.cpu(), ops.gaussian_samples(x.cpu(), sigma.cpu(), 40, seed=1))
    assert torch.equal(counts.cpu(), ops.count_votes(logits.cpu()))


def test_compiled_calls_agree():
    @torch.compile(fullgraph=True)
    def votes(x):
        return ops.count_votes(ops.gaussian_samples(x, 0.5, 100, seed=3) * 2)

    x = torch.randn(2, 10)
    assert torch.equal(
        votes(x.cuda()).cpu(), ops.count_votes(ops.gaussian_samples(x, 0.5, 100, seed=3))
    )


def test_more_than_2_31_elements():
    """4.3e9 values: the ends of the output, which only 64-bit indices reach."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of free GPU memory")
    elements, samples = 1 << 16, (1 << 16) + 3
    x = torch.zeros(1, elements)
    for e in (elements, elements + 1):
        x = torch.zeros(1, e)
        big = ops.gaussian_samples(x.cuda(), 1.0, samples, seed=0, dtype=torch.bfloat16)
        for first in (0, samples // 2, samples - 2):
            part = ops.gaussian_samples(x, 1.0, 2, seed=0, first_sample=first, dtype=torch.bfloat16)
            assert torch.equal(big[:, first : first + 2].cpu(), part)
        del big
        torch.cuda.empty_cache()
