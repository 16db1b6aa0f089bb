"""pack: any torch model with the weights of its layers in 1 to 8 bits.

``torch.nn.Linear``, ``Conv1d``, ``Conv2d`` and ``Embedding`` become their packed twins, and so do
the ``Conv1D`` layers of Hugging Face, which are linear; everything else stays, ``Conv3d``,
transposed convolutions and recurrent layers among it. A weight that several layers share is packed
once and stays shared. A plain ``Sequential`` with several packed linear
layers becomes a :class:`~pyrobust.nn.PackedSequential`, which computes the same. What was packed,
what was left and why, is told by :func:`pyrobust.pack_report`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from pyrobust._checks import check_choice, check_instance, check_integer
from pyrobust._pack_plan import (
    BitsFor,
    LayerPlan,
    check_choosers,
    check_plans,
    identity,
    plan_layers,
)
from pyrobust._pack_report import LayerReport, PackReport, attach, pack_report
from pyrobust._pack_simulated import pack_simulated
from pyrobust.nn.packed_module import PackedModule
from pyrobust.nn.packed_sequential import join_packed_layers
from pyrobust.nn.rounded_input import behind
from pyrobust.nn.transposed_linear import as_linear
from pyrobust.nn.twins import TWINS, leave_fused_paths, replace_layers
from pyrobust.ops.formats import check_bits
from pyrobust.quantize import QTensor
from pyrobust.quantize.calibration_block import BlockQuantizer, Quantized
from pyrobust.quantize.names import QUANTIZERS, quantizer_named
from pyrobust.quantize.walker import quantize_blockwise

__all__ = ["QUANTIZERS", "LayerReport", "PackReport", "pack", "pack_report"]

Quantizer = Callable[..., QTensor]


class LayerQuantizer(Protocol):
    """What ``pack`` asks of an object that quantizes all layers in one call.

    One with an attribute ``resumable`` that is true is also given ``blocks``, ``resume`` and
    ``progress`` by keyword.
    """

    def quantize_layers(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        formats: Mapping[str, Mapping[str, Any]],
        calibration: Any,
    ) -> Mapping[str, Any]:
        """The packed weights by the names of the layers."""


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
    quantizer: Quantizer | BlockQuantizer | LayerQuantizer | str | None = None,
    calibration: Any = None,
    blocks: str | Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Convert the layers of ``model`` to packed ones.

    Layers of exactly the types ``torch.nn.Linear``, ``Conv1d``, ``Conv2d`` and ``Embedding`` are
    converted. All others keep their float weights: ``Conv3d``, transposed convolutions, recurrent
    layers, ``MultiheadAttention``, norms. :func:`pyrobust.pack_report` names each layer with a
    weight that was left, and why.

    Modules that simulated low bits while they trained (:class:`~pyrobust.quantize.QuantLinear` and
    others) become the packed modules that they simulated, whatever the options say; the options
    are for the other layers.

    The float weights of converted layers are never copied, but for those of one block while a
    quantizer works on it. On any error ``model`` is untouched.

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
        quantizer: a name in :data:`~pyrobust.quantize.QUANTIZERS`, ``"rtn"`` by default (``"nf4"``
            for that codebook, ``"two-level"`` for integer group scales under row scales), or one of

            - a function called as
              ``quantizer(weight, bits=..., group_size=..., group_dim=..., symmetric=...)`` with a
              ``(rows, columns)`` weight; the format of the :class:`~pyrobust.quantize.QTensor`
              that it returns counts;
            - an object with ``quantize_block``
              (:class:`~pyrobust.quantize.BlockQuantizer`): the model is walked block by block;
            - an object with ``quantize_layers(model, layers, formats, calibration)``, called once
              with layers and formats by name; it returns a mapping from names to ``QTensor`` or
              :class:`~pyrobust.quantize.Quantized`.
        calibration: batches of inputs for the two kinds of objects; functions accept none. A batch
            is a tensor, a mapping of keyword arguments, or a tuple whose first element is the
            input. Weights of ``Embedding`` have no inputs and are rounded to nearest.
        blocks: for a quantizer that takes calibration: the name of the module that holds the
            blocks, or their names in order; found by running one batch if None.
        resume: for a quantizer that takes calibration: a folder for finished blocks. A conversion
            that was killed goes on from there and ends in the same bits.

    Returns:
        The packed model, with its report (:func:`pyrobust.pack_report`).

    Raises:
        TypeError: ``model`` is not a module, or an option is of another type.
        ValueError: an option is out of range, a name in ``skip`` or ``bits_for`` fits no module, a
            weight holds NaN or infinite values, or such as float32 cannot hold, layers that share a
            weight ask for different bits, ``model`` is compiled or wrapped for data parallelism, or
            no layer can be packed; calibration data are missing, empty, not finite or do not fit
            the model, which must be in evaluation mode; a layer never runs on them; ``resume``
            holds another conversion.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> pack(model, bits=2, group_size=16)[0]
        PackedLinear(in_features=64, out_features=32, bias=True, bits=2, group_size=16)
    """
    check_instance("pack", "model", model, nn.Module)
    _check_options(bits, group_size, group_dim, symmetric, activations)
    quantize = _resolve(quantizer, calibration, blocks, resume)
    skipped = (skip,) if isinstance(skip, str) else tuple(skip)
    check_choosers(skipped, bits_for)
    with as_linear(model) as transposed:
        twins, trained_rows, settled = pack_simulated(model, skipped)
        plans, rows = plan_layers(model, bits, skipped, bits_for, settled)
        check_plans(model, plans, rows, inplace, settled)
        common = {"group_size": group_size, "group_dim": group_dim, "symmetric": symmetric}
        formats = {name: {"bits": plan.bits, **common} for name, plan in plans.items()}
        owners = _owners(plans)
        extra = {"blocks": blocks, "resume": resume, "progress": progress}
        quantized = _quantized(
            quantize, calibration, model, plans, formats, set(owners.values()), extra
        )

        ready: dict[str, Quantized] = {}
        for name, plan in tqdm(plans.items(), desc="pack", disable=not progress):
            owner = owners[identity(plan.weight)]
            if owner not in ready:
                ready[owner] = quantized(owner)
            twin = _twin(plan.layer, ready[owner], activations)
            twins[plan.layer] = behind(twin, ready[owner].activation if owner == name else None)
            rows[name] = _packed_row(name, plan, twin, owner, ready[owner])
        everything = (*trained_rows.values(), *rows.values())
        return _assemble(model, twins, everything, inplace, transposed)


