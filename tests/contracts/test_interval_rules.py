"""Every rule of Interval, one row each: containment, inclusion, points, deployment, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.interval.table import BY_NAME

_PARAMETERS: dict[Any, torch.Tensor] = {}  # made once: compiled code cannot draw them


def parameter(x: Any, *shape: int, seed: int = 0, positive: bool = False) -> torch.Tensor:
    """The same float32 numbers for every x, in the dtype of x (exactly, in float64)."""
    key = shape, seed, positive, x.dtype
    if key not in _PARAMETERS:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        _PARAMETERS[key] = (values.abs() + 0.1 if positive else values).to(x.dtype)
    return _PARAMETERS[key]


@dataclass(frozen=True)
class Row:
    """One way to call a rule, on inputs in ``[low, high]``.

    ``jumps``: contains two readings of a function that jumps, so points are not tight.
    ``gradients``: False where the rule cuts them by intent.
    """

    name: str
    call: Callable[[Any], Any]
    shape: tuple[int, ...] = (2, 6)
    low: float = -3.0
    high: float = 3.0
    label: str = ""
    gradients: bool = True
    jumps: bool = False


def attend(x, **options):
    q, k, v = x.chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, **options)


def heads(x):
    inner = parameter(x, 12, 4), parameter(x, 12, seed=1)
    outer = parameter(x, 4, 4, seed=2), parameter(x, 4, seed=3)
    return F.multi_head_attention_forward(
        x, x, x, 4, 2, *inner, None, None, False, 0.0, *outer, training=False, need_weights=False
    )[0]


def without_dropout(name, x):
    return (getattr(torch, name, None) or getattr(F, name))(x, 0.5, False)


def pool(name, x):
    return getattr(F, name)(x, 2)


def batch_norm(x):
    statistics = parameter(x, 3), parameter(x, 3, seed=1, positive=True)
    affine = parameter(x, 3, seed=2), parameter(x, 3, seed=3)
    return F.batch_norm(x, *statistics, *affine, False, 0.1, 1e-5)


def statistics_norm(x):
    statistics = parameter(x, 3), parameter(x, 3, seed=1, positive=True)
    return F.instance_norm(x, *statistics, parameter(x, 3, seed=2), None, False)


IMAGE = (2, 3, 6, 6)
ROWS = [
    # arithmetic
    Row("add", lambda x: x + parameter(x, 6)),
    Row("add", lambda x: torch.add(x, parameter(x, 6), alpha=0.1), label="alpha"),
    Row("add", lambda x: x + x * 0.1, label="number"),
    Row("sub", lambda x: 1.7 - x),
    Row("subtract", lambda x: torch.subtract(parameter(x, 6), x)),
    Row("rsub", lambda x: torch.rsub(x, 0.3)),
    Row("mul", lambda x: x * parameter(x, 6)),
    Row("mul", lambda x: x[:1] * x[1:], label="two boxes"),
    Row("multiply", lambda x: torch.multiply(x, 0.1)),
    Row("div", lambda x: x / parameter(x, 6)),
    Row("div", lambda x: x[:1] / x[1:], low=0.5, label="two boxes"),
    Row("div", lambda x: 1 / x, low=-3, high=-0.5, label="number"),
    Row("divide", lambda x: torch.divide(x, 4.0)),
    Row("true_divide", lambda x: torch.true_divide(x, 3)),
    Row("neg", lambda x: -x),
    Row("positive", torch.positive),
    Row("negative", torch.negative),
    Row("abs", abs),
    Row("absolute", torch.absolute),
    Row("square", torch.square),
    Row("square", lambda x: x * x, label="product with itself"),
    Row("sqrt", torch.sqrt, low=0.3),
    Row("rsqrt", torch.rsqrt, low=0.3),
    Row("reciprocal", torch.reciprocal, low=0.3),
    *(Row("pow", lambda x, p=p: x**p, low=0.3, label=str(p)) for p in (0.5, 1.7, -2, -0.5)),
    *(Row("pow", lambda x, p=p: x**p, label=str(p)) for p in (1, 2, 3, 4)),
    Row("maximum", lambda x: torch.maximum(x, parameter(x, 6))),
    Row("minimum", lambda x: torch.minimum(x[:1], x[1:])),
    # curves
    *(
        Row(name, getattr(F, name))
        for name in (
            *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
            *("hardswish", "hardsigmoid", "softplus", "logsigmoid", "sigmoid", "tanh", "softsign"),
            "hardtanh",
        )
    ),
    Row("gelu", lambda x: F.gelu(x, approximate="tanh"), label="tanh"),
    Row("gelu", F.gelu, low=-12, high=-3, label="tail"),
    Row("silu", F.silu, low=-90, high=-3, label="tail"),
    Row("leaky_relu", lambda x: F.leaky_relu(x, -0.3), label="negative slope"),
    Row("prelu", lambda x: F.prelu(x, parameter(x, 6))),
    Row("elu", lambda x: F.elu(x, 0.3), label="alpha"),
    Row("celu", lambda x: F.celu(x, 0.3), label="alpha"),
    Row("softplus", lambda x: F.softplus(x, 3.0, 5.0), label="beta and threshold", jumps=True),
    Row("clamp", lambda x: x.clamp(-0.7, 1.1)),
    Row("clip", lambda x: x.clip(max=0.1)),
    Row("clamp_min", lambda x: x.clamp_min(0.1)),
    Row("clamp_max", lambda x: x.clamp_max(0.1)),
    *(Row(name, getattr(torch, name)) for name in ("exp", "expm1", "erf", "atan")),
    Row("expit", torch.special.expit),
    *(Row(name, getattr(torch, name), low=0.3) for name in ("log", "log2", "log10", "log1p")),
    # linear maps
    Row("linear", lambda x: F.linear(x, parameter(x, 5, 6), parameter(x, 5, seed=1))),
    Row("addmm", lambda x: torch.addmm(parameter(x, 5), x, parameter(x, 6, 5))),
    Row("addmm", lambda x: torch.addmm(64 * parameter(x, 2, 5), x, parameter(x, 6, 5)),
        label="matrix"),
    Row("embedding", lambda x: F.embedding(torch.tensor([[1, 0], [1, 1]]), x)),
    Row("conv1d", lambda x: F.conv1d(x, parameter(x, 4, 3, 3), stride=2), (2, 3, 8)),
    Row(
        "conv2d",
        lambda x: F.conv2d(x, parameter(x, 4, 3, 3, 3), parameter(x, 4, seed=1), padding=1),
        IMAGE,
    ),
    Row("conv2d", lambda x: F.conv2d(x, parameter(x, 6, 1, 3, 2), None, 2, 1, 1, 3), IMAGE,
        label="groups"),
    Row("conv2d", lambda x: F.conv2d(x, parameter(x, 4, 3, 2, 2), None, (2, 1), "valid", (1, 2)),
        IMAGE, label="dilation"),
    Row("conv3d", lambda x: F.conv3d(x, parameter(x, 2, 3, 2, 2, 2)), (1, 3, 3, 3, 3)),
    Row("conv_transpose1d", lambda x: F.conv_transpose1d(x, parameter(x, 3, 4, 3)), (2, 3, 5)),
    Row(
        "conv_transpose2d",
        lambda x: F.conv_transpose2d(x, parameter(x, 3, 2, 3, 3), parameter(x, 2, seed=1), 2, 1, 1),
        IMAGE,
    ),
    Row("conv_transpose2d",
        lambda x: F.conv_transpose2d(x, parameter(x, 3, 1, 2, 3), None, 2, 1, (1, 0), 3, (1, 2)),
        IMAGE, label="groups and dilation"),
    Row("conv_transpose3d", lambda x: F.conv_transpose3d(x, parameter(x, 2, 2, 2, 2, 2)),
        (1, 2, 3, 3, 3)),
    # normalisation
    Row("batch_norm", batch_norm, IMAGE),
    Row("layer_norm", lambda x: F.layer_norm(x, (6,), parameter(x, 6), parameter(x, 6, seed=1))),
    Row("layer_norm", lambda x: F.layer_norm(x, (6, 6)), IMAGE, label="two dimensions"),
    Row("rms_norm", lambda x: F.rms_norm(x, (6,), parameter(x, 6), 1e-6)),
    Row("group_norm", lambda x: F.group_norm(x, 2, parameter(x, 4)), (2, 4, 3)),
    Row("group_norm", lambda x: F.group_norm(x, 2, parameter(x, 4) / 16, parameter(x, 4, seed=1)),
        (2, 4, 3), label="bias"),
    Row("instance_norm", F.instance_norm, IMAGE),
    Row("instance_norm", lambda x: F.instance_norm(x, None, None, parameter(x, 3), parameter(x, 3)),
        IMAGE, label="affine"),
    Row("instance_norm", statistics_norm, IMAGE, label="running statistics"),
    *(
        Row(name, partial(without_dropout, name))
        for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
    ),
    *(
        Row(f"dropout{n}d", partial(without_dropout, f"dropout{n}d"), shape)
        for n, shape in ((1, (2, 3, 4)), (2, IMAGE), (3, (1, 2, 3, 3, 3)))
    ),
    # pooling
    *(
        Row(f"{kind}_pool{n}d", partial(pool, f"{kind}_pool{n}d"), (2, 3, *(4,) * n))
        for kind in ("avg", "max", "adaptive_avg", "adaptive_max")
        for n in (1, 2, 3)
    ),
    Row("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE,
        label="padding"),
    Row("interpolate", lambda x: F.interpolate(x, scale_factor=2), IMAGE, label="nearest"),
    Row("interpolate", lambda x: F.interpolate(x, (9, 5), mode="bilinear"), IMAGE,
        label="bilinear"),
    Row("interpolate", lambda x: F.interpolate(x, (4, 5), mode="area"), IMAGE, label="area"),
    Row("interpolate", lambda x: F.interpolate(x, 7, mode="linear", align_corners=True), (2, 3, 4),
        label="linear"),
    Row("interpolate", lambda x: F.interpolate(x, (3, 2, 5), mode="trilinear"), (1, 2, 3, 3, 3),
        label="trilinear"),
    Row("max_pool2d", lambda x: F.max_pool2d(x, 3, 1, 1, 2), IMAGE, label="padding and dilation"),
    Row("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=9), IMAGE, label="divisor"),
    Row("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (4, 5)), IMAGE, label="uneven"),
    # reductions
    Row("sum", lambda x: x.sum()),
    Row("sum", lambda x: x.sum(1), label="dim"),
    Row("mean", lambda x: x.mean((1, 2), keepdim=True), (2, 3, 4)),
    Row("cumsum", lambda x: x.cumsum(1)),
    Row("amax", lambda x: x.amax(1)),
    Row("amin", lambda x: torch.amin(x)),
    Row("max", lambda x: x.max(1).values),
    Row("max", lambda x: torch.max(x, parameter(x, 6)), label="two arguments"),
    Row("min", lambda x: x.min()),
    Row("logsumexp", lambda x: x.logsumexp(1)),
    # attention
    Row("matmul", lambda x: x @ parameter(x, 6, 3)),
    Row("matmul", lambda x: x @ x.mT, label="two boxes"),
    Row("bmm", lambda x: torch.bmm(x[..., :2], x[..., 2:].mT), (2, 3, 4)),
    Row("mm", lambda x: torch.mm(parameter(x, 3, 2), x)),
    Row("mv", lambda x: torch.mv(x, parameter(x, 6))),
    Row("softmax", lambda x: x.softmax(-1)),
    Row("softmax", lambda x: (20 * x).softmax(-1), label="steep"),
    Row("log_softmax", lambda x: F.log_softmax(x, 1)),
    Row("softmin", lambda x: F.softmin(x, 1)),
    Row("scaled_dot_product_attention", attend, (2, 4, 9)),
    Row("scaled_dot_product_attention", lambda x: attend(x, is_causal=True), (2, 4, 9),
        label="causal"),
    Row("multi_head_attention_forward", heads, (3, 2, 4)),
    # moves
    Row("view", lambda x: x.view(3, -1)),
    Row("reshape", lambda x: x.reshape(-1)),
    Row("view_as", lambda x: x.view_as(torch.empty(3, 4))),
    Row("reshape_as", lambda x: x.reshape_as(torch.empty(3, 4))),
    Row("expand_as", lambda x: x.expand_as(torch.empty(2, 2, 6))),
    Row("flatten", lambda x: torch.flatten(x, 1), (2, 3, 2)),
    Row("unflatten", lambda x: x.unflatten(1, (2, 3))),
    Row("permute", lambda x: x.permute(1, 0)),
    Row("transpose", lambda x: x.transpose(0, 1)),
    Row("swapaxes", lambda x: x.swapaxes(0, 1)),
    Row("swapdims", lambda x: x.swapdims(0, 1)),
    Row("movedim", lambda x: x.movedim(0, 1)),
    Row("moveaxis", lambda x: x.moveaxis(0, 1)),
    Row("t", lambda x: x.t()),
    Row("unsqueeze", lambda x: x.unsqueeze(0)),
    Row("squeeze", lambda x: x[:, :1].squeeze(1)),
    Row("expand", lambda x: x.expand(3, 2, 6)),
    Row("broadcast_to", lambda x: torch.broadcast_to(x, (3, 2, 6))),
    Row("chunk", lambda x: x.chunk(2, 1)[1]),
    Row("split", lambda x: torch.split(x, 4, 1)[1]),
    Row("tensor_split", lambda x: x.tensor_split(2, 1)[0]),
    Row("unbind", lambda x: x.unbind(1)[2]),
    Row("narrow", lambda x: x.narrow(1, 1, 3)),
    Row("select", lambda x: x.select(1, 2)),
    Row("diagonal", lambda x: x.diagonal()),
    Row("contiguous", lambda x: x.mT.contiguous()),
    Row("detach", lambda x: x.detach(), gradients=False),
    Row("unfold", lambda x: x.unfold(1, 3, 2)),
    Row("repeat", lambda x: x.repeat(2, 1)),
    Row("repeat_interleave", lambda x: x.repeat_interleave(2, 1)),
    Row("tile", lambda x: x.tile(2, 2)),
    Row("index_select", lambda x: x.index_select(1, torch.tensor([0, 3]))),
    Row("gather", lambda x: x.gather(1, torch.tensor([[1], [0]]))),
    Row("take_along_dim", lambda x: x.take_along_dim(torch.tensor([[1], [0]]), 1)),
    Row("clone", lambda x: x.clone()),
    Row("roll", lambda x: x.roll(1, 0)),
    Row("flip", lambda x: x.flip(1)),
    Row("rot90", lambda x: x.rot90()),
    Row("tril", lambda x: x.tril()),
    Row("triu", lambda x: x.triu()),
    Row("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 2)),
    Row("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (1, 1, 4, 4)),
    Row("channel_shuffle", lambda x: F.channel_shuffle(x, 2), (1, 4, 2, 2)),
    Row("cpu", lambda x: x.cpu()),
    Row("__getitem__", lambda x: x[..., 1:3]),
    Row("cat", lambda x: torch.cat([x, parameter(x, 2, 2)], 1)),
    Row("concat", lambda x: torch.concat([x, x])),
    Row("concatenate", lambda x: torch.concatenate([x, x])),
    Row("stack", lambda x: torch.stack([x, parameter(x, 2, 6)], 1)),
    Row("pad", lambda x: F.pad(x, (1, 2), value=0.5)),
    *(
        Row("pad", lambda x, mode=mode: F.pad(x, (1, 2, 0, 1), mode), IMAGE, label=mode)
        for mode in ("reflect", "replicate", "circular")
    ),
    Row("where", lambda x: torch.where(parameter(x, 6) > 0, x, 0.25)),
    Row("masked_fill", lambda x: x.masked_fill(parameter(x, 6) > 0, 0.25)),
    Row("to", lambda x: x.to(x.dtype)),
    Row("type_as", lambda x: x.type_as(parameter(x, 1))),
    Row("double", lambda x: x.double(), gradients=False),
    Row("float", lambda x: x.to(torch.float64) if x.dtype == torch.float64 else x.float(),
        gradients=False),
]  # fmt: skip
SOUND = ["real", "deployed", "deployed-tf32", "deployed-bfloat16"]
WITHOUT_ROW = {
    "cuda",
    "__rsub__",
    "__rdiv__",
    "__rtruediv__",
    "__pow__",
    "__matmul__",
    "__rmatmul__",
}
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name} {row.label}".strip())


def draw(row: Row, radius: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of a float32 box; some elements have no width."""
    centre = row.low + (row.high - row.low) * torch.rand(row.shape)
    reach = radius * torch.rand(row.shape) * (torch.rand(row.shape) > 0.2)
    return centre - reach, centre + reach


