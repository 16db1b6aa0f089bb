"""iFairy: the product, straight-through training, the schedule, and what small models show."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.nn import ComplexReLUSquared, ComplexRMSNorm
from pyrobust.quantize import (
    ComplexLinear,
    PhaseQuantizeSTE,
    TwoStageSchedule,
    dequantize,
    fake_quantize_activation,
    phase_quantize,
)

from .docstring_text import docstring_bytes


def complex_weight(parts):
    return torch.complex(*parts)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 7, 5), (0, 5)])
def test_the_layer_multiplies_the_conjugate_of_its_input(shape):
    layer = ComplexLinear(5, 4, weight_bits=None, act_bits=None)
    x = torch.randn(*shape, dtype=torch.complex64)
    weight = complex_weight((layer.weight_real, layer.weight_imag))
    real, imag = layer(x.real, x.imag)
    torch.testing.assert_close(torch.complex(real, imag), x.conj() @ weight.T, rtol=0, atol=4e-6)
    half = ComplexLinear(5, 4, weight_bits=None, act_bits=None, output="real")
    half.load_state_dict(layer.state_dict())
    torch.testing.assert_close(half(x.real, x.imag), real, rtol=0, atol=1e-6)


def test_the_table_of_the_four_weights():
    a, b = torch.randn(2, 3, 1)
    expected = {0: (a, -b), 1: (b, a), 2: (-a, b), 3: (-b, -a)}
    layer = ComplexLinear(1, 1, act_bits=None)
    for code, unit in enumerate([1, 1j, -1, -1j]):
        with torch.no_grad():
            layer.weight_real.fill_(complex(unit).real)
            layer.weight_imag.fill_(complex(unit).imag)
        real, imag = layer(a, b)
        assert torch.equal(real, expected[code][0])
        assert torch.equal(imag, expected[code][1])


def test_the_quantized_layer_is_the_product_of_rounded_parts():
    layer = ComplexLinear(37, 11)
    a, b = torch.randn(2, 6, 37)
    weight = complex_weight(dequantize(phase_quantize(layer.weight_real, layer.weight_imag)))
    x = torch.complex(fake_quantize_activation(a), fake_quantize_activation(b))
    real, imag = layer(a, b)
    expected = x.to(torch.complex128).conj() @ weight.to(torch.complex128).T
    torch.testing.assert_close(torch.complex(real, imag).to(torch.complex128), expected,
                               rtol=0, atol=4e-6)  # fmt: skip


def test_gradients_reach_latents_and_inputs_as_if_nothing_was_rounded():
    layer = ComplexLinear(9, 5)
    a, b = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    targets = torch.randn(2, 4, 5)
    real, imag = layer(a, b)
    (real * targets[0] + imag * targets[1]).sum().backward()
    u, v = (part.requires_grad_() for part in dequantize(
        phase_quantize(layer.weight_real, layer.weight_imag)))  # fmt: skip
    p, q = (fake_quantize_activation(x.detach()).requires_grad_() for x in (a, b))
    loss = ((p @ u.T + q @ v.T) * targets[0] + (p @ v.T - q @ u.T) * targets[1]).sum()
    expected = torch.autograd.grad(loss, (u, v, p, q))
    for tensor, grad in zip((layer.weight_real, layer.weight_imag, a, b), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-5, atol=1e-5)


def test_the_quantizer_alone_passes_gradients_exactly():
    real, imag = (torch.randn(6, 7, requires_grad=True) for _ in range(2))
    u, v = PhaseQuantizeSTE.apply(real, imag)
    expected = dequantize(phase_quantize(real, imag))
    assert torch.equal(u, expected[0])
    assert torch.equal(v, expected[1])
    weights = torch.randn(2, 6, 7)
    (u * weights[0] + v.square() * weights[1]).sum().backward()
    assert torch.equal(real.grad, weights[0])
    assert torch.equal(imag.grad, 2 * v.detach() * weights[1])


def test_schedule_values():
    schedule = TwoStageSchedule(1000, warmup=100)
    assert schedule.lr_factor(0) == 0
    assert schedule.lr_factor(50) == 0.5
    assert schedule.lr_factor(100) == 1
    assert schedule.lr_factor(499) == 1 - 399 / 1000
    assert schedule.lr_factor(500) == 2 / 3 * 0.5
    assert schedule.lr_factor(1000) == 0
    assert [schedule.decay_factor(t) for t in (0, 499, 500, 1000)] == [1, 1, 0, 0]
    assert TwoStageSchedule(10).lr_factor(0) == 1
    kept = TwoStageSchedule(10, second_scale=0.5, decay_weights_until=1.0)
    assert kept.lr_factor(5) == 0.25
    assert kept.decay_factor(9) == 1


def test_schedule_sets_an_optimizer_and_resumes():
    weight = nn.Parameter(torch.ones(2))
    schedule = TwoStageSchedule(100, warmup=10)

    def optimizer():
        groups = [{"params": [weight], "lr": 0.1, "weight_decay": 0.2}]
        return torch.optim.AdamW(groups)

    first = optimizer()
    schedule.apply_(first, 5)
    assert first.param_groups[0]["lr"] == pytest.approx(0.05)
    second = optimizer()
    second.load_state_dict(first.state_dict())
    for step, lr, decay in [(10, 0.1, 0.2), (50, 0.1 / 3, 0.0), (75, 0.1 / 6, 0.0)]:
        schedule.apply_(second, step)
        assert second.param_groups[0]["lr"] == pytest.approx(lr)
        assert second.param_groups[0]["weight_decay"] == pytest.approx(decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer(), schedule.lr_factor)
    assert scheduler.get_last_lr() == [0.0]


def test_refusals():
    with pytest.raises(ValueError, match="weight_bits must be one of 2, None; got 4"):
        ComplexLinear(3, 2, weight_bits=4)
    with pytest.raises(ValueError, match="act_bits must be one of 8, None; got 4"):
        ComplexLinear(3, 2, act_bits=4)
    with pytest.raises(ValueError, match="output must be one of complex, real"):
        ComplexLinear(3, 2, output="imag")
    layer, x = ComplexLinear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="one shape"):
        layer(x, x[:2])
    with pytest.raises(TypeError, match="one dtype"):
        layer(x, x.double())
    with pytest.raises(TypeError, match=r"pass x\.real and x\.imag"):
        layer(torch.complex(x, x), x)
    with pytest.raises(ValueError, match="in_features = 3"):
        layer(x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match="warmup must be at most half"):
        TwoStageSchedule(10, warmup=6)
    with pytest.raises(ValueError, match="total_steps must be at least 2"):
        TwoStageSchedule(1)


# -- what small models show ----------------------------------------------------------------------

CONTEXT, PART, WIDE, NARROW = 16, 16, 192, 160


def _sign(weight):
    """One bit a weight and one scale, straight through."""
    return weight + (weight.sign() * weight.abs().mean() - weight).detach()


def _ternary(weight):
    """BitNet's rounding: mean magnitude as the scale, straight through."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return weight + ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()


