"""Noise that depends on its position only."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.library import opcheck

from pyrobust import _native
from pyrobust.ops import count_votes, gaussian_samples, laplace_samples, uniform_samples

NOISES = [gaussian_samples, uniform_samples, laplace_samples]

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


def words_numpy(elements, sample, image, seed, purpose):
    """The random words as csrc/sampling/sampling.h places them."""
    e = np.arange(elements, dtype=np.uint64)
    block = e // 64 * 16 + e % 16
    high = purpose << 24 | (sample >> 32) << 16 | image >> 32
    fixed = [sample % 2**32, image % 2**32, high]
    counter = np.stack([block, *[np.full_like(block, value) for value in fixed]], axis=1)
    return philox_numpy(counter, seed)[np.arange(elements), (e % 64 // 16).astype(int)]


def tail_quantile(bits, quantile):
    """Sign, and the quantile of the tail probability in the other bits; unrefined draws only."""
    m = (bits & np.uint64(0x7FFFFFFF)).astype(np.float64)
    z = quantile((m + 0.5) / 2**32)
    return np.where(bits >> np.uint64(31), -z, z), m >= 2**18


def uniform_quantile(bits):
    return (bits.astype(np.uint32).view(np.int32) + 0.5) / 2**31, np.ones(len(bits), bool)


DEFINITIONS = [
    (gaussian_samples, 0, 4e-6, lambda bits: tail_quantile(bits, lambda p: -special.ndtri(p))),
    (laplace_samples, 5, 3e-6, lambda bits: tail_quantile(bits, lambda p: -np.log(2 * p))),
    (uniform_samples, 4, 3.1e-8, uniform_quantile),
]


@pytest.mark.parametrize(
    ("sample", "image", "seed"), [(0, 0, 0), (2**35 + 7, 2**41 + 3, 2**62 + 1)]
)
@pytest.mark.parametrize(("noise", "purpose", "bound", "quantile"), DEFINITIONS)
def test_noise_follows_its_definition(isa, noise, purpose, bound, quantile, sample, image, seed):
    x = torch.zeros(1, 1000)
    got = noise(x, 1.0, 1, seed=seed, first_sample=sample, first_index=image)
    expected, plain = quantile(words_numpy(1000, sample, image, seed, purpose))
    assert plain.mean() > 0.99
    np.testing.assert_allclose(got[0, 0].numpy()[plain], expected[plain], atol=bound, rtol=0)


@pytest.mark.parametrize(("noise", "refine"), [(gaussian_samples, 1), (laplace_samples, 6)])
def test_deep_tails_take_the_words_of_their_own_purpose(isa, noise, refine):
    purpose = {1: 0, 6: 5}[refine]
    exact = {1: lambda p: -special.ndtri(p), 6: lambda p: -np.log(2 * p)}[refine]
    z = noise(torch.zeros(1, 2**16), 1.0, 1, seed=12)[0, 0].double().numpy()
    first, extra = (words_numpy(2**16, 0, 0, 12, p) for p in (purpose, refine))
    m = first & np.uint64(0x7FFFFFFF)
    deep = m < 2**18
    assert deep.sum() >= 3
    tail = ((m << np.uint64(32)) | extra | np.uint64(1))[deep].astype(np.float64) / 2**64
    np.testing.assert_allclose(np.abs(z[deep]), exact(tail), atol=5e-6, rtol=0)


@pytest.mark.parametrize("noise", NOISES)
def test_instruction_sets_and_dtypes_agree_to_the_bit(isa, noise):
    x = torch.randn(3, 5, 37)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = math.nan, math.inf, 1e-40
    sigma = torch.tensor([0.1, 1.0, 7.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = noise(x, sigma, 150, seed=11, dtype=dtype)
        _native.set_isa("portable")
        expected = noise(x, sigma, 150, seed=11, dtype=dtype)
        rounded = noise(x, sigma, 150, seed=11).to(dtype)
        _native.set_isa(isa)
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(got.nan_to_num(7.0), rounded.nan_to_num(7.0))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("elements", [1, 7, 8, 15, 63, 64, 65, 784])
def test_every_split_gives_the_same_bits(isa, noise, elements):
    x = torch.rand(5, elements)
    whole = noise(x, 0.5, 64, seed=3, first_sample=9, first_index=2)
    for step in (1, 7, 64):
        for begin in range(0, 64, step):
            size = min(step, 64 - begin)
            part = noise(x, 0.5, size, seed=3, first_sample=9 + begin, first_index=2)
            assert torch.equal(part, whole[:, begin : begin + size])
    for b in range(5):
        alone = noise(x[b : b + 1], 0.5, 64, seed=3, first_sample=9, first_index=2 + b)
        assert torch.equal(alone[0], whole[b])


@pytest.mark.parametrize("noise", NOISES)
def test_threads_do_not_change_a_bit(isa, noise):
    x = torch.rand(2, 3, 32, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = noise(x, 0.5, 100, seed=5)
        votes_one = count_votes(one.flatten(2))
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(noise(x, 0.5, 100, seed=5), one)
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
        for name in ("gaussian_samples", "uniform_samples", "laplace_samples"):
            out.fill_(123.0)
            getattr(_native, name)(torch.zeros(1, 70), torch.ones(1), out, 0, 0, 0, 1)
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


@pytest.mark.parametrize(
    ("noise", "law", "even_moments"),
    [
        (uniform_samples, stats.uniform(-1, 2), [1 / 3, 1 / 5, 1 / 9]),
        (laplace_samples, stats.laplace(), [2, 24, 40320]),
    ],
)
def test_other_laws_have_their_shape(noise, law, even_moments):
    z = noise(torch.zeros(8, 3072), 1.0, 60, seed=1).flatten().double().numpy()
    second, fourth, eighth = even_moments
    assert abs(z.mean()) < 5 * (second / len(z)) ** 0.5
    assert abs((z**2).mean() - second) < 5 * ((fourth - second**2) / len(z)) ** 0.5
    assert abs((z**4).mean() - fourth) < 5 * ((eighth - fourth**2) / len(z)) ** 0.5
    assert stats.kstest(z[: 2**19], law.cdf).pvalue > 1e-4
    edges = law.isf(np.linspace(1, 0, 201))
    assert stats.chisquare(np.histogram(z, edges)[0]).pvalue > 1e-4


@pytest.mark.parametrize("noise", NOISES)
def test_neighbours_are_uncorrelated(noise):
    variance = {gaussian_samples: 1, uniform_samples: 1 / 3, laplace_samples: 2}[noise]
    z = noise(torch.zeros(64, 1024), variance**-0.5, 64, seed=2)
    limit = 5 / (63 * 64 * 1024) ** 0.5
    assert abs((z[1:] * z[:-1]).mean().item()) < limit  # images
    assert abs((z[:, 1:] * z[:, :-1]).mean().item()) < limit  # samples
    for gap in (1, 2, 15, 16, 17, 48, 64):  # elements: lanes, words, tiles
        assert abs((z[..., gap:] * z[..., :-gap]).mean().item()) < 1.1 * limit
    for other in NOISES:  # another seed, and another law under the same seed
        beside = other(torch.zeros(64, 1024), 1.0, 64, seed=3 if other is noise else 2)
        assert abs((z * beside).mean().item()) < 1.5 * limit


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


@pytest.mark.parametrize("noise", NOISES)
def test_gradients_reach_x_and_sigma(noise):
    x = torch.rand(2, 5, requires_grad=True)
    sigma = torch.tensor([0.5, 2.0], requires_grad=True)
    weight = torch.randn(2, 7, 5)
    (noise(x, sigma, 7, seed=8) * weight).sum().backward()
    z = noise(torch.zeros(2, 5), 1.0, 7, seed=8)
    torch.testing.assert_close(x.grad, weight.sum(1))
    torch.testing.assert_close(sigma.grad, (weight * z).sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gaussian_samples", "uniform_samples", "laplace_samples"])
def test_operators_pass_opcheck(name, dtype):
    x = torch.rand(2, 5, dtype=dtype, requires_grad=True)
    sigma = torch.ones(2, requires_grad=dtype == torch.float32)
    opcheck(getattr(torch.ops.pyrobust, name).default, (x, sigma, 3, 1, 2, 3, dtype))


def test_compiled_graph_holds_both_operators():
    def smoothed_votes(x):
        return count_votes(gaussian_samples(x, 0.5, 9, seed=1) @ torch.ones(4, 3))

    x = torch.rand(2, 4)
    compiled = torch.compile(smoothed_votes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), smoothed_votes(x))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_bad_scales_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        gaussian_samples(torch.zeros(1, 2), sigma, 1, seed=0)
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        gaussian_samples(torch.zeros(1, 2), torch.tensor([sigma]), 1, seed=0)
    with pytest.raises(ValueError, match="uniform_samples: half_width must be finite and positive"):
        uniform_samples(torch.zeros(1, 2), sigma, 1, seed=0)
    with pytest.raises(ValueError, match="laplace_samples: scale must be finite and positive"):
        laplace_samples(torch.zeros(1, 2), torch.tensor([sigma]), 1, seed=0)


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


class Tally:
    """Bins, moments and neighbour products of many draws, a chunk at a time."""

    def __init__(self, edges):
        self.edges, self.seen, self.total = edges, np.zeros(len(edges) - 1), 0
        self.moments, self.products = np.zeros(4), {}

    def add(self, z):
        """``z``: (images, samples, elements), any images and samples in order."""
        flat = z.flatten()
        bins = torch.bucketize(flat, self.edges[1:-1].float())
        self.seen += torch.bincount(bins, minlength=len(self.seen)).numpy()
        self.total += flat.numel()
        power = torch.ones((), dtype=torch.float64)
        for k in range(4):
            power = power * flat
            self.moments[k] += power.sum().item()
        pairs = {"image": (z[1:], z[:-1]), "sample": (z[:, 1:], z[:, :-1])}
        for gap in (1, 7, 16, 17, 64):
            pairs[f"element {gap}"] = (z[..., gap:], z[..., :-gap])
        for name, (a, b) in pairs.items():
            for kind, f in (("value", lambda v: v), ("square", lambda v: v * v - 1)):
                sum_, count = self.products.get((name, kind), (0.0, 0))
                product = (f(a) * f(b)).sum(dtype=torch.float64).item()
                self.products[name, kind] = (sum_ + product, count + a.numel())


@pytest.mark.slow
def test_goodness_of_fit_on_a_billion_draws():
    """Kolmogorov-Smirnov on a fine grid, chi-square with tail bins, moments, correlations."""
    edges = torch.tensor([-np.inf, *np.arange(-6.25, 6.26, 0.0625), np.inf], dtype=torch.float64)
    tally, x = Tally(edges), torch.zeros(8, 15625)
    for chunk in range(80):
        tally.add(gaussian_samples(x, 1.0, 100, seed=9, first_sample=100 * chunk))
    assert tally.total == tally.seen.sum() == 10**9
    # Tail probabilities from the nearer side: a difference of values near 1 would lose them.
    e = edges.numpy()
    expected = 1e9 * np.where(
        e[1:] <= 0, special.ndtr(e[1:]) - special.ndtr(e[:-1]),
        special.ndtr(-e[:-1]) - special.ndtr(-e[1:]),
    )  # fmt: skip
    assert expected[0] < 0.5 < expected[8]  # the last bins of each side hold next to nothing
    merged = expected >= 5
    sides = [~merged & (e[1:] <= 0), ~merged & (e[1:] > 0)]
    seen = [*tally.seen[merged], *(tally.seen[side].sum() for side in sides)]
    wanted = [*expected[merged], *(expected[side].sum() for side in sides)]
    statistic = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True))
    assert min(wanted) > 5
    chi = stats.chi2.sf(statistic, len(seen) - 1)
    beyond = tally.seen[(e[:-1] >= 5.7681)].sum() + tally.seen[(e[1:] <= -5.7681)].sum()
    distance = np.abs(np.cumsum(tally.seen - expected)).max() / tally.total
    ks = stats.kstwobign.sf(distance * tally.total**0.5)
    z_moments = (tally.moments / 1e9 - [0, 1, 0, 3]) / (np.array([1, 2, 15, 96]) / 1e9) ** 0.5
    deviation = {"value": 1.0, "square": 2.0}  # of one product
    z_products = {
        key: total / deviation[key[1]] / count**0.5
        for key, (total, count) in tally.products.items()
    }
    print(f"chi-square p {chi:.3f}, KS p {ks:.3f}, moments {z_moments}, {z_products}, {beyond}")
    assert chi > 1e-4
    assert ks > 1e-4
    assert np.abs(z_moments).max() < 5
    assert max(abs(value) for value in z_products.values()) < 5
    assert beyond > 0  # where a 24-bit generator ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "law"), [(uniform_samples, stats.uniform(-1, 2)), (laplace_samples, stats.laplace())]
)
def test_goodness_of_fit_of_other_laws_on_many_draws(noise, law):
    edges = torch.from_numpy(law.ppf(np.linspace(0, 1, 401)))
    seen, x = np.zeros(400), torch.zeros(8, 15625)
    for chunk in range(16):
        z = noise(x, 1.0, 100, seed=9, first_sample=100 * chunk).flatten()
        bins = torch.bucketize(z, edges[1:-1].float())
        seen += torch.bincount(bins, minlength=400).numpy()
    assert stats.chisquare(seen).pvalue > 1e-4
    distance = np.abs(np.cumsum(seen - seen.sum() / 400)).max() / seen.sum()
    assert stats.kstwobign.sf(distance * seen.sum() ** 0.5) > 1e-4