def points_of(lower, upper, count=16):
    """Corners and inner points of a float32 box."""
    yield lower
    yield upper
    for i in range(count):
        share = torch.rand_like(lower)
        if i % 2:
            share = (share > 0.5).float()
        yield torch.minimum(torch.maximum(lower + (upper - lower) * share, lower), upper)


def within_domain(row, lower, upper, dtype):
    """The box in ``dtype``, cut to where the function of a row with a border is defined."""
    if row.low > 0:
        lower, upper = lower.clamp(min=0.05), upper.clamp(min=0.05)
    if row.high < 0:
        lower, upper = lower.clamp(max=-0.05), upper.clamp(max=-0.05)
    return lower.to(dtype), upper.to(dtype)


def ends64(box: Interval) -> tuple[torch.Tensor, torch.Tensor]:
    return box.lower.double(), box.upper.double()


def test_every_rule_has_a_row():
    assert {row.name for row in ROWS} | WITHOUT_ROW == set(BY_NAME)


@EACH
@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("radius", [0.05, 0.0])
def test_images_of_points_lie_inside(row, rounding, radius):
    lower, upper = draw(row, radius)
    low, high = ends64(row.call(Interval(lower, upper, rounding=rounding)))
    assert not low.isnan().any()
    assert not high.isnan().any()
    for point in points_of(lower, upper):
        value = row.call(point.double()).double()
        slack = 1e-13 * value.abs() + 2e-15  # float64 errs by 1e-15, float32 would by 1e-7
        assert value.shape == low.shape
        assert bool(((low <= value + slack) & (value - slack <= high)).all()), rounding


