"""Interval products around the library's: kernels on fibres, torch's product of floats between."""

import gc
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from pyrobust import Interval, ops
from pyrobust.ops import _cuda_interval
from pyrobust.ops import _cuda_interval_library as library
from pyrobust.quantize import round_to_nearest

sys.path.insert(0, str(Path(__file__).parent))
from interval_images import boxes, exact_ends

ROUNDINGS = ["real", "deployed", "nearest"]


def truncating(a, b, block=4):
    """``a @ b`` as the coarsest tensor core: blocks aligned to the largest exponent and cut."""
    a, b = a.double(), b.double()
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float64)
    for first in range(0, a.shape[-1], block):
        part = slice(first, first + block)
        terms = a[..., part].unsqueeze(-1) * b[..., part, :].unsqueeze(-3)
        terms = torch.cat((total.unsqueeze(-2), terms), dim=-2)
        _, exponent = torch.frexp(terms.abs().amax(-2, keepdim=True))
        unit = 2.0 ** (exponent - 24).double()
        total = ((terms / unit).trunc() * unit).sum(-2)
        _, exponent = torch.frexp(total)
        unit = 2.0 ** (exponent - 24).double()
        total = (total / unit).trunc() * unit
    return total.float()


def split_sums(a, b):
    """Both halves of the terms by themselves, the second first, as a split product may be made."""
    half = a.shape[-1] // 2
    return truncating(a[..., half:], b[..., half:, :]) + truncating(a[..., :half], b[..., :half, :])


def never_fused(monkeypatch):
    for name in ("MOST_FUSED_INPUTS", "MOST_FUSED_PACKED_INPUTS", "LEAST_PRODUCTS"):
        monkeypatch.setattr(library, name, 0)
    monkeypatch.setattr(library, "LEAST_INPUTS", 1)


@pytest.fixture(params=[None, truncating, split_sums], ids=["floats", "truncating", "split"])
def product(request, emulated_cuda, monkeypatch):
    """Every product by the library's path, in chunks of 64 terms."""
    never_fused(monkeypatch)
    monkeypatch.setattr(library, "CHUNK_TERMS", 64)
    if request.param is not None:
        monkeypatch.setattr(library, "_product", request.param)
    return request.param


@pytest.fixture
def always(emulated_cuda, monkeypatch):
    """The library's path whatever the sizes."""
    never_fused(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """How often the library multiplied."""
    made = []
    original = library._product
    monkeypatch.setattr(library, "_product", lambda a, b: made.append(a.shape) or original(a, b))
    return made


def check_sound(ends, exact, magnitude, reach, slack):
    """Contains the image; adds ``slack`` of sum |w||x| and 2^-6 of the width at most."""
    noise = 1e-13 * magnitude
    assert (ends[0] <= exact[0] + noise).all()
    assert (ends[1] >= exact[1] - noise).all()
    most = slack * magnitude + 2**-6 * reach + 1e-30
    assert (exact[0] - ends[0] <= most).all()
    assert (ends[1] - exact[1] <= most).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("batch", "rows", "terms"), [(3, 5, 1), (5, 16, 64), (4, 7, 131), (6, 12, 200)]
)
def test_dense_weights(product, batch, rows, terms, rounding):
    lower, upper = boxes(batch, terms)
    weight, bias = torch.randn(rows, terms), torch.randn(rows)
    for matrix in (weight, weight.bfloat16()):
        ends = _cuda_interval.linear(lower, upper, matrix, bias, rounding)
        exact = exact_ends(lower, upper, matrix, bias)
        largest = torch.maximum(lower.abs(), upper.abs()).double()
        magnitude = largest @ matrix.double().abs().T
        reach = exact[1] - exact[0]
        if rounding == "nearest":
            for end, wanted in zip(ends, exact, strict=True):
                assert ((end - wanted).abs() <= 1e-4 * (magnitude + 1) + 2**-6 * reach).all()
        else:
            check_sound(ends, exact, magnitude, reach, slack=1.5e-4)


def test_adversarial_points_in_rationals(product):
    """One huge term and many just below what a truncating sum keeps, signs all one way."""
    terms = 300
    weight = torch.ones(1, terms)
    for shift in (13, 20, 23, 24):
        point = torch.full((1, terms), 2.0 ** (10 - shift) * (1 - 2.0**-7))
        point[0, 150] = 2.0**10
        for sign in (1.0, -1.0):
            x = point * sign
            low, high = _cuda_interval.linear(x, x, weight, None, "real")
            exact = sum(Fraction(float(v)) for v in x[0])
            assert Fraction(low.item()) <= exact <= Fraction(high.item())