# -- checks ------------------------------------------------------------------------------------


def _check_options(
    bits: float, group_size: int, group_dim: int, symmetric: bool, activations: str | None
) -> None:
    check_bits("pack", bits)
    check_integer("pack", "group_size", group_size, 1)
    check_choice("pack", "group_dim", group_dim, (0, 1))
    check_choice("pack", "symmetric", symmetric, (False, True))
    check_choice("pack", "activations", activations, (None, "int8"))


def _resolve(
    quantizer: Any, calibration: Any, blocks: str | Sequence[str] | None, resume: Any
) -> Any:
    if quantizer is None or isinstance(quantizer, str):
        quantizer = quantizer_named("pack", quantizer or "rtn")
    name = getattr(quantizer, "__name__", type(quantizer).__name__)
    blockwise = hasattr(quantizer, "quantize_block")
    if calibration is not None and not (blockwise or hasattr(quantizer, "quantize_layers")):
        raise ValueError(f"pack: calibration must be None; {name} uses no calibration data.")
    if calibration is None and blockwise:
        raise ValueError(f"pack: calibration must be batches of inputs for {name}; got None.")
    walks = blockwise or getattr(quantizer, "resumable", False)
    if not walks and not (blocks is None and resume is None):
        option = "resume" if blocks is None else "blocks"
        raise ValueError(f"pack: {option} must be None; {name} does not go block by block.")
    return quantizer


# -- packing -----------------------------------------------------------------------------------


def _owners(plans: dict[str, LayerPlan]) -> dict[Any, str]:
    """For each weight the first layer that holds it: shared weights are quantized once."""
    owners: dict[Any, str] = {}
    for name, plan in plans.items():
        owners.setdefault(identity(plan.weight), name)
    return owners


def _quantized(
    quantizer: Any,
    calibration: Any,
    model: nn.Module,
    plans: dict[str, LayerPlan],
    formats: dict[str, dict[str, Any]],
    owners: set[str],
    extra: dict[str, Any],
) -> Callable[[str], Quantized]:
    """The packed weight of a layer by its name."""
    if not plans:
        return dict[str, Quantized]().__getitem__
    if not hasattr(quantizer, "quantize_block") and not hasattr(quantizer, "quantize_layers"):

        def one(name: str) -> Quantized:
            return _result(quantizer(plans[name].weight.detach().flatten(1), **formats[name]))

        return one
    layers = {name: plan.layer for name, plan in plans.items() if name in owners}
    formats = {name: formats[name] for name in layers}
    ready: Mapping[str, Any]
    if hasattr(quantizer, "quantize_block"):
        ready = quantize_blockwise(model, layers, formats, calibration, quantizer, **extra)
    else:
        options = extra if getattr(quantizer, "resumable", False) else {}
        ready = quantizer.quantize_layers(model, layers, formats, calibration, **options)
    return lambda name: _result(ready[name])


def _result(value: Any) -> Quantized:
    if isinstance(value, Quantized):
        return value
    check_instance("pack", "the result of quantizer", value, QTensor)
    return Quantized(value)


def _twin(layer: nn.Module, result: Quantized, activations: str | None) -> PackedModule:
    """The packed twin of ``layer``, in the format of the result, on the device of ``layer``."""
    qtensor = result.qtensor
    twin = TWINS[type(layer)].like(
        layer,
        bits=qtensor.bits,
        group_size=qtensor.group_size,
        group_dim=qtensor.group_dim,
        symmetric=qtensor.zero is None,
        activations=activations,
    )
    bias = getattr(layer, "bias", None)
    twin.extend(qtensor.layout).adopt(
        qtensor, bias if result.bias is None else result.bias.to(bias)
    )
    weight = cast(Tensor, layer.weight)
    twin.weight_dtype = weight.dtype
    return twin.train(layer.training).to(weight.device)


def _packed_row(
    name: str, plan: LayerPlan, twin: PackedModule, owner: str, result: Quantized
) -> LayerReport:
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
        group_dim=twin.group_dim,
        output_error_nearest=result.error_nearest,
        output_error=result.error,
    )


def _assemble(
    model: nn.Module,
    twins: dict[nn.Module, nn.Module],
    rows: tuple[LayerReport, ...],
    inplace: bool,
    transposed: Mapping[nn.Module, nn.Module],
) -> nn.Module:
    before = _total_bytes(model)
    if inplace:
        result = model
        replace_layers(model, twins)
    else:  # told that the layers are copied already, deepcopy never touches their float weights
        left = {new: copy.deepcopy(old) for new, old in transposed.items() if new not in twins}
        ready = {id(layer): twin for layer, twin in {**left, **twins}.items()}
        result = copy.deepcopy(model, ready)
    leave_fused_paths(result)
    join_packed_layers(result)
    attach(result, PackReport(rows, before, _total_bytes(result)))
    return result


def _total_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each shared one counted once."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
    return sum({identity(t): t.numel() * t.element_size() for t in tensors}.values())
