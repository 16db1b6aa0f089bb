"""pack: any torch model with the weights of its layers in 1 to 8 bits.

``torch.nn.Linear``, ``Conv2d`` and ``Embedding`` become their packed twins; everything else stays.
A weight that several layers share is packed once and stays shared. What was packed, what
was left and why, is told by :func:`pyrobust.pack_report`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from pyrobust._checks import check_choice, check_instance, check_integer
from pyrobust._pack_plan import BitsFor, LayerPlan, check_plans, identity, plan_layers
from pyrobust._pack_report import LayerReport, PackReport, attach, pack_report
from pyrobust.nn.packed_module import PackedModule
from pyrobust.nn.twins import TWINS, leave_fused_paths, replace_layers
from pyrobust.ops.formats import check_bits
from pyrobust.quantize import QTensor, round_to_nearest

__all__ = ["QUANTIZERS", "LayerReport", "PackReport", "pack", "pack_report"]

Quantizer = Callable[..., QTensor]
QUANTIZERS: dict[str, Quantizer] = {"rtn": round_to_nearest}
"""Names that ``quantizer`` accepts, for the command line and configuration files."""


def pack(
    model: nn.Module,
    *,
    bits: float = 4,
    group_size: int = 128,
    group_dim: int = 1,
    symmetric: bool = False,
    activations: str | None = None,
    skip: Iterable[str] = (),
    bits_for: BitsFor | None = None,
    inplace: bool = False,
    progress: bool = False,
    quantizer: Quantizer | str | None = None,
    calibration: Any = None,
) -> nn.Module:
    """Convert the layers of ``model`` to packed ones.

    The float weights of converted layers are never copied. On any error ``model`` is untouched.

    Args:
        model: any torch module, with weights on a real device.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``.
        group_dim: 1 groups along input features, 0 along output features.
        symmetric: no zero-points.
        activations: None, or ``"int8"`` to round the inputs of linear layers and convolutions.
        skip: names of modules, or patterns as in ``fnmatch``, to leave in float with all below.
        bits_for: the bits of single layers: a function of name and module, or a mapping from names
            or patterns (the first that fits counts; others get ``bits``). None leaves a layer in
            float.
        inplace: convert ``model`` itself instead of a copy.
        progress: show a progress bar.
        quantizer: ``"rtn"`` (the default) or a function called as
            ``quantizer(weight, bits=..., group_size=..., group_dim=..., symmetric=...)`` with a
            ``(rows, columns)`` weight; the format of the :class:`~pyrobust.quantize.QTensor` that
            it returns counts. An object with a method
            ``quantize_layers(model, layers, formats, calibration)`` is called once instead, with
            layers and formats by name, and returns a mapping from names to ``QTensor``.
        calibration: data for a quantizer with ``quantize_layers``; others accept none.

    Returns:
        The packed model, with its report (:func:`pyrobust.pack_report`).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an option is out of range, a name in ``skip`` or ``bits_for`` fits no module, a
            weight holds NaN or infinite values, layers that share a weight ask for different bits,
            or no layer can be packed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> pack(model, bits=2, group_size=16)[0]
        PackedLinear(in_features=64, out_features=32, bias=True, bits=2, group_size=16)
    """
    check_instance("pack", "model", model, nn.Module)
    _check_options(bits, group_size, group_dim, activations)
    quantize = _resolve(quantizer, calibration)
    plans, rows = plan_layers(
        model, bits, (skip,) if isinstance(skip, str) else tuple(skip), bits_for
    )
    check_plans(model, plans, rows, inplace)
    common = {"group_size": group_size, "group_dim": group_dim, "symmetric": symmetric}
    formats = {name: {"bits": plan.bits, **common} for name, plan in plans.items()}
    quantized = _quantized(quantize, calibration, model, plans, formats)

    owners: dict[Any, tuple[str, QTensor]] = {}
    twins: dict[nn.Module, PackedModule] = {}
    for name, plan in tqdm(plans.items(), desc="pack", disable=not progress):
        key = identity(plan.weight)
        if key not in owners:
            owners[key] = (name, quantized(name))
        owner, qtensor = owners[key]
        twins[plan.layer] = _twin(plan.layer, qtensor, activations)
        rows[name] = _packed_row(name, plan, twins[plan.layer], owner)
    return _assemble(model, twins, tuple(rows.values()), inplace)


# -- checks ------------------------------------------------------------------------------------


def _check_options(bits: float, group_size: int, group_dim: int, activations: str | None) -> None:
    check_bits("pack", bits)
    check_integer("pack", "group_size", group_size, 1)
    check_choice("pack", "group_dim", group_dim, (0, 1))
    check_choice("pack", "activations", activations, (None, "int8"))


def _resolve(quantizer: Quantizer | str | None, calibration: Any) -> Any:
    if quantizer is None:
        quantizer = "rtn"
    if isinstance(quantizer, str):
        check_choice("pack", "quantizer", quantizer, QUANTIZERS)
        quantizer = QUANTIZERS[quantizer]
    if calibration is not None and not hasattr(quantizer, "quantize_layers"):
        name = getattr(quantizer, "__name__", type(quantizer).__name__)
        raise ValueError(f"pack: calibration must be None; {name} uses no calibration data.")
    return quantizer


# -- packing -----------------------------------------------------------------------------------


def _quantized(
    quantizer: Any,
    calibration: Any,
    model: nn.Module,
    plans: dict[str, LayerPlan],
    formats: dict[str, dict[str, Any]],
) -> Callable[[str], QTensor]:
    """The packed weight of a layer by its name."""
    if hasattr(quantizer, "quantize_layers"):
        layers = {name: plan.layer for name, plan in plans.items()}
        ready: Mapping[str, QTensor] = quantizer.quantize_layers(
            model, layers, formats, calibration
        )
        return ready.__getitem__

    def one(name: str) -> QTensor:
        qtensor: QTensor = quantizer(plans[name].weight.detach().flatten(1), **formats[name])
        return qtensor

    return one


def _twin(layer: nn.Module, qtensor: QTensor, activations: str | None) -> PackedModule:
    """The packed twin of ``layer``, in the format of ``qtensor``, on the device of ``layer``."""
    check_instance("pack", "the result of quantizer", qtensor, QTensor)
    twin = TWINS[type(layer)].like(
        layer,
        bits=qtensor.bits,
        group_size=qtensor.group_size,
        group_dim=qtensor.group_dim,
        symmetric=qtensor.zero is None,
        activations=activations,
    )
    twin.adopt(qtensor, getattr(layer, "bias", None))
    return twin.train(layer.training).to(cast(Tensor, layer.weight).device)


def _packed_row(name: str, plan: LayerPlan, twin: PackedModule, owner: str) -> LayerReport:
    weight = plan.weight.detach()
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    change = weight - twin.dequantize().to(weight.device)
    error = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    return LayerReport(
        name=name,
        type=type(plan.layer).__name__,
        skipped=None,
        bits=twin.bits,
        bytes_before=weight.numel() * weight.element_size() if owner == name else 0,
        bytes_after=twin.nbytes_packed if owner == name else 0,
        error=error / norm if norm else 0.0,
        shared_with=None if owner == name else owner,
    )


def _assemble(
    model: nn.Module,
    twins: dict[nn.Module, PackedModule],
    rows: tuple[LayerReport, ...],
    inplace: bool,
) -> nn.Module:
    before = _total_bytes(model)
    if inplace:
        result = model
        replace_layers(model, twins)
    else:  # told that the layers are copied already, deepcopy never touches their float weights
        result = copy.deepcopy(model, {id(layer): twin for layer, twin in twins.items()})
    leave_fused_paths(result)
    attach(result, PackReport(rows, before, _total_bytes(result)))
    return result


def _total_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each shared one counted once."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
    return sum({identity(t): t.numel() * t.element_size() for t in tensors}.values())
