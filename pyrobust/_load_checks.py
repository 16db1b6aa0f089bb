"""What is checked before a file is loaded: the file itself, and whether it fits the model."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyrobust._safetensors import DTYPES, checksum
from pyrobust.nn._descriptor import read_descriptor
from pyrobust.nn.packed_module import PackedModule
from pyrobust.nn.twins import TWINS, VARIANTS, twin_named
from pyrobust.quantize.qtensor import WeightLayout

__all__ = [
    "EXTRA",
    "FORMAT_VERSION",
    "METADATA",
    "METADATA_SUM",
    "Path",
    "Place",
    "check_fit",
    "make_twins",
    "opened",
    "places_of",
    "read_description",
    "read_extra",
]

FORMAT_VERSION = 1
METADATA = "pyrobust"  # key of the description in the metadata of the file
METADATA_SUM = "pyrobust.crc32"  # key of the checksum of the description
EXTRA = "_extra_state"
_FORMAT = ("bits", "group_size", "group_dim", "symmetric", "activations")
_SCALES = ("F32", "F16", "BF16")
_KINDS = {twin.kind: twin for twin in (*TWINS.values(), *VARIANTS)}
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Place:
    """Where one tensor of the file goes: a parameter or buffer of a module."""

    module: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.leaf))


def read_extra(tensor: Tensor) -> dict[str, Any]:
    options = read_descriptor(tensor.tolist())
    twin = _KINDS[options.pop("kind")]
    return {"type": twin.__name__, **options, "weight_shape": list(options["weight_shape"])}


# -- the file ----------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load: path must be a file; there is none at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} must be a whole file of pyrobust.save; it is truncated, damaged or "
            f"foreign ({error})."
        ) from error


def read_description(path: Path, file: Any) -> dict[str, Any]:
    metadata = file.metadata() or {}
    text = metadata.get(METADATA)
    if text is None:
        raise ValueError(f"load: {path} must be a file of pyrobust.save; it is a foreign one.")
    try:
        if metadata.get(METADATA_SUM) != str(zlib.crc32(text.encode())):
            raise _damaged(path, "its description does not fit its checksum")
        description = json.loads(text)
        version = description["version"]
        parts = [description[part] for part in ("layers", "tied", "crc32")]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise _damaged(path, "its description cannot be read") from error
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"load: {path} must have format version 1 to {FORMAT_VERSION}; got {version!r} "
            "(a newer pyrobust wrote it)."
        )
    if not all(isinstance(part, dict) for part in parts):
        raise _damaged(path, "its description cannot be read")
    names = set(file.keys())
    if set(parts[2]) != names or not set(parts[1].values()) <= names or names & set(parts[1]):
        raise _damaged(path, "its description does not fit its tensors")
    return cast(dict[str, Any], description)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"load: {path} must be a whole file of pyrobust.save; {reason}.")


def check_fit(path: Path, places: dict[str, Place], description: dict[str, Any], file: Any) -> None:
    """Raise unless the file has every tensor of the model, no other, and sound bytes."""
    layers, tied = description["layers"], description["tied"]
    _check_names(path, set(places), {*file.keys(), *tied})
    _check_shapes(path, places, tied, file)
    _check_ties(path, places, tied)
    _check_contents(path, file, layers, tied, description["crc32"])


def _check_contents(
    path: Path, file: Any, layers: dict[str, Any], tied: dict[str, str], sums: dict[str, int]
) -> None:
    """Compare all bytes with their checksums, and the two descriptions of each layer."""
    for name in file.keys():  # noqa: SIM118 - not a mapping
        tensor = file.get_tensor(name)
        if checksum(tensor) != sums[name]:
            raise _damaged(path, f"the bytes of '{name}' do not fit their checksum")
    for layer, options in layers.items():
        name = f"{layer}.{EXTRA}" if layer else EXTRA
        if read_extra(file.get_tensor(tied.get(name, name))) != options:
            raise _damaged(path, f"layer '{layer}' is described in two ways")


# -- the model ---------------------------------------------------------------------------------


def make_twins(
    path: Path, model: nn.Module, layers: dict[str, Any]
) -> dict[nn.Module, PackedModule]:
    """Empty packed twins of the float layers that the file holds packed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    twins: dict[nn.Module, PackedModule] = {}
    for name, options in layers.items():
        layer = modules.get(name)
        if layer in twins:  # under another name
            layer = twins[layer]
        if isinstance(layer, PackedModule):
            _check_same_format(path, name, layer, options)
            continue
        twin = None if layer is None else twin_named(layer, options.get("type"))
        if layer is None or twin is None:
            raise ValueError(
                f"load: {path} holds a {options.get('type')} '{name}'; the model has "
                f"{'no such layer' if layer is None else 'a ' + type(layer).__name__} there."
            )
        try:
            twins[layer] = _make_twin(twin, layer, options)
        # RuntimeError is what torch 2.4 calls an integer beyond int64
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            reason = f"the format of '{name}' is none ({str(error).rstrip('.')})"
            raise _damaged(path, reason) from error
        _check_same_format(path, name, twins[layer], options)
    for name, module in modules.items():
        if isinstance(module, PackedModule) and name not in layers:
            raise ValueError(f"load: {path} does not hold the packed layer '{name}' of the model.")
    return twins


