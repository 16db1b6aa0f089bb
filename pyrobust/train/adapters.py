"""Put adapters into a model by layer name, train, merge, save and load them.

A configuration (:class:`SVFit`, :class:`LoRA`) names the layers by the end of their names, as the
usual tools do ("q_proj" matches "model.layers.0.self_attn.q_proj"). Interchange with the ``peft``
package is in :mod:`pyrobust.train.peft_format`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from pyrobust._safetensors import write_safetensors
from pyrobust.nn.adapter import Adapter
from pyrobust.nn.lora import ConvLoRA2d, LoRALinear
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.svfit import SVFitConv2d, SVFitLinear

__all__ = [
    "LoRA",
    "SVFit",
    "adapter_param_groups",
    "adapters",
    "adapters_disabled",
    "apply_adapter",
    "bake_adapters",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
    "unmerge_adapters",
]


@dataclass(frozen=True)
class SVFit:
    """Configuration of :class:`pyrobust.nn.SVFitLinear` / ``SVFitConv2d``.

    Attributes:
        targets: ends of layer names.
        rank: trained singular values per block; None chooses by ``energy``.
        energy: share of the spectrum, in ``(0, 1]``.
        measure: "sum" or "squares".
        mode: "delta" or "split".
        subspace: "top" or "random".
        positive: keep singular values positive.
        row_blocks: blocks of rows with a decomposition each.
    """

    targets: tuple[str, ...]
    rank: int | None = None
    energy: float = 0.99
    measure: str = "sum"
    mode: str = "delta"
    subspace: str = "top"
    positive: bool = False
    row_blocks: int = 1

    def build(self, layer: nn.Module) -> Adapter:
        """The adapter over ``layer``."""
        kind: type[SVFitConv2d] | type[SVFitLinear]
        kind = SVFitConv2d if isinstance(layer, nn.Conv2d) else SVFitLinear
        return kind(
            layer,  # type: ignore[arg-type]  # other kinds are refused by the adapter
            self.rank,
            energy=self.energy,
            measure=self.measure,
            mode=self.mode,
            subspace=self.subspace,
            positive=self.positive,
            row_blocks=self.row_blocks,
        )


@dataclass(frozen=True)
class LoRA:
    """Configuration of :class:`pyrobust.nn.LoRALinear` / ``ConvLoRA2d``.

    Attributes:
        targets: ends of layer names.
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        init: "zero" or "pissa".
        full_rank: accept a rank as large as the least dimension of a weight, as checkpoints of
            other tools may have it.
    """

    targets: tuple[str, ...]
    r: int = 8
    alpha: float = 16.0
    init: str = "zero"
    full_rank: bool = False

    def build(self, layer: nn.Module) -> Adapter:
        """The adapter over ``layer``."""
        kind: type[ConvLoRA2d] | type[LoRALinear]
        kind = ConvLoRA2d if isinstance(layer, nn.Conv2d) else LoRALinear
        return kind(
            layer,  # type: ignore[arg-type]  # other kinds are refused by the adapter
            r=self.r,
            alpha=self.alpha,
            init=self.init,
            full_rank=self.full_rank,
        )


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    inside = {f"{n}.base" for n, m in modules.items() if isinstance(m, Adapter)}
    found = {n: m for n, m in modules.items() if n not in inside and _matches(n, targets)}
    if not found:
        kinds = nn.Linear | nn.Conv2d | PackedLinear
        candidates = [n for n, m in modules.items() if isinstance(m, kinds)]
        raise ValueError(
            f"apply_adapter: targets {targets} match no module; linear and convolution layers are "
            f"{', '.join(candidates) or 'absent'}."
        )
    return found


def _check_untied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        weight = getattr(module, "weight", None)
        names = owners.get(id(weight), [])
        if len(names) > 1:
            raise ValueError(
                f"apply_adapter: the weight of {name!r} is shared ({', '.join(names)}); merging an "
                "adapter would change the other users."
            )


def apply_adapter(
    model: nn.Module, config: SVFit | LoRA, *, trainable: tuple[str, ...] = ()
) -> nn.Module:
    """Freeze ``model`` and put adapters over the layers that ``config`` names, in place.

    Args:
        model: any model; nothing is changed if a layer is refused.
        config: which adapter over which layers.
        trainable: ends of names of modules that are trained in full (the classification head).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: targets match nothing (the candidates are listed), a weight is shared, adapted
            already, or not finite.
        TypeError: a target is neither linear nor convolution.
    """
    chosen = _targets(model, config.targets)
    _check_untied(model, chosen)
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        built = {name: config.build(layer) for name, layer in chosen.items()}
    except (TypeError, ValueError):
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    for name, adapter in built.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
        for parameter in adapter.trainable_parameters():
            parameter.requires_grad_(True)
    for name, module in model.named_modules():
        if _matches(name, trainable):
            module.requires_grad_(True)
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapter)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what it did before its (unmerged) adapters.

    Raises:
        RuntimeError: an adapter is merged, so that its update cannot be left out.
    """
    found = adapters(model)
    merged = [name for name, adapter in found.items() if adapter.merged]
    if merged:
        raise RuntimeError(f"adapters_disabled: {', '.join(merged)} is merged; unmerge it first.")
    before = {name: adapter.enabled for name, adapter in found.items()}
    try:
        for adapter in found.values():
            adapter.enabled = False
        yield
    finally:
        for name, adapter in found.items():
            adapter.enabled = before[name]


