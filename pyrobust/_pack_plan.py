"""Which layers of a model ``pyrobust.pack`` converts, at which width, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyrobust._checks import check_finite
from pyrobust._pack_report import LayerReport
from pyrobust.nn.packed_module import PackedModule
from pyrobust.nn.twins import TWINS
from pyrobust.ops.formats import check_bits

__all__ = [
    "BitsFor",
    "LayerPlan",
    "check_choosers",
    "check_plans",
    "fits",
    "identity",
    "plan_layers",
]

# By name: importing torch.distributed takes long, and builds without it exist.
_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel")

BitsFor = Callable[[str, nn.Module], "float | None"] | Mapping[str, "float | None"]


@dataclass(frozen=True)
class LayerPlan:
    """A layer that will be packed."""

    layer: nn.Module
    bits: float

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.layer.weight)


def plan_layers(
    model: nn.Module,
    bits: float,
    skip: tuple[str, ...],
    bits_for: BitsFor | None,
    settled: Collection[nn.Module] = (),
) -> tuple[dict[str, LayerPlan], dict[str, LayerReport]]:
    """The layers to pack by their first names, and a row for every layer with a weight.

    Modules in ``settled`` are passed over.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    everything = [name for each in names.values() for name in each]
    _check_patterns("skip", skip, everything)
    if isinstance(bits_for, Mapping):
        _check_patterns("bits_for", tuple(bits_for), everything)
    plans: dict[str, LayerPlan] = {}
    rows: dict[str, LayerReport] = {}
    for module, own in names.items():
        _check_unwrapped(own[0], module)
        size = None if module in settled else _weight_bytes(module)
        if size is None:
            continue
        reason = _why_not(module, own, skip)
        width = bits
        if reason is None and bits_for is not None:
            chosen = _bits_of(own, module, bits, bits_for)
            reason = "bits_for gives None" if chosen is None else None
            width = bits if chosen is None else chosen
        rows[own[0]] = LayerReport(own[0], type(module).__name__, reason, None, size, size, None)
        if reason is None:
            plans[own[0]] = LayerPlan(module, width)
    return plans, rows


def check_choosers(skip: tuple[Any, ...], bits_for: Any) -> None:
    """Raise TypeError unless both options that choose layers are of a type they can have."""
    for pattern in skip:
        if not isinstance(pattern, str):
            raise TypeError(
                f"pack: skip must hold names or patterns; got {type(pattern).__name__} {pattern!r}."
            )
    if not (bits_for is None or callable(bits_for) or isinstance(bits_for, Mapping)):
        raise TypeError(
            "pack: bits_for must be a function of name and module, or a mapping from names to "
            f"bits; got {type(bits_for).__name__}."
        )


def _check_patterns(option: str, patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ValueError(f"pack: {option} must name modules of the model; got {pattern!r}.")


def _check_unwrapped(name: str, module: nn.Module) -> None:
    """Refuse wrappers that keep the weights elsewhere, or reckon with those they were made for."""
    if "_orig_mod" in module._modules or isinstance(module, torch.jit.ScriptModule):
        where = f"its module '{name}' is" if name else "it is"
        raise ValueError(
            f"pack: model must not be compiled or scripted, but {where}; pack first, then compile."
        )
    if type(module).__name__ in _PARALLEL:
        raise ValueError(
            f"pack: model must not be wrapped in {type(module).__name__}; pack the module inside, "
            "then wrap."
        )


def fits(name: str, pattern: str) -> bool:
    """Whether ``pattern`` names the module or one above it."""
    literal = name == pattern or name.startswith(f"{pattern}.")  # names may hold brackets
    return literal or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _weight_bytes(module: nn.Module) -> int | None:
    """Bytes of the weights of a layer that packing could concern, or None for any other module."""
    if isinstance(module, PackedModule):
        return module.nbytes_packed
    own = [p for p in module.parameters(recurse=False) if is_lazy(p) or p.ndim >= 2]
    if not own and not isinstance(module, tuple(TWINS)):  # the weight may be parametrized away
        return None
    return sum(0 if is_lazy(p) else p.numel() * p.element_size() for p in own)


def _why_not(module: nn.Module, names: list[str], skip: tuple[str, ...]) -> str | None:
    """Why a layer with a weight is left as it is, or None."""
    kind = type(module).__name__
    if isinstance(module, PackedModule):
        return "already packed"
    if any(fits(name, pattern) for name in names for pattern in skip):
        return "named in skip"
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are one raw weight inside a fused function"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads this weight directly"
    if type(module) not in TWINS:
        parent = next((each.__name__ for each in TWINS if isinstance(module, each)), None)
        return f"no packed twin of {kind}" if parent is None else f"{kind} is not exactly {parent}"
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or any((module._backward_hooks, module._backward_pre_hooks)):
        return "it has hooks, which a packed layer would not run"
    if "forward" in vars(module):
        return "its forward was replaced"
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes the table while running"
    return None


def _bits_of(
    names: list[str], module: nn.Module, default: float, bits_for: BitsFor
) -> float | None:
    if isinstance(bits_for, Mapping):
        fitting = (bits_for[p] for p in bits_for if any(fits(name, p) for name in names))
        chosen = next(fitting, default)
    else:
        chosen = bits_for(names[0], module)
    if chosen is not None:
        check_bits(f"pack: bits_for, '{names[0]}'", chosen)
    return chosen


def check_plans(
    model: nn.Module,
    plans: dict[str, LayerPlan],
    rows: dict[str, LayerReport],
    inplace: bool,
    settled: Collection[nn.Module] = (),
) -> None:
    if not plans and not settled:
        reasons = "; ".join(f"{row.name or 'it'}: {row.skipped}" for row in rows.values())
        raise ValueError(
            "pack: model must have a Linear, Conv1d, Conv2d or Embedding layer to pack; got "
            f"{type(model).__name__} ({reasons or 'no layer with a weight'})."
        )
    if inplace and model in {*settled, *(plan.layer for plan in plans.values())}:
        raise ValueError(
            "pack: inplace must be False for a single layer, which cannot become another; got True."
        )
    widths: dict[Any, tuple[str, float]] = {}
    for name, plan in plans.items():
        if plan.weight.is_meta:
            raise ValueError(
                f"pack: the weight of '{name}' must hold data; it is on the meta device."
            )
        check_finite("pack", f"the weight of '{name}'", plan.weight)
        if plan.weight.dtype == torch.float64:
            check_finite("pack", f"the weight of '{name}', in float32,", plan.weight.float())
        other, width = widths.setdefault(identity(plan.weight), (name, plan.bits))
        if width != plan.bits:
            raise ValueError(
                f"pack: bits_for must agree for layers that share a weight; got {width:g} for "
                f"'{other}' and {plan.bits:g} for '{name}'."
            )


def identity(weight: Tensor) -> tuple[Any, ...]:
    """Equal for weights that are the same numbers in memory, seen in the same shape."""
    return (weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