@EACH
def test_float32_evaluations_lie_inside_deployed_boxes(row):
    for radius in (1e-3, 0.0):
        lower, upper = draw(row, radius)
        result = row.call(Interval(lower, upper, rounding="deployed"))
        for point in points_of(lower, upper):
            assert bool(result.contains(row.call(point)).all())


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_a_smaller_box_has_a_smaller_image(row, rounding, dtype):
    """Exactly in float32, but that ends below the smallest normal number may move up to it."""
    for radius in (0.5, 1e-3):
        lower, upper = within_domain(row, *draw(row, radius), dtype)
        outer_low, outer_high = ends64(row.call(Interval(lower, upper, rounding=rounding)))
        third = (upper - lower) / 3
        smaller = lower + third, torch.maximum(lower + third, upper - third)
        inner_low, inner_high = ends64(row.call(Interval(*smaller, rounding=rounding)))
        slack = torch.full_like(outer_low, torch.finfo(dtype).tiny)
        if dtype == torch.float64:  # interpolation sums in other orders
            slack += 1e-14 * torch.maximum(outer_low.abs(), outer_high.abs())
        assert bool((outer_low - slack <= inner_low).all())
        assert bool((inner_high <= outer_high + slack).all())


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["nearest", *SOUND])
def test_every_mode_contains_corners_and_inner_points(row, rounding, dtype):
    """In float64 evaluations; deployed modes contain those in the dtype of the box, too."""
    for radius in (0.5, 1e-3, 0.0):
        lower, upper = within_domain(row, *draw(row, radius), dtype)
        result = row.call(Interval(lower, upper, rounding=rounding))
        low, high = ends64(result)
        assert bool((low <= high).all())
        for point in points_of(lower, upper):
            value = row.call(point.double()).double()
            slack = 1e-13 * value.abs() + 2e-15
            if rounding == "nearest" and dtype == torch.float32:
                slack = 2e-5 * (1 + value.abs())
            assert bool(((low <= value + slack) & (value - slack <= high)).all())
            if rounding.startswith("deployed"):
                assert bool(result.contains(row.call(point)).all())


