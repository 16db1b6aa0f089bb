"""GPTQ against the published code's results, against plain rounding, and against the definition."""

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.quantize import (
    GPTQ,
    HessianAccumulator,
    gptq,
    gptq_weight,
    quantize_groupwise,
)

from .small_models import BlockNet, ConvNet


def exact_grid_case(rows, cols, n, group, bits):
    """Weights whose groups span a grid of step 2^(1-bits) exactly, and correlated inputs."""
    levels = 2**bits
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(cols, dtype=torch.float64)
    weight = (torch.sin(1.0 + 7.3 * i + 2.9 * j + i * j) - 1 / levels) * (1 - 1 / levels)
    weight[:, ::group] = -1.0
    weight[:, 1::group] = 1.0 - 2.0 / levels
    k = torch.arange(n, dtype=torch.float64)[:, None]
    x = torch.sin(0.37 * k * (j + 1) + j) + 0.5 * torch.sin(0.11 * k)
    return weight, x + 0.3 * torch.cos(0.05 * k * (j % 5))


# Codes that the authors' gptq.py (IST-DASLab/gptq, static groups, percdamp 0.01, in float64) gives.
PUBLISHED = [
    (
        (6, 32, 100, 8, 3),
        True,
        "07534426070707150742617007616344 07271551073606410736063207550722 "
        "07401662077512670737511507037511 07346777074321000724567707542100 "
        "07467664071135770720013507642101 07404730073057200711661207127502",
    ),
    (
        (5, 24, 100, 12, 2),
        True,
        "032122130303031212213030 031312303022032131220221 032113310232033310232002 "
        "031223333322030001122333 032333221101033322100112",
    ),
    (
        (4, 40, 200, 20, 4),
        False,
        "0fb5894c2f0f1e2b58940ff0f0e3b5894c1e0f1e 0f5e1ba1f36d0c82f28c0f73f19b1e55e1ba1f36 "
        "0fa13de507fa12ce607f0f1bf705ec21bf705ed3 0f69ceffec96420013580fffeda852001247acef",
    ),
]


@pytest.mark.parametrize(("case", "act_order", "codes"), PUBLISHED)
@pytest.mark.parametrize("block", [1, 16, 128])
def test_codes_equal_those_of_the_published_code(case, act_order, codes, block):
    weight, x = exact_grid_case(*case)
    packed = gptq_weight(
        weight,
        2 / len(x) * x.t() @ x,
        bits=case[4],
        group_size=case[3],
        act_order=act_order,
        block=block,
    )
    expected = torch.tensor([[int(digit, 16) for digit in row] for row in codes.split()])
    assert torch.equal(packed.unpack_codes().long(), expected)