def adapter_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, adapter_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: adapter parameters without decay, other trainable ones with it.

    Args:
        model: an adapted model.
        lr: learning rate of trainable parameters outside adapters.
        weight_decay: their decay.
        adapter_lr: learning rate of the adapters; default ``lr``.
    """
    own = [p for a in adapters(model).values() for p in a.trainable_parameters()]
    known = {id(p) for p in own}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    rate = lr if adapter_lr is None else adapter_lr
    groups: list[dict[str, Any]] = [{"params": own, "lr": rate, "weight_decay": 0.0}]
    if rest:
        groups.append({"params": rest, "lr": lr, "weight_decay": weight_decay})
    return groups


def merge_adapters(model: nn.Module) -> nn.Module:
    """Merge every adapter of the model, in place."""
    for adapter in adapters(model).values():
        adapter.merge()
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Take every merged adapter out again, bit for bit."""
    for adapter in adapters(model).values():
        adapter.unmerge()
    return model


def bake_adapters(model: nn.Module) -> nn.Module:
    """Put plain layers with merged weights in the place of adapters, in place and for good.

    State dicts then have the names of the model before :func:`apply_adapter`. Parameters stay
    frozen or not as they are.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no adapter, or is one itself: its ``base`` is then the layer.

    Example:
        >>> model = apply_adapter(nn.Sequential(nn.Linear(3, 3)), LoRA(("0",), r=1))
        >>> bake_adapters(model)
        Sequential(
          (0): Linear(in_features=3, out_features=3, bias=True)
        )
    """
    found = adapters(model)
    if not found or "" in found:
        raise ValueError("bake_adapters: model must be a module with adapters inside it.")
    for name, adapter in found.items():
        if not adapter.merged:
            adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.base)
    return model


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters' own tensors (safetensors, atomically), with checksums of their bases.

    Raises:
        ValueError: the model has no adapter.
    """
    found = adapters(model)
    if not found:
        raise ValueError("save_adapter: the model has no adapter.")
    tensors = {
        f"{name}.{key}": value
        for name, adapter in found.items()
        for key, value in adapter.adapter_state_dict().items()
    }
    write_safetensors(path, tensors, {"format": "pyrobust-adapter", "version": "1"})


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save_adapter` wrote into a model with the same adapters.

    Raises:
        ValueError: not such a file, other layers are adapted, or another base weight.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != "pyrobust-adapter" or metadata.get("version") != "1":
        raise ValueError(f"load_adapter: {path} is not a pyrobust adapter file of version 1.")
    found = adapters(model)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in found}
    for key, value in tensors.items():
        name, _, own = key.rpartition(".")
        if name not in states:
            raise ValueError(f"load_adapter: {path} adapts {name!r}, the model does not.")
        states[name][own] = value
    for name, adapter in found.items():
        adapter.load_adapter_state_dict(states[name])
    return model