def test_the_bound_is_needed():
    """What the truncating product loses is more than float32 sums could."""
    terms = 1024
    x = torch.full((1, terms), 2.0**-24 * (1 - 2.0**-7))
    x[0, 0] = 1.0
    lost = x.double().sum() - truncating(x, torch.ones(terms, 1)).double()
    assert 2**-24 * terms * 0.9 < lost.item() < 2**-22 * terms


def test_sums_that_nearly_cancel(product):
    lower, upper = boxes(4, 256, width=1e-6)
    weight = torch.randn(8, 256)
    weight[:, 128:] = -weight[:, :128]
    lower[:, 128:], upper[:, 128:] = lower[:, :128], upper[:, :128]
    ends = _cuda_interval.linear(lower, upper, weight, None, "deployed")
    exact = exact_ends(lower, upper, weight)
    assert (ends[0] <= exact[0]).all()
    assert (exact[1] <= ends[1]).all()
    y = lower @ weight.T
    assert (ends[0] <= y).all()
    assert (y <= ends[1]).all()


def test_tiny_huge_infinite_and_nan_inputs(always):
    weight = torch.randn(4, 128)
    for size in (1e-44, 1e-38, 1e30):
        for scale in (1.0, 1e-42, 1e-36, 1e-30):
            lower, upper = (end * size for end in boxes(3, 128))
            ends = _cuda_interval.linear(lower, upper, weight * scale, None, "real")
            exact = exact_ends(lower, upper, weight * scale)
            assert (ends[0].double() <= exact[0]).all()
            assert (ends[1].double() >= exact[1]).all()
    lower, upper = boxes(6, 128)
    lower[1, 3], upper[2, 4], lower[3, 5] = float("-inf"), float("nan"), 3e38
    upper[3, 5], lower[4, 0], upper[4, 0] = 3.2e38, 3.4e38, 3.4e38
    weight[1] = 0.0
    for rounding in ROUNDINGS:
        low, high = _cuda_interval.linear(lower, upper, weight * 100, None, rounding)
        for image in (1, 2):
            assert (low[image] == float("-inf")).all()
            assert (high[image] == float("inf")).all()
        assert low[[0, 5]].isfinite().all()
        assert not low.isnan().any()
        assert not high.isnan().any()
    weight[2, 7] = float("nan")
    low, high = _cuda_interval.linear(lower[:1], upper[:1], weight, None, "real")
    assert low[0, 2] == -high[0, 2] == float("-inf")
    assert low[0, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("rounding", ["real", "nearest"])
def test_the_rounding_of_activations_widens_bounds(always, rounding):
    lower, upper = boxes(5, 150)
    weight = torch.randn(6, 150)
    ends = _cuda_interval.linear(lower, upper, weight, None, rounding, int8=True)
    largest = torch.maximum(lower.abs(), upper.abs()).amax(1, keepdim=True)
    moved = largest / 254
    exact = exact_ends(lower - moved, upper + moved, weight)
    width = exact[1] - exact[0]
    assert (ends[0] <= exact[0] + 1e-3 * width).all()
    assert (exact[1] - 1e-3 * width <= ends[1]).all()
    assert ((ends[1] - ends[0]) <= 1.02 * width).all()


@pytest.mark.parametrize("columns", [16, 130])
def test_blocks_of_inputs_give_the_same(always, monkeypatch, columns):
    lower, upper = boxes(9, columns)
    weight, bias = torch.randn(10, columns), torch.randn(10)
    whole = _cuda_interval.linear(lower, upper, weight, bias, "real")
    monkeypatch.setattr(library, "_SUM_BYTES", 1)
    monkeypatch.setattr(library, "_LEAST_ROWS", 4)
    parts = _cuda_interval.linear(lower, upper, weight, bias, "real")
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "group_size", "group_dim", "activations"),
    [(4, 32, 1, None), (1.58, 64, 1, "int8"), (8, 16, 0, None), (3, 90, 1, None)],
)
def test_packed_weights_of_any_format_are_decoded_in_blocks(
    always, calls, monkeypatch, bits, group_size, group_dim, activations
):
    from pyrobust.ops import _interval_packed

    monkeypatch.setattr(library, "LEAST_INPUTS", 6)
    monkeypatch.setattr(library, "LEAST_PACKED_INPUTS", 6)
    monkeypatch.setattr(library, "_WEIGHT_BYTES", 1)
    monkeypatch.setattr(library, "_LEAST_ROWS", 16)
    weight = round_to_nearest(
        torch.randn(40, 90), bits=bits, group_size=group_size, group_dim=group_dim,
        symmetric=bits == 1.58,
    )  # fmt: skip
    parts = (weight.codes, weight.scale, weight.zero)
    options = {"bits": bits, "group_size": group_size, "group_dim": group_dim}
    bias = torch.randn(40)
    for batch in (5, 6, 20):
        lower, upper = boxes(batch, 90)
        ends = _interval_packed._linear_cuda(
            lower, upper, *parts, bias, 90, *options.values(), activations, "real", *(None,) * 5
        )
        assert bool(calls) == (batch >= 6)
        cpu = ops.interval_packed_linear(
            lower, upper, *parts, bias, in_features=90, activations=activations, **options
        )
        middle = (cpu[0].double() + cpu[1]) / 2
        assert ((ends[0] <= middle) & (middle <= ends[1])).all()
        ratio = (ends[1] - ends[0]) / (cpu[1] - cpu[0])
        assert ratio.min() > 0.999
        assert ratio.max() < 1.02