def plain_obq(weight, hessian, quantize, order, damp=0.01):
    """The definition: fix one column, solve for the rest by least squares, and so on; float64."""
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    current, result = weight.clone(), torch.empty_like(weight)
    left = list(order)
    for i in order:
        result[:, i] = quantize(current[:, i], i)
        inverse = torch.linalg.inv(hessian[left][:, left])
        error = (current[:, i] - result[:, i]) / inverse[0, 0]
        current[:, left] -= error[:, None] * inverse[0]
        left.remove(i)
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("dim", ["oc", "ic"])
def test_equals_optimal_brain_quantization_in_that_order(act_order, block, dim):
    torch.manual_seed(1)
    weight = torch.randn(10, 23, dtype=torch.float64)
    x = torch.randn(60, 23, dtype=torch.float64) @ torch.randn(23, 23, dtype=torch.float64)
    hessian = 2 / 60 * x.t() @ x
    packed = gptq_weight(
        weight,
        hessian,
        bits=3,
        group_size=4,
        group_dim=1 if dim == "oc" else 0,
        act_order=act_order,
        block=block,
    )
    static = quantize_groupwise(weight, 3, 4)

    def quantize(column, i):
        if dim == "ic":
            return quantize_groupwise(column[:, None], 3, 4, "ic").dequantize(torch.float64)[:, 0]
        scale, zero = static.scale[:, i // 4].double(), static.zero[:, i // 4].double()
        return (((column / scale).round() + zero).clamp(0, 7) - zero) * scale

    order = range(23)
    if act_order:
        order = hessian.diagonal().argsort(descending=True).tolist()
    expected = plain_obq(weight, hessian, quantize, order)
    torch.testing.assert_close(packed.dequantize(torch.float64), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dim", ["oc", "ic"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_uncorrelated_inputs_it_is_rounding_to_nearest(dim, symmetric):
    linear = nn.Linear(40, 24)
    packed = gptq(linear, torch.eye(40), 3, 16, dim, symmetric=symmetric)
    plain = quantize_groupwise(linear.weight, 3, 16, dim, symmetric)
    assert torch.equal(packed.codes, plain.codes)
    assert torch.equal(packed.scale, plain.scale)
    assert (packed.zero is None) == symmetric


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", ["oc", "ic"])
def test_output_error_is_below_that_of_rounding_on_correlated_inputs(bits, dim):
    for seed in range(3):
        torch.manual_seed(seed)
        linear = nn.Linear(64, 48)
        x = torch.randn(400, 64) @ torch.randn(64, 64)
        accumulator = HessianAccumulator(64)
        for part in x.split(130):
            accumulator.add(part)
        errors = []
        for packed in (
            gptq(linear, accumulator.hessian(), bits, 16, dim),
            quantize_groupwise(linear.weight, bits, 16, dim),
        ):
            errors.append(float((x @ (packed.dequantize() - linear.weight.detach()).t()).norm()))
        assert errors[0] < 0.8 * errors[1]


def test_dead_inputs_get_weight_zero_and_disturb_nothing():
    torch.manual_seed(0)
    linear = nn.Linear(12, 8)
    x = torch.randn(50, 12)
    x[:, [3, 7]] = 0.0
    packed = gptq(linear, x.t() @ x, 4, 4).dequantize()
    assert not packed[:, [3, 7]].any()
    assert packed.isfinite().all()


def test_a_singular_hessian_is_damped_and_an_indefinite_one_refused():
    x = torch.randn(3, 32)
    assert gptq(nn.Linear(32, 4), x.t() @ x, 4, 8).dequantize().isfinite().all()
    with pytest.raises(ValueError, match="hessian must be positive semi-definite"):
        gptq(nn.Linear(2, 4), torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 4, 4)


def test_a_grouped_convolution_is_quantized_group_by_group():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2)
    x = torch.randn(20, 4, 9, 9)
    accumulator = HessianAccumulator.of(conv)
    accumulator.add_inputs(conv, x)
    assert accumulator.hessian().shape == (2, 18, 18)
    joint = gptq_weight(
        conv.weight.flatten(1), accumulator.hessian(), bits=3, group_size=9, act_order=False
    ).dequantize()
    for part in range(2):
        single = gptq_weight(
            conv.weight.flatten(1)[3 * part : 3 * part + 3],
            accumulator.hessian()[part],
            bits=3,
            group_size=9,
            act_order=False,
        )
        torch.testing.assert_close(joint[3 * part : 3 * part + 3], single.dequantize())


def test_hessian_of_a_convolution_gives_its_output_energy():
    torch.manual_seed(0)
    for conv in (
        nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2, bias=False),
        nn.Conv2d(3, 5, (2, 3), dilation=2, padding="same", padding_mode="reflect", bias=False),
        nn.Conv1d(4, 6, 5, groups=2, padding=1, stride=2, dilation=2, bias=False),
        nn.Conv1d(3, 5, 4, padding=2, padding_mode="circular", bias=False),
    ):
        size = (9, 8)[: conv.weight.ndim - 2]
        conv, x = conv.double(), torch.randn(7, conv.in_channels, *size).double()
        accumulator = HessianAccumulator.of(conv)
        for part in x.split(3):
            accumulator.add_inputs(conv, part)
        hessian = accumulator.hessian()
        hessian = hessian if hessian.ndim == 3 else hessian[None]
        weight = conv.weight.flatten(1).reshape(len(hessian), -1, hessian.shape[1])
        energy = torch.einsum("gri,gij,grj->", weight, hessian, weight) / 2
        output = conv(x)
        torch.testing.assert_close(energy, output.square().sum() / (output[:, 0].numel()))


