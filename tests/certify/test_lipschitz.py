"""Upper bounds of Lipschitz constants: never below the truth, and close to it."""

import math

import pytest
import torch
from torch import nn

from pyrobust import pack
from pyrobust.certify import conv_norm_bound, lipschitz_bound
from pyrobust.nn import PackedConv1d, PackedConv2d, PackedLinear, PackedSequential


def jacobian_norm(layer, shape):
    """Spectral norm of the layer's exact matrix at a random point."""
    x = torch.randn(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v).flatten(), x)
    return float(torch.linalg.matrix_norm(jacobian.flatten(1), ord=2))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": 2, "dilation": 2},
        {"stride": 2, "padding": 1},
        {"groups": 2, "padding": 1},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_convolutions_against_their_matrix(options, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 6, 3, bias=False, **options).double().eval()
    exact, bound = jacobian_norm(layer, (4, 12, 12)), lipschitz_bound(layer)
    assert exact <= bound
    if layer.stride == (1, 1):  # a dilated kernel feels the borders of so small an image more
        assert bound <= (1.2 if layer.dilation == (1, 1) else 1.4) * exact


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 7), (5,)),
        (nn.Conv1d(3, 4, 5, padding=2), (3, 30)),
        (nn.Conv2d(2, 3, (1, 5), padding=(0, 2)), (2, 9, 16)),
        (nn.Conv2d(3, 2, 2, stride=2), (3, 12, 12)),
        (nn.Conv3d(2, 2, 3, padding=1), (2, 5, 5, 5)),
        (nn.AvgPool2d(2), (2, 8, 8)),
        (nn.AvgPool2d(3, 1, 1), (2, 12, 12)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 7, 7)),
        (nn.AvgPool1d(3, 2, ceil_mode=True), (1, 8)),
        (nn.MaxPool2d(2), (2, 8, 8)),
        (nn.MaxPool2d(3, 1), (2, 8, 8)),
        (nn.BatchNorm1d(4), (4,)),
        (nn.LeakyReLU(-3.0), (9,)),
        (nn.Tanh(), (9,)),
        (nn.Sigmoid(), (9,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_against_their_jacobian(layer, shape):
    if isinstance(layer, nn.BatchNorm1d):
        with torch.no_grad():
            layer.running_var.uniform_(0.1, 2)
            layer.weight.uniform_(-2, 2)
    layer = layer.double().eval()
    bound = lipschitz_bound(layer)
    assert all(jacobian_norm(layer, shape) <= bound * (1 + 1e-12) for _ in range(5))
    assert bound <= 4


def test_overlapping_maxima_can_double():
    """One input that is the maximum of four windows: the bound 1 would be wrong."""
    layer = nn.MaxPool2d(2, 1).double().eval()
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    x[0, 0, 1, 1] = 1
    assert float((layer(2 * x) - layer(x)).norm()) == 2.0 <= lipschitz_bound(layer)


@pytest.mark.parametrize("seed", range(20))
def test_chains_never_stretch_more(seed):
    torch.manual_seed(seed)
    chain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh()),
    )
    chain = chain.double().eval()
    bound = lipschitz_bound(chain)
    a, b = torch.randn(2, 50, 1, 8, 8, dtype=torch.float64)
    ratio = (chain(a) - chain(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    assert float(ratio.max()) <= bound


def test_a_constant_kernel_is_exact_up_to_the_grid():
    kernel = torch.ones(1, 1, 3, 3) / 9
    assert 1.0 <= conv_norm_bound(kernel) <= 1.12


def test_packed_layers():
    linear, conv = nn.Linear(16, 8).eval(), nn.Conv2d(4, 4, 3).eval()
    packed = PackedLinear.from_linear(linear, bits=4, group_size=8).eval()
    exact = float(torch.linalg.matrix_norm(packed.dequantize().double(), ord=2))
    assert lipschitz_bound(packed) == pytest.approx(exact, rel=1e-6)
    packed_conv = PackedConv2d.from_conv2d(conv, bits=8, group_size=9).eval()
    several = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    joined = pack(several, bits=8, group_size=8)
    assert type(joined) is PackedSequential
    layers = [lipschitz_bound(layer) for layer in joined]
    assert lipschitz_bound(joined) == pytest.approx(math.prod(layers))
    assert lipschitz_bound(packed_conv) == pytest.approx(lipschitz_bound(conv), rel=0.05)
    line = nn.Conv1d(4, 6, 5, padding=2).eval()
    packed_line = PackedConv1d.from_conv1d(line, bits=8, group_size=10).eval()
    assert lipschitz_bound(packed_line) == pytest.approx(lipschitz_bound(line), rel=0.05)
    rounding = PackedLinear.from_linear(linear, bits=4, group_size=8, activations="int8").eval()
    with pytest.raises(NotImplementedError, match="rounds its input"):
        lipschitz_bound(rounding)


def test_refusals():
    with pytest.raises(ValueError, match="evaluation mode"):
        lipschitz_bound(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="no rule for GELU"):
        lipschitz_bound(nn.Sequential(nn.Linear(2, 2), nn.GELU()).eval())
    with pytest.raises(NotImplementedError, match="padding_mode='reflect'"):
        lipschitz_bound(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect").eval())
    with pytest.raises(NotImplementedError, match="without running statistics"):
        lipschitz_bound(nn.BatchNorm1d(2, track_running_stats=False).eval())

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="no rule for Twice"):
        lipschitz_bound(Twice(2, 2).eval())


def test_what_a_call_may_change_is_refused():
    hooked = nn.Linear(2, 2).eval()
    hooked.register_forward_hook(lambda module, inputs, made: 100 * made)
    replaced = nn.Sequential(nn.ReLU()).eval()
    replaced.forward = lambda x: 100 * x
    for module in (hooked, nn.Sequential(hooked).eval(), replaced):
        with pytest.raises(NotImplementedError, match="has hooks or a forward of its own"):
            lipschitz_bound(module)


def test_pools_with_another_divisor_and_steep_softplus_are_refused():
    with pytest.raises(NotImplementedError, match="no rule for divisor_override=1"):
        lipschitz_bound(nn.AvgPool2d(2, divisor_override=1).eval())
    assert lipschitz_bound(nn.Softplus(beta=3.0).eval()) == 1.0
    with pytest.raises(NotImplementedError, match=r"threshold of at least 20; got 1 and 0\.1"):
        lipschitz_bound(nn.Softplus(threshold=0.1).eval())


def test_the_largest_gain_may_lie_between_the_frequencies_of_the_grid():
    place = 2 * math.pi * 8.05 / 64  # whose largest gain lies between points of a grid of 64
    kernel = torch.cos(place * torch.arange(9.0)).double()
    fine = torch.fft.fft(kernel, 64 * 256).abs()
    assert float(fine.max()) > 1.01 * float(fine[::256].max())
    assert conv_norm_bound(kernel.view(1, 1, 9)) >= float(fine.max())
