"""ConversionFolder: finished blocks of a conversion on disk, so that a killed one goes on.

Each block is a safetensors file that appears whole or not at all. A description of the conversion
(formats, quantizer, checksums of weights and calibration data) is kept beside them: results of
another conversion are refused, and what differs is named.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyrobust._files import write_text
from pyrobust._safetensors import checksum, write_safetensors
from pyrobust.quantize.calibration import Call
from pyrobust.quantize.calibration_block import Quantized
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.remainder import SparseRemainder

__all__ = ["ConversionFolder", "describe_conversion"]

_VERSION = 1
_RESULTS = "pyrobust.results"
_REMAINDER = "remainder."  # before the names of its tensors
_ACTIVATION = "activation."  # the same


class ConversionFolder:
    """Where the results of one conversion are kept.

    Args:
        subject: who asks, for the errors.
        path: of the folder; made where it is absent.
        description: of the conversion, plain JSON values.

    Raises:
        ValueError: the folder is none, holds another conversion, or its description is damaged.
    """

    def __init__(
        self, subject: str, path: str | os.PathLike[str], description: dict[str, Any]
    ) -> None:
        self.subject = subject
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{subject}: resume must be a folder; '{self.path}' is a file.")
        self.path.mkdir(parents=True, exist_ok=True)
        described = self.path / "conversion.json"
        wanted = json.loads(json.dumps({"version": _VERSION, **description}))
        if not described.exists():
            write_text(described, json.dumps(wanted, indent=1))
            return
        try:
            found = dict(json.loads(described.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{subject}: resume must hold files as they were written; '{described}' is damaged "
                "(delete the folder to convert anew)."
            ) from error
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise ValueError(
                f"{subject}: resume must be a new folder or that of the same conversion; "
                f"'{self.path}' differs in {', '.join(differing)}."
            )

    def load(self, index: int) -> dict[str, Quantized] | None:
        """The results of block ``index`` by layer, or None where it was not finished.

        Raises:
            ValueError: the file is damaged.
        """
        found = self.load_tensors(_block(index))
        if found is None:
            return None
        plain, tensors = found
        try:
            return {name: _rebuild(name, entry, tensors) for name, entry in plain["layers"].items()}
        except (KeyError, ValueError, TypeError) as error:
            raise self._damaged(_block(index)) from error

    def save(self, index: int, results: Mapping[str, Quantized]) -> None:
        """Keep the results of block ``index``."""
        tensors: dict[str, Tensor] = {}
        layers = {name: _flatten(name, result, tensors) for name, result in results.items()}
        self.save_tensors(_block(index), tensors, {"layers": layers})

    def load_tensors(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Plain values and tensors kept under a name, or None where there are none.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                plain = json.loads((file.metadata() or {})[_RESULTS])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if {key: checksum(tensor) for key, tensor in tensors.items()} != plain["crc32"]:
                raise KeyError("checksum")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise self._damaged(name) from error
        return plain, tensors

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
    ) -> None:
        """Keep tensors and plain JSON values under a name; whole or not at all."""
        sums = {key: checksum(tensor) for key, tensor in tensors.items()}
        text = json.dumps({**plain, "crc32": sums})
        write_safetensors(self._file(name), dict(tensors), {"format": "pt", _RESULTS: text})

    def _damaged(self, name: str) -> ValueError:
        return ValueError(
            f"{self.subject}: resume must hold files as they were written; '{self._file(name)}' is "
            "damaged (delete it to convert that block again)."
        )

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def _block(index: int) -> str:
    return f"block-{index:04d}"


def _flatten(name: str, result: Quantized, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors into ``tensors``; everything else as plain values."""
    plain: dict[str, Any] = {}
    for part in fields(QTensor):
        value = getattr(result.qtensor, part.name)
        if isinstance(value, Tensor):
            tensors[f"{name}/{part.name}"] = value
        elif isinstance(value, SparseRemainder):
            for piece in fields(SparseRemainder):
                tensors[f"{name}/{_REMAINDER}{piece.name}"] = getattr(value, piece.name)
        else:
            plain[part.name] = value
    if result.bias is not None:
        tensors[f"{name}/bias"] = result.bias.detach()
    if result.activation is not None:
        for key, value in result.activation.state_dict().items():
            tensors[f"{name}/{_ACTIVATION}{key}"] = value
    errors = {"error_nearest": result.error_nearest, "error": result.error}
    return {"qtensor": plain, **errors}


def _rebuild(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Quantized:
    from pyrobust.nn.affine_rounding import AffineRounding

    stored = {key.rpartition("/")[2]: value for key, value in tensors.items() if _of(name, key)}
    bias = stored.pop("bias", None)
    pieces = {key: stored.pop(key) for key in list(stored) if key.startswith(_REMAINDER)}
    rounding = {key: stored.pop(key) for key in list(stored) if key.startswith(_ACTIVATION)}
    parts: dict[str, Any] = {**stored, **entry["qtensor"]}
    if pieces:
        kept = {key.removeprefix(_REMAINDER): value for key, value in pieces.items()}
        parts["remainder"] = SparseRemainder(**kept)
    activation = None
    if rounding:
        activation = AffineRounding()
        activation.load_state_dict({k.removeprefix(_ACTIVATION): v for k, v in rounding.items()})
    errors = entry["error_nearest"], entry["error"]
    return Quantized(QTensor(**parts), bias, *errors, activation)


def _of(name: str, key: str) -> bool:
    return key.rpartition("/")[0] == name


def describe_conversion(
    quantizer: Any,
    layers: Mapping[str, nn.Module],
    formats: Mapping[str, Mapping[str, Any]],
    calls: list[Call],
) -> dict[str, Any]:
    """What must agree for results to be the same, in plain values."""
    weights = {name: checksum(layer.weight) for name, layer in layers.items()}  # type: ignore[arg-type]
    data = 0
    for call in calls:
        for key, value in [*enumerate(call.args), *sorted(call.kwargs.items())]:
            text = f"{key}:{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else ""
            data = zlib.crc32(text.encode(), data)
            if isinstance(value, Tensor):
                data = zlib.crc32(str(checksum(value)).encode(), data)
    return {
        "quantizer": _describe_object(quantizer),
        "formats": {name: dict(each) for name, each in formats.items()},
        "weights": weights,
        "calibration": data,
        "threads": torch.get_num_threads(),
    }


def _describe_object(quantizer: Any) -> dict[str, str]:
    """Class and options; options are the public attributes, as they print.

    Functions count by their names: how they print differs from process to process. A progress bar
    changes no result.
    """
    public = {k: v for k, v in sorted(vars(quantizer).items()) if k[0] != "_" and k != "progress"}
    options = {key: _described(value) for key, value in public.items()}
    return {"class": _qualified(type(quantizer)), **options}


def _described(value: Any) -> str:
    return _qualified(value) if hasattr(value, "__qualname__") else repr(value)


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