def test_very_small_and_very_large_weights_keep_their_precision():
    for factor in (1e-6, 1e6):
        linear = nn.Linear(32, 16)
        linear.weight.data *= factor
        for dim in ("oc", "ic"):
            packed = gptq(linear, torch.eye(32), 8, 8, dim).dequantize()
            assert (packed - linear.weight).abs().max() < 0.005 * factor


@pytest.mark.parametrize("make", [BlockNet, ConvNet])
def test_pack_with_gptq_beats_rounding_in_every_layer_and_in_the_output(make):
    torch.manual_seed(0)
    model = make().eval()
    shape = (64, 1, 8, 8) if make is ConvNet else (256, 6)
    x = torch.randn(2, *shape)
    packed = pyrobust.pack(model, bits=3, group_size=16, quantizer="gptq", calibration=list(x))
    plain = pyrobust.pack(model, bits=3, group_size=16)
    rows = pyrobust.pack_report(packed).packed
    assert all(row.output_error <= row.output_error_nearest * 1.01 for row in rows)
    assert sum(row.bytes_after for row in rows) == sum(
        row.bytes_after for row in pyrobust.pack_report(plain).packed
    )
    with torch.no_grad():
        errors = [(each(x[0]) - model(x[0])).norm() for each in (packed, plain)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 5}, ValueError, "bits must be one of 2, 3, 4, 8; got 5"),
        ({"bits": 1}, ValueError, "bits must be one of 2, 3, 4, 8; got 1"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"dim": "row"}, ValueError, "dim must be one of oc, ic; got 'row'"),
        ({"damp": -1.0}, ValueError, "damp must be finite and at least 0"),
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"hessian": torch.eye(3)}, ValueError, r"hessian must have shape \(8, 8\)"),
        ({"hessian": torch.full((8, 8), torch.nan)}, ValueError, "hessian must be finite"),
        ({"hessian": torch.eye(8).expand(3, 8, 8)}, ValueError, "divides the 4 rows"),
        ({"linear": nn.Conv2d(1, 1, 1)}, TypeError, "linear must be a torch.nn.*Linear"),
    ],
)
def test_bad_input_gives_one_clear_error(change, error, message):
    options = {"linear": nn.Linear(8, 4), "hessian": torch.eye(8), "bits": 4, **change}
    with pytest.raises(error, match=message):
        gptq(**options)


@pytest.mark.parametrize("option", [{"damp": -1.0}, {"block": 0}, {"propagate": "both"}])
def test_bad_options_are_refused_at_once(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        GPTQ(**option)


def test_damping_grows_by_tens_until_the_hessian_can_be_inverted():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.linspace(-0.3, 2.0, 12, dtype=torch.float64)  # rounding left it indefinite
    hessian = (basis * spectrum) @ basis.T
    hessian = (hessian + hessian.T) / 2
    weight = torch.randn(5, 12, generator=generator)
    mean = float(hessian.diagonal().mean())
    # 0.01 and ten times as much more are too little against -0.3, a hundred times is enough.
    damped = hessian + 1.11 * mean * torch.eye(12, dtype=torch.float64)
    expected = gptq_weight(weight, damped, bits=3, group_size=4, damp=0.0)
    got = gptq_weight(weight, hessian, bits=3, group_size=4, damp=0.01)
    assert torch.equal(got.codes, expected.codes)
    with pytest.raises(ValueError, match="up to 1000 times as much"):
        gptq_weight(weight, -100 * hessian.abs(), bits=3, damp=0.01)


def test_scales_of_columns_that_turn_tiny_stay_in_the_precise_range_of_float16():
    """A column of zeros takes over a little of the errors before it, far below 2^-14."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 2, generator=generator)
    weight[:, 1] = 0
    hessian = torch.tensor([[1.0, 1e-3], [1e-3, 0.5]], dtype=torch.float64)
    packed = gptq_weight(weight, hessian, bits=4, group_size=8, group_dim=0, act_order=False)
    assert packed.scale.dtype == torch.float16
    assert float(packed.scale[0, 1]) == 2.0**-14
