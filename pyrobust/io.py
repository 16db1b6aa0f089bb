"""save and load: packed models as safetensors files that describe themselves.

A file holds the state dict in the canonical layout; its metadata tells the format version, the
format of every packed layer, which tensors are shared, and a checksum of each. ``load`` builds
the packed layers that the file describes without quantizing anything, and checks the whole file
against the model before it changes the model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_instance
from pyrobust._load_checks import (
    EXTRA,
    FORMAT_VERSION,
    METADATA,
    METADATA_SUM,
    Path,
    Place,
    check_fit,
    make_twins,
    opened,
    places_of,
    read_description,
    read_extra,
)
from pyrobust._pack_plan import identity
from pyrobust._safetensors import DTYPES, checksum, write_safetensors
from pyrobust.nn.packed_module import PackedModule
from pyrobust.nn.packed_sequential import join_packed_layers
from pyrobust.nn.rounded_input import rounded_as_stored
from pyrobust.nn.transposed_linear import as_linear
from pyrobust.nn.twins import leave_fused_paths, replace_layers

__all__ = ["FORMAT_VERSION", "load", "save"]


def save(model: nn.Module | Mapping[str, Any], path: Path) -> None:
    """Write a model, packed or float, or its state dict to a safetensors file.

    Shared tensors are written once. The file appears whole or not at all. Any safetensors reader
    reads the tensors.

    Args:
        model: the model, or what its ``state_dict()`` returns.
        path: of the file; an existing one is replaced.

    Raises:
        TypeError: the state holds something other than tensors of ordinary dtypes.
        ValueError: a tensor holds no data (it is on the meta device).

    Example:
        >>> import tempfile, pyrobust
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> packed = pyrobust.pack(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pyrobust.save(packed, f"{folder}/packed.safetensors")
        ...     loaded = pyrobust.load(f"{folder}/packed.safetensors", model)
        >>> torch.equal(loaded[0].codes, packed[0].codes)
        True
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    check_instance("save", "model", state, Mapping)
    _check_state(state)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for name, tensor in state.items():
        owner = owners.setdefault(identity(tensor), name) if tensor.numel() else name
        if owner == name:
            tensors[name] = tensor
        else:
            tied[name] = owner
    description = {
        "version": FORMAT_VERSION,
        "layers": _describe_layers(state),
        "tied": tied,
        "crc32": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(description)
    sums = {METADATA_SUM: str(zlib.crc32(text.encode()))}
    write_safetensors(path, tensors, {"format": "pt", METADATA: text, **sums})


def load(path: Path, model: nn.Module) -> nn.Module:
    """Read a file of :func:`save` into ``model``.

    ``model`` may be the float architecture, on the meta device too (its layers become packed ones
    as the file tells), or a model packed in the same formats. Its other parameters are filled in
    place. Tensors are read one at a time. An error leaves ``model`` as it was.

    Args:
        path: of the file.
        model: where the weights go.

    Returns:
        ``model``, or its packed twin where ``model`` is itself a layer that the file holds packed.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``model`` is not a module.
        ValueError: the file is truncated, damaged, foreign, of a newer version, or of another
            architecture, format or dtype than ``model``.
    """
    check_instance("load", "model", model, nn.Module)
    with opened(path) as file:
        description = read_description(path, file)
        layers = description["layers"]
        with as_linear(model, layers), rounded_as_stored(model, layers, file.keys()):
            twins = _load_into(path, model, description, file)
    result: nn.Module = twins.get(model, model)
    leave_fused_paths(result)
    join_packed_layers(result)
    return result


def _load_into(
    path: Path, model: nn.Module, description: dict[str, Any], file: Any
) -> dict[nn.Module, PackedModule]:
    """Fill ``model`` from an open file; returns the packed layers by those they replaced."""
    twins = make_twins(path, model, description["layers"])
    places = places_of(model, twins)
    check_fit(path, places, description, file)

    tied = description["tied"]
    devices = {id(twin): _device_of(layer) for layer, twin in twins.items()}
    replace_layers(model, twins)
    values: dict[str, Tensor] = {}
    for name in sorted(places, key=lambda key: key in tied):  # owners before their aliases
        owner = tied.get(name, name)
        if owner in values:
            _share(places[name], values[owner])
        elif places[name].leaf != EXTRA:
            device = devices.get(id(places[name].module), _device_of(places[name].module))
            values[owner] = _fill(places[name], file.get_tensor(owner), device)
    for module in {id(place.module): place.module for place in places.values()}.values():
        if isinstance(module, PackedModule):
            module.finish_loading()
    return twins


# -- saving ------------------------------------------------------------------------------------


def _check_state(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"save: '{name}' must be a tensor of an ordinary dtype; got {seen}.")
        if value.layout != torch.strided or value.is_meta:
            where = "on the meta device" if value.is_meta else str(value.layout)
            raise ValueError(f"save: '{name}' must hold dense data; it is {where}.")
        if _is_extra(name) and f"{_prefix(name)}codes" not in state:
            raise TypeError(f"save: '{name}' must belong to a packed layer; it does not.")


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA


def _prefix(name: str) -> str:
    return name[: len(name) - len(EXTRA)]


def _describe_layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The format of every packed layer, by the name of the layer."""
    layers = {}
    for name, tensor in state.items():
        if _is_extra(name):
            layers[_prefix(name).rstrip(".")] = read_extra(tensor)
    return layers


# -- filling ---------------------------------------------------------------------------------


def _device_of(module: nn.Module) -> torch.device:
    """The device of the weight of a layer; the CPU where it holds no data yet."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    device = tensors[0].device
    return torch.device("cpu") if device.type == "meta" else device


def _fill(place: Place, tensor: Tensor, device: torch.device) -> Tensor:
    """Put ``tensor`` into its place: in place where the model holds data, else as a new tensor."""
    existing = place.tensor
    if place.leaf in place.module._buffers:
        if existing.is_meta or isinstance(place.module, PackedModule):
            place.module._buffers[place.leaf] = tensor.to(device, copy=True)  # not of the file
            return place.tensor
    elif existing.is_meta:
        value = nn.Parameter(tensor.to(device, copy=True), requires_grad=existing.requires_grad)
        place.module._parameters[place.leaf] = value
        return value
    with torch.no_grad():
        existing.copy_(tensor)
    return existing


def _share(place: Place, value: Tensor) -> None:
    """Make ``value``, already filled, also the tensor of this place."""
    if place.leaf == EXTRA or place.tensor is value:
        return
    if place.leaf in place.module._parameters and isinstance(value, nn.Parameter):
        place.module._parameters[place.leaf] = value
    elif place.leaf in place.module._buffers and not isinstance(value, nn.Parameter):
        place.module._buffers[place.leaf] = value
    else:
        _fill(place, value.detach(), value.device)
