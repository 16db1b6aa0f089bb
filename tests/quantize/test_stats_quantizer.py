import pytest
import torch
from torch import nn

from pyrobust.ops import pack_codes, unpack_codes
from pyrobust.quantize import StatsQuantizer

ALL_BITS = range(1, 9)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(rows=9, cols=37, seed=0, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_smallest_case_by_hand():
    w = torch.tensor([[-1.0, 0.1, 0.4, 0.5]])  # mean magnitude 0.5, scale 1, levels +-1/4, +-3/4
    assert StatsQuantizer(2)(w).tolist() == [[-0.75, 0.25, 0.25, 0.25]]
    assert StatsQuantizer(2).codes(w).tolist() == [[0, 2, 2, 2]]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_stay_in_range_and_no_level_is_zero(bits):
    w, n = weight() * 3, 2 ** (bits - 1)
    quantizer = StatsQuantizer(bits)
    scale = quantizer.scale(w)
    assert torch.equal(scale, 2 * w.abs().mean(1, keepdim=True))
    steps = quantizer.codes(w).double() - n
    assert steps.min() >= -n
    assert steps.max() <= n - 1
    q = quantizer(w)
    assert (q != 0).all()
    assert torch.allclose(q.double(), scale.double() * (steps + 0.5) / n, rtol=1e-6, atol=0)
    nearest = (w.double() / scale.double()).clamp(-1, 1)
    assert ((q.double() / scale.double() - nearest).abs() <= 0.5 / n + 2e-6).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_levels_of_q_with_the_same_scale_return_q(bits):
    quantizer, w = StatsQuantizer(bits), weight()
    scale = quantizer.scale(w)
    codes = quantizer.codes(w, scale)
    assert torch.equal(quantizer.codes(quantizer(w), scale), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_gradient_passes_unchanged_beyond_the_clip_and_none_reaches_the_scale(bits):
    w = (5 * weight()).requires_grad_()
    upstream = weight(seed=1)
    q = StatsQuantizer(bits)(w)
    (q * upstream).sum().backward()
    assert torch.equal(w.grad, upstream)


@pytest.mark.parametrize("factor", [2.0**-20, 0.3, 1.7, 1e4])
def test_scaling_the_weight_scales_the_result(factor):
    w = weight()
    scaled = StatsQuantizer(3)(factor * w)
    assert torch.allclose(scaled, factor * StatsQuantizer(3)(w), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_packed_codes_give_the_levels_back_to_the_bit(bits):
    quantizer, w, n = StatsQuantizer(bits), weight(), 2 ** (bits - 1)
    width = bits if bits in (1, 2, 3, 4, 8) else 8
    packed = pack_codes(quantizer.codes(w), bits=width)
    codes = unpack_codes(packed, in_features=w.shape[1], bits=width)
    assert torch.equal(quantizer.scale(w) * ((codes.float() - n + 0.5) / n), quantizer(w))


@pytest.mark.parametrize("bits", range(1, 8))
def test_qtensor_is_the_storable_form_to_the_bit(bits):
    quantizer, w = StatsQuantizer(bits), weight()
    qtensor = quantizer.qtensor(w)
    assert torch.equal(qtensor.dequantize(), quantizer(w, storable=True))
    assert torch.allclose(qtensor.dequantize(), quantizer(w), rtol=2**-14, atol=0)
    assert qtensor.bits == (bits if bits <= 4 else 8)


@pytest.mark.parametrize("shape", [(9, 37), (6, 3, 2, 5)])
def test_eight_bits_are_stored_beside_the_integers_to_the_bit(shape):
    quantizer, w = StatsQuantizer(8), randn(*shape, seed=4)
    stored = quantizer.stored(w)
    assert torch.equal(stored.dequantize(), quantizer(w, storable=True).flatten(1))
    rows, columns = shape[0], w[0].numel()
    assert stored.bits == stored.integers.bits == 8
    assert stored.nbytes == rows * (columns + w[0, 0].numel() + 4)
    assert len(stored.dequantize()[0].unique()) > 20
    with pytest.raises(ValueError, match=r"bits must be 1 to 7.*HalfStepTensor"):
        quantizer.qtensor(w)


def test_one_bit_never_leaves_its_two_levels():
    w = torch.tensor([[-1.0, -0.01, 0.01, 0.2]])
    assert StatsQuantizer(1).codes(w).tolist() == [[0, 0, 1, 1]]
    assert len(StatsQuantizer(1)(w).unique()) == 2


def test_heads_share_the_scale_of_a_row_and_convolutions_have_one_per_output():
    heads = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        StatsQuantizer(4, dim=1).scale(heads), 2 * heads.abs().mean((0, 2), keepdim=True)
    )
    conv = nn.Conv2d(3, 4, 2).weight
    assert StatsQuantizer(4).scale(conv).shape == (4, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_masters_are_rounded_in_float32(dtype):
    w = weight(dtype=dtype).requires_grad_()
    q = StatsQuantizer(2)(w)
    assert q.dtype == torch.float32
    assert torch.equal(q, StatsQuantizer(2)(w.detach().float()))
    q.sum().backward()
    assert w.grad.dtype == dtype


def test_rows_of_zeros_give_zeros_with_a_warning():
    w = weight()
    w[3] = 0
    with pytest.warns(UserWarning, match="1 of 9 scales are zero"):
        q = StatsQuantizer(2)(w)
    assert (q[3] == 0).all()
    assert (q[2] != 0).all()
    with pytest.warns(UserWarning, match="are zero"):
        assert torch.equal(
            StatsQuantizer(2).qtensor(w).dequantize(), StatsQuantizer(2)(w, storable=True)
        )


def test_boundary_strip_grows_with_its_width():
    w = weight(40, 100)
    for bits in (1, 2, 4):
        quantizer = StatsQuantizer(bits)
        counts = [int(quantizer.near_boundary(w, b).sum()) for b in (0, 0.003, 0.01, 0.1, 0.5)]
        assert counts == sorted(counts)
        assert counts[0] == 0
        n, u = 2 ** (bits - 1), quantizer.position(w)
        interior = (u >= -n) & (u <= n - 1)
        assert torch.equal(quantizer.near_boundary(w, 0.5), interior)
        borders = torch.arange(-n, n - 1) + 0.5
        near = ((u[..., None] - borders).abs() <= 0.01).any(-1)
        assert torch.equal(quantizer.near_boundary(w, 0.01), near)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0,), ValueError, "bits must be at least 1; got 0"),
        ((9,), ValueError, "bits must be at most 8; got 9"),
        ((2.0,), TypeError, "bits must be an integer"),
        ((2, -1), ValueError, "dim must be at least 0"),
    ],
)
def test_bad_options_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        StatsQuantizer(*arguments)


def test_bad_weights_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        StatsQuantizer(2)(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="dim must be below"):
        StatsQuantizer(2, dim=2)(weight())
    with pytest.raises(ValueError, match="must be finite"):
        StatsQuantizer(2).qtensor(torch.full((2, 2), torch.nan))


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    quantizer, w = StatsQuantizer(3), weight()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w), quantizer(w))