class RealLinear(nn.Linear):
    def __init__(self, width_in, width_out, rounded):
        super().__init__(width_in, width_out, bias=False)
        self.rounded = rounded

    def forward(self, x):
        if self.rounded is None:
            return F.linear(x, self.weight)
        return F.linear(fake_quantize_activation(x), self.rounded(self.weight))


class RealModel(nn.Module):
    """16 characters -> the next one."""

    def __init__(self, rounded):
        super().__init__()
        self.table = nn.Embedding(128, PART)
        self.first = RealLinear(CONTEXT * PART, WIDE, rounded)
        self.second = RealLinear(WIDE, NARROW, rounded)
        self.norms = nn.ModuleList(nn.RMSNorm(n) for n in (CONTEXT * PART, WIDE, NARROW))
        self.head = nn.Linear(NARROW, 128)

    def forward(self, tokens):
        x = self.norms[0](self.table(tokens).flatten(1))
        x = self.norms[1](self.first(x).relu().square())
        return self.head(self.norms[2](self.second(x).relu().square()))


class ComplexModel(nn.Module):
    """The same with complex numbers: as many hidden weights, each complex."""

    def __init__(self, weight_bits):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(128, PART) for _ in range(2))
        act_bits = None if weight_bits is None else 8
        options = {"weight_bits": weight_bits, "act_bits": act_bits}
        self.first = ComplexLinear(CONTEXT * PART, WIDE, **options)
        self.second = ComplexLinear(WIDE, NARROW, **options)
        self.norms = nn.ModuleList(ComplexRMSNorm(n) for n in (CONTEXT * PART, WIDE, NARROW))
        self.activation = ComplexReLUSquared()
        self.head = nn.Linear(2 * NARROW, 128)

    def forward(self, tokens):
        pair = self.norms[0](*(table(tokens).flatten(1) for table in self.tables))
        pair = self.norms[1](*self.activation(*self.first(*pair)))
        pair = self.norms[2](*self.activation(*self.second(*pair)))
        return self.head(torch.cat(pair, -1))


def train_and_measure(model, text, steps=1500, batch=128):
    """Nats a character on the last tenth."""
    cut = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    schedule = TwoStageSchedule(steps, warmup=steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        schedule.apply_(optimizer, step)
        starts = torch.randint(0, cut - CONTEXT, (batch,), generator=generator)
        rows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]), rows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    held_out = text[cut:].unfold(0, CONTEXT + 1, 3)
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(held_out[:, :-1]), held_out[:, -1]))


@pytest.mark.slow
def test_complex_weights_raise_the_ceiling_and_two_bits_stay_close_to_ternary():
    text = docstring_bytes()
    makers = {
        "real": lambda: RealModel(None),
        "complex": lambda: ComplexModel(None),
        "ternary": lambda: RealModel(_ternary),
        "two bits": lambda: ComplexModel(2),
        "sign": lambda: RealModel(_sign),
    }
    nats = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        nats[name] = train_and_measure(make(), text)
    print({name: round(value, 3) for name, value in nats.items()})
    assert all(math.isfinite(value) for value in nats.values())
    assert nats["complex"] <= nats["real"] - 0.02
    assert nats["two bits"] <= nats["ternary"] + 0.12
    assert nats["two bits"] < nats["sign"]