@EACH
def test_a_point_has_the_image_of_a_point_within_rounding(row):
    if row.jumps:
        pytest.skip("contains both sides of a jump")
    point, _ = draw(row, 0.0)
    value = row.call(point.double()).double()
    for rounding, units in (("real", 512), ("nearest", 4)):
        low, high = ends64(row.call(Interval(point, point, rounding=rounding)))
        size = value.abs() + value.abs().amax() + 1
        assert float(((high - low) / size).max()) <= units * 2.0**-23
        assert float(((high - value).abs() / size).max()) <= units * 2.0**-23


@EACH
def test_gradients_of_both_ends(row):
    if not row.gradients or row.jumps:
        pytest.skip("not differentiable by intent")
    lower, upper = (end.double().requires_grad_() for end in draw(row, 0.05))
    upper = (upper + 0.01).detach().requires_grad_()

    def ends(low, high):
        result = row.call(Interval(low, high, rounding="nearest"))
        return result.lower, result.upper

    assert torch.autograd.gradcheck(ends, (lower, upper), fast_mode=True, atol=1e-5, rtol=1e-4)
    straight = row.call(Interval(lower, upper))
    got = torch.autograd.grad(straight.upper.sum() - straight.lower.sum(), (lower, upper))
    expected_ends = ends(lower, upper)
    expected = torch.autograd.grad(expected_ends[1].sum() - expected_ends[0].sum(), (lower, upper))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["nearest", "real", "deployed"])
def test_gradients_of_attention_to_a_single_score_are_finite(rounding, dtype):
    low = torch.randn(2, 4, 9, dtype=dtype)
    leaves = low.requires_grad_(), (low.detach() + 0.05).requires_grad_()
    result = attend(Interval(*leaves, rounding=rounding), is_causal=True)
    (result.upper.sum() - result.lower.sum()).backward()
    for leaf in leaves:
        assert bool(leaf.grad.isfinite().all())