def _make_twin(twin: type[PackedModule], layer: nn.Module, options: dict[str, Any]) -> PackedModule:
    made = twin.like(layer, **{key: options[key] for key in _FORMAT})
    made.extend(WeightLayout(*options.get("layout", ())), options.get("storage", ()))
    made.get_extra_state()  # raises where a number of the format leaves int64
    return made.train(layer.training).to(next(layer.parameters()).dtype)


def _check_same_format(path: Path, name: str, layer: PackedModule, options: dict[str, Any]) -> None:
    own = read_extra(layer.get_extra_state())
    keys = dict.fromkeys((*own, *options))
    differing = [key for key in keys if key != "activations" and own.get(key) != options.get(key)]
    if differing:
        pairs = ", ".join(f"{key} {options.get(key)} (model: {own.get(key)})" for key in differing)
        raise ValueError(f"load: {path} holds layer '{name}' with {pairs}.")


def places_of(model: nn.Module, twins: dict[nn.Module, PackedModule]) -> dict[str, Place]:
    """Every name that the state dict of the model will have, as if the twins were in place."""
    places: dict[str, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        owner = twins.get(module, module)
        leaves = [name for name, value in owner._parameters.items() if value is not None]
        leaves += [
            name
            for name, value in owner._buffers.items()
            if value is not None and name not in owner._non_persistent_buffers_set
        ]
        leaves += [EXTRA] if isinstance(owner, PackedModule) else []
        places |= {f"{prefix}.{leaf}" if prefix else leaf: Place(owner, leaf) for leaf in leaves}
    return places


def _check_names(path: Path, wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        problems = [
            f"{what} {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("it lacks", wanted - found), ("it also has", found - wanted))
            if names
        ]
        raise ValueError(
            f"load: {path} must be of the same architecture as the model; {'; '.join(problems)}."
        )


def _check_shapes(path: Path, places: dict[str, Place], tied: dict[str, str], file: Any) -> None:
    for name, place in places.items():
        if place.leaf == EXTRA:
            continue
        stored = file.get_slice(tied.get(name, name))
        found = (stored.get_dtype(), tuple(stored.get_shape()))
        wanted = (DTYPES.get(place.tensor.dtype), tuple(place.tensor.shape))
        free = isinstance(place.module, PackedModule) and place.leaf in place.module.free_floats
        free = free and place.tensor.is_floating_point()
        if found[1] != wanted[1] or (found[0] not in _SCALES if free else found[0] != wanted[0]):
            raise ValueError(
                f"load: {path} holds '{name}' as {found[0]} of shape {found[1]}; the model has "
                f"{wanted[0]} of shape {wanted[1]}."
            )


def _check_ties(path: Path, places: dict[str, Place], tied: dict[str, str]) -> None:
    """Refuse a file with two values for what is one tensor in the model."""
    owners: dict[int, str] = {}
    for name, place in places.items():
        if place.leaf == EXTRA:
            continue
        owner = tied.get(name, name)
        other = owners.setdefault(id(place.tensor), owner)
        if other != owner:
            raise ValueError(
                f"load: {path} holds '{other}' and '{owner}' apart; the model shares them."
            )
