"""Noise that depends on its position only, and votes."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.library import opcheck

from pyrobust import _native
from pyrobust.ops import count_votes, gaussian_samples

KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 10 rounds: counter, key, words
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert _native.philox_words(counter, key) == words


def philox_numpy(counter, key):
    """An independent Philox4x32-10 on uint64 arrays of shape (N, 4)."""
    low, mask = counter.astype(np.uint64), np.uint64(0xFFFFFFFF)
    for turn in range(10):
        k0 = np.uint64((key + turn * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64(((key >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = low[:, 0] * np.uint64(0xD2511F53), low[:, 2] * np.uint64(0xCD9E8D57)
        columns = [(b >> 32) ^ low[:, 1] ^ k0, b & mask, (a >> 32) ^ low[:, 3] ^ k1, a & mask]
        low = np.stack(columns, axis=1)
    return low


def normal_numpy(elements, sample, image, seed):
    """The noise as csrc/sampling/sampling.h defines it, in float64; unrefined draws only."""
    e = np.arange(elements, dtype=np.uint64)
    block = e // 64 * 16 + e % 16
    fixed = [sample % 2**32, image % 2**32, (sample >> 32) << 16 | image >> 32]
    counter = np.stack([block, *[np.full_like(block, value) for value in fixed]], axis=1)
    bits = philox_numpy(counter, seed)[np.arange(elements), (e % 64 // 16).astype(int)]
    m = (bits & np.uint64(0x7FFFFFFF)).astype(np.float64)
    z = -special.ndtri((m + 0.5) / 2**32)
    return np.where(bits >> np.uint64(31), -z, z), m >= 2**18


@pytest.mark.parametrize(
    ("sample", "image", "seed"), [(0, 0, 0), (2**35 + 7, 2**41 + 3, 2**62 + 1)]
)
def test_noise_follows_its_definition(isa, sample, image, seed):
    x = torch.zeros(1, 1000)
    got = gaussian_samples(x, 1.0, 1, seed=seed, first_sample=sample, first_index=image)
    expected, plain = normal_numpy(1000, sample, image, seed)
    assert plain.mean() > 0.99
    np.testing.assert_allclose(got[0, 0].numpy()[plain], expected[plain], atol=4e-6, rtol=0)


def test_instruction_sets_and_dtypes_agree_to_the_bit(isa):
    x = torch.randn(3, 5, 37)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = math.nan, math.inf, 1e-40
    sigma = torch.tensor([0.1, 1.0, 7.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = gaussian_samples(x, sigma, 400, seed=11, dtype=dtype)
        _native.set_isa("portable")
        expected = gaussian_samples(x, sigma, 400, seed=11, dtype=dtype)
        rounded = gaussian_samples(x, sigma, 400, seed=11).to(dtype)
        _native.set_isa(isa)
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(got.nan_to_num(7.0), rounded.nan_to_num(7.0))


@pytest.mark.parametrize("elements", [1, 7, 8, 15, 63, 64, 65, 784])
def test_every_split_gives_the_same_bits(isa, elements):
    x = torch.rand(5, elements)
    whole = gaussian_samples(x, 0.5, 64, seed=3, first_sample=9, first_index=2)
    for step in (1, 7, 64):
        for begin in range(0, 64, step):
            size = min(step, 64 - begin)
            part = gaussian_samples(x, 0.5, size, seed=3, first_sample=9 + begin, first_index=2)
            assert torch.equal(part, whole[:, begin : begin + size])
    for b in range(5):
        alone = gaussian_samples(x[b : b + 1], 0.5, 64, seed=3, first_sample=9, first_index=2 + b)
        assert torch.equal(alone[0], whole[b])


def test_threads_do_not_change_a_bit(isa):
    x = torch.rand(2, 3, 32, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gaussian_samples(x, 0.5, 100, seed=5)
        votes_one = count_votes(one.flatten(2))
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(gaussian_samples(x, 0.5, 100, seed=5), one)
            assert torch.equal(count_votes(one.flatten(2)), votes_one)
    finally:
        torch.set_num_threads(before)


def test_seed_image_sample_and_element_all_matter():
    x = torch.zeros(2, 2)
    draws = torch.stack([gaussian_samples(x, 1.0, 2, seed=seed) for seed in (0, 1, 2**32)])
    assert draws.unique().numel() == draws.numel()


def test_kernel_never_writes_past_its_output(isa):
    for dtype in (torch.float32, torch.bfloat16):
        guarded = torch.full((70 + 64,), 123.0, dtype=dtype)
        out = guarded[:70].view(1, 1, 70)
        _native.gaussian_samples(torch.zeros(1, 70), torch.ones(1), out, 0, 0, 0, 1)
        assert (guarded[70:] == 123).all()
        assert (guarded[:70] != 123).all()


def test_moments_shape_and_tails_are_normal():
    z = gaussian_samples(torch.zeros(8, 3072), 1.0, 160, seed=1).flatten().double()
    n = z.numel()
    assert abs(z.mean().item()) < 5 / n**0.5
    assert abs((z**2).mean().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean().item() - 3) < 5 * (96 / n) ** 0.5
    assert stats.kstest(z[: 2**20].numpy(), "norm").pvalue > 1e-4
    edges = np.array([-np.inf, *np.arange(-4.5, 4.6, 0.125), np.inf])
    seen = np.diff([0, *[(z < edge).sum().item() for edge in edges[1:-1]], n])
    assert stats.chisquare(seen, n * np.diff(special.ndtr(edges))).pvalue > 1e-4


def test_neighbours_are_uncorrelated():
    z = gaussian_samples(torch.zeros(64, 1024), 1.0, 64, seed=2)
    limit = 5 / (63 * 64 * 1024) ** 0.5
    assert abs((z[1:] * z[:-1]).mean().item()) < limit  # images
    assert abs((z[:, 1:] * z[:, :-1]).mean().item()) < limit  # samples
    for gap in (1, 2, 15, 16, 17, 48, 64):  # elements: lanes, words, tiles
        assert abs((z[..., gap:] * z[..., :-gap]).mean().item()) < 1.1 * limit
    other = gaussian_samples(torch.zeros(64, 1024), 1.0, 64, seed=3)
    assert abs((z * other).mean().item()) < limit


def test_output_is_x_plus_sigma_z_in_float32():
    x = torch.randn(2, 100)
    z = gaussian_samples(torch.zeros(2, 100), 1.0, 3, seed=4)
    assert torch.equal(gaussian_samples(x, 0.3, 3, seed=4), x[:, None] + 0.3 * z)
    half = gaussian_samples(x.bfloat16(), 0.3, 3, seed=4)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, (x.bfloat16().float()[:, None] + 0.3 * z).bfloat16())


def test_empty_and_strided_inputs():
    assert gaussian_samples(torch.zeros(0, 3), 1.0, 4, seed=0).shape == (0, 4, 3)
    assert gaussian_samples(torch.zeros(2, 3), 1.0, 0, seed=0).shape == (2, 0, 3)
    assert gaussian_samples(torch.zeros(2, 0), 1.0, 5, seed=0).shape == (2, 5, 0)
    x = torch.rand(6, 4, 10)
    strided = x.transpose(0, 2)[::2]
    assert torch.equal(
        gaussian_samples(strided, 1.0, 3, seed=0),
        gaussian_samples(strided.contiguous(), 1.0, 3, seed=0),
    )


def test_gradients_reach_x_and_sigma():
    x = torch.rand(2, 5, requires_grad=True)
    sigma = torch.tensor([0.5, 2.0], requires_grad=True)
    weight = torch.randn(2, 7, 5)
    (gaussian_samples(x, sigma, 7, seed=8) * weight).sum().backward()
    z = gaussian_samples(torch.zeros(2, 5), 1.0, 7, seed=8)
    torch.testing.assert_close(x.grad, weight.sum(1))
    torch.testing.assert_close(sigma.grad, (weight * z).sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_pass_opcheck(dtype):
    x = torch.rand(2, 5, dtype=dtype, requires_grad=True)
    sigma = torch.ones(2, requires_grad=dtype == torch.float32)
    opcheck(torch.ops.pyrobust.gaussian_samples.default, (x, sigma, 3, 1, 2, 3, dtype))
    opcheck(torch.ops.pyrobust.count_votes.default, (torch.rand(4, 6, 3, dtype=dtype),))


def test_compiled_graph_holds_both_operators():
    def smoothed_votes(x):
        return count_votes(gaussian_samples(x, 0.5, 9, seed=1) @ torch.ones(4, 3))

    x = torch.rand(2, 4)
    compiled = torch.compile(smoothed_votes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), smoothed_votes(x))


def test_votes_are_the_histogram_of_the_arg_max(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(3, 50, 11).to(dtype)
        best = torch.from_numpy(logits.float().numpy().argmax(-1))
        expected = torch.nn.functional.one_hot(best, 11).sum(1)
        assert torch.equal(count_votes(logits), expected)


def test_ties_go_to_the_lowest_class():
    ties = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [-math.inf] * 3, [0.0, -0.0, -1.0]])
    assert count_votes(ties).tolist() == [3, 1, 0]
    assert count_votes(torch.zeros(2, 0, 4)).tolist() == [[0] * 4] * 2
    assert count_votes(torch.zeros(5, 1)).tolist() == [5]


def test_nan_logits_are_named():
    logits = torch.randn(4, 6, 3)
    logits[2, 5, 1] = math.nan
    logits[3, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"logits must not be NaN; sample \(2, 5\) is"):
        count_votes(logits)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_bad_sigma_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        gaussian_samples(torch.zeros(1, 2), sigma, 1, seed=0)
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        gaussian_samples(torch.zeros(1, 2), torch.tensor([sigma]), 1, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"x": torch.zeros(1, 2, dtype=torch.uint8)},
            TypeError,
            "floating-point tensor; got torch.u",
        ),
        ({"x": torch.zeros(1, 2, dtype=torch.float64)}, TypeError, "dtype float32, bfloat16 or"),
        ({"x": torch.tensor(1.0)}, ValueError, "batch axis"),
        ({"n": -1}, ValueError, "n must be at least 0; got -1"),
        ({"n": 2.0}, TypeError, "n must be an integer; got float"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**63}, ValueError, r"seed must not exceed 2\*\*63"),
        ({"first_sample": 2**40}, ValueError, r"first_sample \+ n must not exceed 2\*\*40"),
        ({"first_index": 2**48}, ValueError, r"first_index \+ B must not exceed 2\*\*48"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma must be a number or have shape \(1,\)"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    arguments = {"x": torch.zeros(1, 2), "sigma": 1.0, "n": 1, "seed": 0, **options}
    with pytest.raises(error, match=message):
        gaussian_samples(
            arguments.pop("x"), arguments.pop("sigma"), arguments.pop("n"), **arguments
        )


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="logits must have 4 classes on the last axis"):
        count_votes(torch.zeros(2, 3), num_classes=4)
    with pytest.raises(ValueError, match="at least one class"):
        count_votes(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"shape \(..., n, K\)"):
        count_votes(torch.zeros(3))
    with pytest.raises(TypeError, match="floating-point"):
        count_votes(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.slow
def test_goodness_of_fit_on_a_billion_draws():
    edges = np.array([-np.inf, *np.arange(-6, 6.1, 0.0625), np.inf])
    seen, total, sums = np.zeros(len(edges) - 1), 10**9, np.zeros(4)
    x = torch.zeros(16, 15625)
    for chunk in range(40):
        z = gaussian_samples(x, 1.0, 100, seed=9, first_sample=100 * chunk).flatten().numpy()
        seen += np.histogram(z, edges)[0]
        sums += [np.mean(z.astype(np.float64) ** k) for k in (1, 2, 3, 4)]
    assert seen.sum() == total
    expected = total * np.diff(special.ndtr(edges))
    merged = expected >= 5  # beyond: one bin a side
    tails = [
        [a[~merged & side].sum() for side in (edges[:-1] < 0, edges[:-1] >= 0)]
        for a in (seen, expected)
    ]
    statistic = ((seen - expected)[merged] ** 2 / expected[merged]).sum()
    statistic += sum((s - e) ** 2 / max(e, 1) for s, e in zip(*tails, strict=True))
    assert stats.chi2.sf(statistic, len(seen) - 1) > 1e-4
    distance = np.abs(np.cumsum(seen - expected)).max() / total
    assert stats.kstwobign.sf(distance * total**0.5) > 1e-4
    z_scores = (sums / 40 - [0, 1, 0, 3]) / (np.array([1, 2, 15, 96]) / total) ** 0.5
    assert np.abs(z_scores).max() < 5
