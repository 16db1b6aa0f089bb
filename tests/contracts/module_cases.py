"""The table of modules that the battery of test_modules.py runs: one row per module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyrobust import nn as rnn
from pyrobust.quantize import QTensor, quantize_with_outliers


@dataclass(frozen=True)
class ModuleCase:
    """One module of the battery.

    Attributes:
        make: builds the module in evaluation mode, the same one on each call.
        batch: a batch of the given size, float32 (or integers).
        bad: inputs that must be refused, with the error and a part of its sentence.
        other: builds a module of another format, whose state must be refused; or None.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]
    bad: tuple[tuple[Callable[[], Tensor], type[Exception], str], ...]
    other: Callable[[], nn.Module] | None = None

    @property
    def takes_floats(self) -> bool:
        return self.batch(1).is_floating_point()


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return make().eval()

    return build


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))


def _linear(**options: object) -> ModuleCase:
    return ModuleCase(
        make=_seeded(lambda: rnn.PackedLinear(21, 11, group_size=8, **options)),
        batch=_floats(21),
        bad=(
            (lambda: torch.zeros(2, 20), ValueError, "in_features = 21"),
            (lambda: torch.zeros(2, 21, dtype=torch.int64), TypeError, "x must be"),
            (lambda: torch.zeros(2, 21, dtype=torch.float8_e5m2), TypeError, "float8_e5m2"),
        ),
        other=lambda: rnn.PackedLinear(21, 11, group_size=8, **{**options, "bits": 2}),
    )


def _extended() -> ModuleCase:
    """A codebook, two-level scales and a remainder in one weight."""

    def make() -> nn.Module:
        weight = torch.randn(11, 21)
        levels = torch.randint(0, 16, (11, 21), dtype=torch.uint8)
        codebook = torch.arange(0, 256, 16, dtype=torch.uint8)
        scale = torch.randint(0, 4, (11, 3), dtype=torch.uint8)
        packed = QTensor.from_codes(
            levels, scale, bits=4, group_size=8, row_scale=torch.rand(11), codebook=codebook
        )
        return rnn.PackedLinear.from_qtensor(packed.with_remainder(weight, weight.abs() > 1.5))

    return replace(_linear(), make=_seeded(make))


def _conv(**options: object) -> ModuleCase:
    options = {"bits": 4, **options}
    return ModuleCase(
        make=_seeded(lambda: rnn.PackedConv2d(4, 6, 3, group_size=8, **options)),
        batch=_floats(4, 7, 6),
        bad=(
            (lambda: torch.zeros(2, 3, 7, 6), ValueError, r"\(B, 4, H, W\)"),
            (lambda: torch.zeros(2, 4, 2), ValueError, "window|shape"),
            (lambda: torch.zeros(2, 4, 7, 6, dtype=torch.int64), TypeError, "floating-point"),
        ),
        other=lambda: rnn.PackedConv2d(4, 6, 3, group_size=9, **options),
    )


def _line(**options: object) -> ModuleCase:
    options = {"bits": 4, **options}
    return ModuleCase(
        make=_seeded(lambda: rnn.PackedConv1d(4, 6, 3, group_size=8, **options)),
        batch=_floats(4, 11),
        bad=(
            (lambda: torch.zeros(2, 3, 11), ValueError, r"\(B, 4, L\)"),
            (lambda: torch.zeros(3, 11), ValueError, "shape"),
            (lambda: torch.zeros(2, 4, 11, dtype=torch.int64), TypeError, "floating-point"),
        ),
        other=lambda: rnn.PackedConv1d(4, 6, 3, group_size=9, **options),
    )


def _embedding(**options: object) -> ModuleCase:
    return ModuleCase(
        make=_seeded(lambda: rnn.PackedEmbedding(13, 10, group_size=4, **options)),
        batch=lambda size: torch.arange(5 * size).reshape(size, 5) % 13,
        bad=(
            (lambda: torch.tensor([13]), IndexError, r"\[0, 13\)"),
            (lambda: torch.tensor([-1]), IndexError, r"\[0, 13\)"),
            (lambda: torch.tensor([1.0]), TypeError, "int32 or int64"),
        ),
        other=lambda: rnn.PackedEmbedding(13, 10, group_size=4, **{**options, "bits": 1}),
    )


def _dense_sparse(**options: object) -> ModuleCase:
    def make(**change: object) -> nn.Module:
        weight = torch.randn(11, 21, generator=torch.Generator().manual_seed(0))
        mask = weight.abs() > 1.5
        mask[:, 4] = True
        form = {"group_size": 8, **options, **change}
        packed = quantize_with_outliers(weight, mask, **form)
        return rnn.DenseSparseLinear.from_qtensor(packed, torch.linspace(-1, 1, 11)).eval()

    return ModuleCase(make, _linear().batch, _linear().bad, lambda: make(bits=2))


CASES: dict[str, ModuleCase] = {
    "PackedLinear": _linear(),
    "PackedLinear-symmetric-3-per-input": _linear(bits=3, symmetric=True, group_dim=0),
    "PackedLinear-ternary-int8": _linear(bits=1.58, activations="int8", bias=False),
    "PackedLinear-all-parts": _extended(),
    "PackedConv2d": _conv(padding=1),
    "PackedConv2d-groups-reflect": _conv(groups=2, padding=1, padding_mode="reflect", group_dim=0),
    "PackedConv2d-same-int8": _conv(padding="same", dilation=2, activations="int8", bias=False),
    "PackedConv1d": _line(padding=1, stride=2),
    "PackedConv1d-groups-reflect": _line(groups=2, padding=2, padding_mode="reflect", group_dim=0),
    "PackedConv1d-same-int8": _line(padding="same", dilation=2, activations="int8", bias=False),
    "DenseSparseLinear": _dense_sparse(),
    "DenseSparseLinear-symmetric-second-level": _dense_sparse(
        symmetric=True, second_level=True, bits=3
    ),
    "PackedEmbedding": _embedding(padding_idx=2),
    "PackedEmbedding-per-input": _embedding(bits=2, group_dim=0),
}
