"""Convolutions that wait for batch norm and residual sums: the bits of separate passes, unseen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval, _native, pack
from pyrobust.interval.finite import infinite_ends
from pyrobust.ops import _late_products, radius_precision

pytestmark = pytest.mark.emulated_tiles

ROUNDINGS = ["real", "deployed", "nearest"]


@pytest.fixture
def calls(monkeypatch):
    """Names of the native calls, in order; every convolution may wait."""
    made = []

    def watched(name, kernel):
        def run(*args):
            late = name.endswith("conv2d") and args[-1]
            made.append(f"{name} and more" if late else name)
            return kernel(*args)

        return run

    for name in (
        *("interval_add", "interval_channel_affine"),
        *("interval_conv2d", "interval_packed_conv2d"),
    ):
        monkeypatch.setattr(_native, name, watched(name, getattr(_native, name)))
    monkeypatch.setattr(_late_products, "_LEAST_VALUES", 1)
    monkeypatch.setattr(_late_products, "_VALUES_PER_COPIED", 0)
    return made


def at_once(function, *args):
    """What ``function`` gives where no convolution waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_late_products, "_LEAST_VALUES", 1 << 62)
        result = function(*args)
        return result.lower, result.upper


def box_of(*shape, width=0.05, rounding="real"):
    x = torch.randn(*shape)
    return Interval(x - width, x + width * torch.rand(shape), rounding=rounding)


class AnyBatchNorm(nn.BatchNorm2d):
    """Of lines too."""

    def _check_input_dim(self, input):
        pass


def normalizer(channels):
    """Batch norm with scales of both signs, one of them zero."""
    layer = AnyBatchNorm(channels).eval().requires_grad_(False)
    layer.weight.uniform_(-1.5, 1.5)[0] = 0.0
    layer.bias.normal_()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.01, 2.0)
    return layer


def layer_of(kind):
    """A convolution and the shape of its input, for each form that kernels have."""
    torch.manual_seed(len(kind))
    conv, shape = {
        "filtered by fours": (nn.Conv2d(16, 20, 3, padding=1), (3, 16, 32, 32)),
        "filtered by pairs": (nn.Conv2d(17, 16, 3, padding=1, bias=False), (8, 17, 18, 20)),
        "filtered by stride 2": (nn.Conv2d(16, 50, 3, 2, padding=1), (8, 16, 32, 32)),
        "direct": (nn.Conv2d(5, 9, 3, padding=1), (2, 5, 19, 21)),
        "direct in groups": (nn.Conv2d(8, 12, (3, 5), padding=2, groups=2), (2, 8, 20, 33)),
        "panels": (nn.Conv2d(6, 21, 3), (5, 6, 7, 9)),
        "one pixel wide": (nn.Conv2d(6, 11, (1, 3)), (3, 6, 9, 3)),
        "1 x 1 by stride 2": (nn.Conv2d(12, 20, 1, 2, bias=False), (4, 12, 15, 15)),
        "lines": (nn.Conv1d(6, 10, 5, padding=2), (3, 6, 40)),
        "short lines": (nn.Conv1d(8, 12, 2, 2, padding="valid", groups=2), (5, 8, 18)),
    }[kind.removeprefix("4 bits, ").removeprefix("8-bit activations, ")]
    conv.requires_grad_(False)
    if kind.startswith("4 bits"):
        conv = pack(nn.Sequential(conv), bits=4, group_size=8)[0]
    if kind.startswith("8-bit"):
        conv = pack(nn.Sequential(conv), bits=8, group_size=8, activations="int8")[0]
    return conv, shape


