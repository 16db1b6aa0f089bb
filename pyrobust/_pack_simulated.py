"""How ``pyrobust.pack`` takes over modules that simulated low bits while they trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from pyrobust._checks import check_finite
from pyrobust._pack_plan import fits
from pyrobust._pack_report import LayerReport
from pyrobust.quantize.lsq import LSQQuantizer
from pyrobust.quantize.simulated_weight import SimulatedWeight, simulated_modules

__all__ = ["pack_simulated"]


def pack_simulated(
    model: nn.Module, skip: tuple[str, ...]
) -> tuple[dict[nn.Module, nn.Module], dict[str, LayerReport], set[nn.Module]]:
    """Packed forms by module, a row per weight, and all modules that need no other packing.

    Modules named in ``skip`` go on simulating.
    """
    twins: dict[nn.Module, nn.Module] = {}
    rows: dict[str, LayerReport] = {}
    settled: set[nn.Module] = set()
    for name, module in simulated_modules(model).items():
        assert isinstance(module, nn.Module)
        settled.update(module.modules())
        if any(fits(name, pattern) for pattern in skip):
            continue
        for parameter_name, parameter in module.named_parameters():
            check_finite("pack", f"'{name}.{parameter_name}'", parameter)
        for part, weight in module.simulated_weights().items():
            full = ".".join(filter(None, (name, part)))
            rows[full] = _row(full, type(module).__name__, weight)
        twins[module] = module.to_packed()
        _warn_of_unset_scales(name, module)
    return twins, rows, settled


def _warn_of_unset_scales(name: str, module: nn.Module) -> None:
    unset = [n for n, m in module.named_modules() if isinstance(m, LSQQuantizer) and not m.is_set]
    if unset:
        place = ".".join(part for part in (name, unset[0]) if part)
        warnings.warn(
            f"pack: '{place}' has no scale yet; the first batch that the packed model is given "
            "sets it (run the model on one batch first, or load a file into the packed one).",
            stacklevel=4,
        )


def _row(name: str, kind: str, simulated: SimulatedWeight) -> LayerReport:
    weight = simulated.weight.detach().flatten(1)
    wide = torch.complex128 if weight.is_complex() else torch.float64
    norm = float(torch.linalg.vector_norm(weight, dtype=wide))
    change: Any = weight - simulated.qtensor.dequantize().to(weight.device)
    error = float(torch.linalg.vector_norm(change, dtype=wide))
    return LayerReport(
        name=name,
        type=kind,
        skipped=None,
        bits=simulated.qtensor.bits,
        bytes_before=simulated.bytes_before,
        bytes_after=simulated.qtensor.nbytes,
        error=error / norm if norm else 0.0,
    )