# --- which path -------------------------------------------------------------------------------


def test_few_inputs_stay_with_the_fused_kernel(emulated_cuda, calls, monkeypatch):
    monkeypatch.setattr(library, "LEAST_PRODUCTS", 64 * 16 * 16)
    weight = torch.randn(16, 16)
    monkeypatch.setattr(library, "LEAST_INPUTS", 64)
    _cuda_interval.linear(*boxes(63, 16), weight, None, "real")
    assert not calls
    _cuda_interval.linear(*boxes(64, 16), weight, None, "real")
    assert calls


def test_products_of_warpgroups_come_first_where_they_exist(emulated_cuda, calls, monkeypatch):
    monkeypatch.setattr(library, "LEAST_PRODUCTS", 64 * 16 * 16)
    weight, ends = torch.randn(16, 128), boxes(64, 128)
    codes = round_to_nearest(weight, bits=4, group_size=128).codes
    assert library.serves_linear(ends[0], 16, 128, exact=False)
    assert not library.serves_linear(ends[0], 16, 128, exact=True)
    assert library.serves_linear(boxes(65, 128)[0], 16, 128, exact=True)
    many = boxes(1023, 128)[0]
    assert not _cuda_interval.decodes_in_blocks(many, codes, 128, fits=True)
    assert _cuda_interval.decodes_in_blocks(many, codes, 128, fits=False)
    _cuda_interval.linear(*ends, weight.bfloat16(), None, "real")
    assert not calls
    for device in (2, 3):
        monkeypatch.setattr(library, "where", lambda _, device=device: (device, 0))
        assert library.serves_linear(ends[0], 16, 128, exact=True)


def test_parts_of_a_weight_are_kept_for_its_version(always, emulated_cuda, monkeypatch):
    made = []
    original = library._split
    monkeypatch.setattr(library, "_split", lambda w: made.append(w.shape) or original(w))
    weight = nn.Parameter(torch.randn(4, 24))
    box = boxes(3, 24)
    first = ops._interval_linear._linear_cuda(*box, weight, None, "real")
    ops._interval_linear._linear_cuda(*box, weight, None, "real")
    assert len(made) == 1
    with torch.no_grad():
        weight.mul_(2)
    second = ops._interval_linear._linear_cuda(*box, weight, None, "real")
    assert len(made) == 2
    torch.testing.assert_close(second[0], first[0] * 2)
    weight.data = weight.data * 2
    third = ops._interval_linear._linear_cuda(*box, weight, None, "real")
    assert len(made) == 3
    torch.testing.assert_close(third[1], first[1] * 4)
    with torch.inference_mode():
        hidden = torch.randn(4, 24)
        ops._interval_linear._linear_cuda(*box, hidden, None, "real")
        hidden.mul_(2)
        ops._interval_linear._linear_cuda(*box, hidden, None, "real")
    assert len(made) == 5
    kept = len(library._WEIGHTS)
    del weight
    gc.collect()
    assert len(library._WEIGHTS) == kept - 1