FORMS = [
    *("filtered by fours", "filtered by pairs", "filtered by stride 2", "direct"),
    *("direct in groups", "panels", "one pixel wide", "1 x 1 by stride 2", "lines", "short lines"),
    *("4 bits, filtered by fours", "4 bits, direct", "8-bit activations, panels"),
    *("4 bits, lines", "4 bits, short lines", "8-bit activations, lines"),
]
STEPS = {
    "norm": lambda y, norm, other: norm(y),
    "norm of a ReLU": lambda y, norm, other: norm(F.relu(y)),
    "sum": lambda y, norm, other: y + other,
    "sum of ReLUs": lambda y, norm, other: F.relu(other) + F.relu(y),
    "norm and sum": lambda y, norm, other: other + norm(y),
    "norm, ReLU, sum, ReLU": lambda y, norm, other: F.relu(F.relu(norm(y)) + F.relu(other)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_steps_that_join_give_the_bits_of_separate_passes(isa, form, rounding, calls):
    conv, shape = layer_of(form)
    box = box_of(*shape, rounding=rounding)
    other = box_of(*conv(box).shape, rounding=rounding)
    norm = normalizer(other.shape[1])
    for name, steps in STEPS.items():
        if other.shape[2:].numel() < 8:
            continue

        def function(x, steps=steps):
            return steps(conv(x), norm, other)

        lower, upper = at_once(function, box)
        calls.clear()
        result = function(box)
        assert calls == [], name  # nothing was read
        assert torch.equal(result.lower, lower), name
        assert torch.equal(result.upper, upper), name
        assert len(calls) == 1, name
        assert calls[0].endswith("and more"), name


@pytest.mark.parametrize("form", FORMS)
def test_points_of_the_box_stay_inside_and_smaller_boxes_too(isa, form, calls):
    conv, shape = layer_of(form)
    whole = box_of(*shape, rounding="deployed")
    other = box_of(*conv(whole).shape, rounding="deployed")
    norm = normalizer(other.shape[1])

    def network(x, y):
        return F.relu(norm(conv(x)) + y)

    result, real = network(whole, other), None
    if isinstance(conv, (nn.Conv1d, nn.Conv2d)):
        real = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    for seed in range(6):
        torch.manual_seed(seed)
        shares = torch.rand(shape), torch.rand(other.shape)
        if seed % 2:
            shares = tuple(share.round() for share in shares)
        x, y = (
            torch.lerp(box.lower, box.upper, share).clamp(box.lower, box.upper)
            for box, share in zip((whole, other), shares, strict=True)
        )
        assert bool(result.contains(network(x, y)).all())
        if real is not None:
            exact = F.relu(real[1](real[0](x.double())) + y.double())
            slack = 1e-12 * exact.abs()
            assert bool((result.lower.double() <= exact + slack).all())
            assert bool((result.upper.double() >= exact - slack).all())
        inner = network(
            Interval(
                torch.minimum(x, (whole.lower + x) / 2).clamp(whole.lower, x),
                x,
                rounding="deployed",
            ),
            Interval(y, y, rounding="deployed"),
        )
        assert bool(result.contains(inner).all())


class Block(nn.Module):
    """Of torchvision's ResNet."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = normalizer(outputs), normalizer(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, normalizer(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet(packed=False):
    torch.manual_seed(5)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), normalizer(16), nn.ReLU())
    blocks = nn.Sequential(Block(16, 16, 1), Block(16, 24, 2))
    model = nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))
    model = model.eval().requires_grad_(False)
    return pack(model, bits=4, group_size=8) if packed else model


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_resnet_is_one_pass_a_convolution(packed, rounding, calls):
    model, box = resnet(packed), box_of(2, 3, 32, 32, rounding=rounding)
    lower, upper = at_once(model, box)
    calls.clear()
    result = model(box)
    assert torch.equal(result.lower, lower)
    assert torch.equal(result.upper, upper)
    kind = "interval_packed_conv2d" if packed else "interval_conv2d"
    assert calls == [f"{kind} and more"] * 6


def test_gradients_of_a_resnet_in_evaluation_mode_are_those_of_its_rules(calls):
    box = box_of(2, 3, 32, 32)
    model = resnet().requires_grad_(True)
    grads = []
    for _ in range(2):
        result = model(box)
        grads.append(torch.autograd.grad(result.upper.sum(), list(model.parameters())))
    assert "interval_conv2d and more" not in calls
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    model.requires_grad_(False)
    lower = box.lower.clone().requires_grad_()
    given = Interval(lower, box.upper)
    (gradient,) = torch.autograd.grad(model(given).upper.sum(), lower)
    assert bool(gradient.ne(0).any())


def test_frozen_convolutions_wait_before_parameters_that_are_trained(calls):
    conv, shape = layer_of("direct")
    norm = normalizer(9).requires_grad_(True)
    box = box_of(*shape)
    result = norm(conv(box))
    lower, _ = at_once(lambda x: norm(conv(x)), box)
    assert torch.equal(result.lower, lower)
    result.upper.sum().backward()
    assert norm.weight.grad is not None


def test_a_box_that_somebody_holds_is_computed_once(calls):
    conv, shape = layer_of("direct")
    norm, box = normalizer(9), box_of(*shape)
    before = conv(box)
    after = norm(before)
    total = after + box_of(*before.shape)
    assert bool((after.upper > -torch.inf).all())
    assert bool((total.upper > -torch.inf).all())
    assert bool((before.upper > -torch.inf).all())
    assert calls == ["interval_conv2d", "interval_channel_affine", "interval_add"]
    lower, upper = at_once(conv, box)
    assert torch.equal(before.lower, lower)
    assert torch.equal(before.upper, upper)


def test_sums_of_one_box_with_itself_and_with_what_follows_it(calls):
    conv, shape = layer_of("direct")
    norm, box = normalizer(9), box_of(*shape)

    def twice(x):
        y = conv(x)
        return y + y

    def around(x):
        y = conv(x)
        return y + norm(F.relu(y))

    for function in (twice, around):
        lower, upper = at_once(function, box)
        calls.clear()
        result = function(box)
        assert torch.equal(result.lower, lower)
        assert torch.equal(result.upper, upper)
        assert sum("conv2d" in name for name in calls) == 1


def test_layers_may_change_before_the_box_is_read(calls):
    for form in ("direct", "4 bits, direct"):
        conv, shape = layer_of(form)
        norm, box = normalizer(9), box_of(*shape)
        lower, upper = at_once(lambda x, conv=conv, norm=norm: norm(conv(x)), box)
        result = norm(conv(box))
        for tensor in (*conv.state_dict().values(), *norm.state_dict().values()):
            tensor.data.zero_()
        assert torch.equal(result.lower, lower)
        assert torch.equal(result.upper, upper)


def test_inputs_changed_in_place_are_refused(calls):
    conv, shape = layer_of("direct")
    low, high = torch.zeros(shape), torch.ones(shape)
    result = conv(Interval(low, high))
    high.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place before the result"):
        _ = result.upper
    other = torch.zeros(2, 9, 19, 21), torch.ones(2, 9, 19, 21)
    total = conv(Interval(low, high)) + Interval(*other)
    other[1].add_(1.0)
    assert total._deferred is not None
    with pytest.raises(RuntimeError, match="changed in place before the result"):
        _ = total.upper


def test_questions_about_its_form_are_answered_without_the_product(calls):
    conv, shape = layer_of("direct")
    result = conv(box_of(*shape))
    assert result.shape == result.size() == (2, 9, 19, 21)
    assert (len(result), result.ndim, result.dim(), result.size(1)) == (2, 4, 4, 9)
    assert result.numel() == result.lower.numel()
    calls.clear()
    result = F.relu(conv(box_of(*shape)))
    assert result.dtype == torch.float32
    assert result.device == torch.device("cpu")
    assert not result.requires_grad
    assert not result.is_cuda
    assert calls == []


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]
)
def test_copies(duplicate, calls):
    conv, shape = layer_of("direct")
    result = F.relu(conv(box_of(*shape)))
    twin = duplicate(result)
    assert torch.equal(twin.lower, result.lower)
    assert torch.equal(twin.upper, result.upper)


def huge(channels, place):
    """A network of which the step ``place`` overflows."""
    conv = nn.Conv2d(4, channels, 1, bias=False).requires_grad_(False)
    norm = nn.BatchNorm2d(channels).eval().requires_grad_(False)
    conv.weight.fill_(1e38 if place == "conv2d" else 1.0)
    norm.weight.fill_(1e38 if place == "batch_norm" else 1.0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv, norm)

        def forward(self, x):
            out = self.body(x)
            large = torch.full(out.shape, torch.finfo(torch.float32).max)
            return out + Interval(large, large, rounding=out.rounding)

    return Network()


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("conv2d", r"conv2d.*body\.0, a Conv2d, of Network"),
        ("batch_norm", r"batch_norm.*body\.1, a BatchNorm2d, of Network"),
        ("add", r"add.*in Network"),
    ],
)
def test_what_overflows_is_named_with_its_place(place, says, rounding, calls):
    lower = torch.full((1, 4, 8, 8), 50.0)
    upper = torch.full((1, 4, 8, 8), 1e28 if place == "add" else 60.0)
    box = Interval(lower, upper, rounding=rounding)
    network = huge(3, place)
    with pytest.raises(OverflowError, match=says):
        _ = network(box).lower


def test_where_infinite_ends_are_allowed_nothing_waits(calls):
    conv, shape = layer_of("direct")
    with infinite_ends():
        conv(box_of(*shape))
    assert calls == ["interval_conv2d"]


@pytest.mark.parametrize("form", FORMS)
def test_coarse_radii_are_those_of_the_block_that_asked(isa, form, calls):
    conv, shape = layer_of(form)
    box = box_of(*shape)
    other = box_of(*conv(box).shape)
    norm = normalizer(other.shape[1])

    def network(x):
        return F.relu(norm(conv(x)) + other)

    fine = at_once(network, box)
    with radius_precision("bfloat16"):
        lower, upper = at_once(network, box)
        calls.clear()
        result = network(box)
        later = network(box)
    for read in (result, later):
        assert torch.equal(read.lower, lower)
        assert torch.equal(read.upper, upper)
    assert len(calls) == 2
    assert all(call.endswith("and more") for call in calls)
    before = network(box)
    with radius_precision("bfloat16"):
        assert torch.equal(before.lower, fine[0])
        assert torch.equal(before.upper, fine[1])


def test_small_results_and_large_weights_do_not_wait():
    small, shape = layer_of("panels")
    assert small(box_of(*shape))._deferred is None
    wide = nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    assert wide(box_of(16, 256, 8, 8))._deferred is None
    conv = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    assert conv(box_of(15, 16, 32, 32))._deferred is None
    assert conv(box_of(16, 16, 32, 32))._deferred is not None


@pytest.mark.parametrize("reader", ["inference", "grad", "jvp", "vmap", "no_grad"])
def test_readers_in_other_modes_get_plain_tensors(reader, calls):
    conv, shape = layer_of("direct")
    box = box_of(*shape)
    lower, _ = at_once(conv, box)
    result = conv(box)
    factor = torch.ones(())
    if reader == "inference":
        with torch.inference_mode():
            assert torch.equal(result.lower, lower)
    elif reader == "grad":
        slope = torch.func.grad(lambda t: (result.lower * t).sum())(factor)
        torch.testing.assert_close(slope, lower.sum())
    elif reader == "jvp":
        _, slope = torch.func.jvp(lambda t: result.lower.sum() * t, (factor,), (factor,))
        torch.testing.assert_close(slope, lower.sum())
    elif reader == "vmap":
        sums = torch.vmap(lambda t: (result.lower * t).sum())(torch.ones(3))
        torch.testing.assert_close(sums, lower.sum().expand(3))
    else:
        with torch.no_grad():
            _ = result.upper
    assert not result.lower.is_inference()
    assert torch.equal(result.lower, lower)


def test_compiled_code_reads_a_box_that_waits(calls):
    if tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13):
        pytest.skip("older torch does not trace objects with __torch_function__")
    conv, shape = layer_of("direct")
    box = box_of(*shape)
    lower, _ = at_once(conv, box)
    torch._dynamo.reset()
    read = torch.compile(lambda b: (b * 2).lower, backend="eager")
    assert torch.equal(read(conv(box)), 2 * lower)
    whole = torch.compile(lambda x: conv(x).lower, backend="eager", fullgraph=True)
    assert torch.equal(whole(box), lower)