def test_graphs_split_weights_that_may_be_trained(always, monkeypatch):
    """Replays of a graph see the weight as it is then, not as it was when its parts were kept."""
    made = []
    original = library._split
    monkeypatch.setattr(library, "_split", lambda w: made.append(w.shape) or original(w))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class Captured(torch.Tensor):
        is_cuda = True

    frozen, trained = torch.randn(4, 24), nn.Parameter(torch.randn(4, 24))
    for weight, again in ((frozen, 0), (trained, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            library._weight_of(weight, True)
        patched = weight.as_subclass(Captured)
        library._WEIGHTS[patched] = library._WEIGHTS[weight]
        before = len(made)
        monkeypatch.setattr(library, "where", lambda _: (0, 0))
        parts = library._weight_of(patched, True)
        assert len(made) == before + again
        assert (patched in library._CAPTURED) == (not again)
        assert parts.magnitude.shape == (4, 24)


# --- convolutions -----------------------------------------------------------------------------

WINDOWS = [
    {"stride": (2, 1), "dilation": (1, 2), "groups": 1},
    {"stride": (1, 2), "dilation": (2, 1), "groups": 2},
    {"stride": (1, 1), "dilation": (1, 1), "groups": 6},
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("window", WINDOWS)
def test_convolutions(product, window, rounding):
    lower, upper = (end.view(5, 6, 7, 6) for end in boxes(5, 6 * 7 * 6))
    weight, bias = torch.randn(12, 6 // window["groups"], 3, 2), torch.randn(12)
    own = list(window["stride"]), [1, 0, 1, 1], list(window["dilation"]), window["groups"]
    ends = ops._interval_conv._conv_cuda(lower, upper, weight, bias, *own, rounding)
    sides = [torch.nn.functional.pad(end, (1, 1, 1, 0)).double() for end in (lower, upper)]
    exact = ops.interval_conv2d(*sides, weight.double(), bias.double(), **window)
    largest = torch.maximum(sides[0].abs(), sides[1].abs())
    magnitude = torch.nn.functional.conv2d(largest, weight.double().abs(), **window)
    assert ends[0].shape == exact[0].shape
    reach = exact[1] - exact[0]
    if rounding == "nearest":
        for end, wanted in zip(ends, exact, strict=True):
            assert ((end - wanted).abs() <= 1e-4 * (magnitude + 1) + 2**-6 * reach).all()
    else:
        check_sound(ends, exact, magnitude, reach, slack=1.5e-4)


def test_blocks_of_images_give_the_same(always, monkeypatch):
    lower, upper = (end.view(5, 3, 6, 6) for end in boxes(5, 108))
    arguments = (torch.randn(4, 3, 3, 3), torch.randn(4), [1, 1], [1, 1, 1, 1], [1, 1], 1, "real")
    whole = ops._interval_conv._conv_cuda(lower, upper, *arguments)
    monkeypatch.setattr(library, "_IMAGE_BYTES", 1)
    parts = ops._interval_conv._conv_cuda(lower, upper, *arguments)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_infinite_pixel_reaches_its_patches_only(always):
    lower, upper = (end.view(2, 2, 6, 8) for end in boxes(2, 96))
    upper[1, 0, 0, 0] = float("inf")
    weight = torch.randn(3, 2, 3, 3)
    weight[1] = 0.0
    for rounding in ROUNDINGS:
        low, high = ops._interval_conv._conv_cuda(
            lower, upper, weight, None, [1, 1], [0] * 4, [1, 1], 1, rounding
        )
        assert (low[1, :, 0, 0] == float("-inf")).all()
        assert (high[1, :, 0, 0] == float("inf")).all()
        assert high[1, :, 1:, :].isfinite().all()
        assert low[0].isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
def test_activations_are_rounded_patch_by_patch(always, groups):
    lower, upper = (end.view(3, 4, 5, 5) for end in boxes(3, 100))
    lower[0], upper[0] = lower[0] * 50, upper[0] * 50
    weight = torch.randn(4, 4 // groups, 3, 3)
    own = ((3, 3), (1, 1), (1, 1), groups, (3, 3), "real")
    ends = _cuda_interval.convolve(lower, upper, weight, None, *own, int8=True)
    exact = ops.interval_conv2d(lower.double(), upper.double(), weight.double(), groups=groups)
    patches = torch.nn.functional.unfold(torch.maximum(lower.abs(), upper.abs()), 3)
    largest = patches.unflatten(1, (groups, -1)).amax(2).view(3, groups, 3, 3)
    moved = (largest / 254).repeat_interleave(4 // groups, 1)
    moved = moved * weight.abs().sum((1, 2, 3)).view(1, 4, 1, 1)
    width = exact[1] - exact[0] + 2 * moved
    assert (ends[0] <= exact[0] - moved + 1e-4 * width).all()
    assert (exact[1] + moved - 1e-4 * width <= ends[1]).all()
    assert ((ends[1] - ends[0]) <= 1.02 * width).all()


def test_a_network_of_images(always, calls):
    """Through the layers of a model, as a GPU would run them; sound against float64."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    x = torch.rand(3, 3, 4, 4)
    conv, last = model[0], model[3]
    low, high = ops._interval_conv._conv_cuda(
        x - 0.01, x + 0.01, conv.weight.detach(), conv.bias.detach(), [1, 1], [1] * 4, [1, 1], 1,
        "real",
    )  # fmt: skip
    hidden = Interval(low.relu(), high.relu()).flatten(1)
    ends = ops._interval_linear._linear_cuda(
        hidden.lower, hidden.upper, last.weight.detach(), last.bias.detach(), "real"
    )
    assert calls
    noise = (torch.rand(200, 1, 3, 4, 4) * 2 - 1) * 0.01
    y = model.double()((x + noise).double().flatten(0, 1)).view(200, 3, 5)
    assert ((ends[0] <= y) & (y <= ends[1])).all()
