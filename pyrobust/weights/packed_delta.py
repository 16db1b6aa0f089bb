"""Task vectors in 1 to 8 bits a weight: the file one hands around instead of a model.

Source: the three storage schemes of robust weight signatures, Cai et al., ICML 2023, arXiv
2302.12480, whose code takes numbers of levels where this takes bits. Departures: ``"linear"`` has
groups with scales of their own (``group_size=None`` is one range a tensor, as published) and always
holds 0 exactly; ``"log"`` keeps one of its codes for exact zeros, whose logarithm does not exist;
``"log"`` and ``"tanh"`` have the published levels, of which a weight takes the nearest in its own
scale rather than on the logarithmic or tanh scale, which never errs more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_integer
from pyrobust._safetensors import write_safetensors
from pyrobust.ops.add_packed import Addition, Summand, add_all_, levels_summand, takes
from pyrobust.ops.matmul import pack_codes, unpack_codes
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.round_to_nearest import round_to_nearest
from pyrobust.weights._vector_file import read_vector_file
from pyrobust.weights.named_vector import Change, NamedVector
from pyrobust.weights.task_vector import TaskVector

__all__ = ["PackedDelta", "quantize_delta"]

_FORMAT = 1


@dataclass(frozen=True)
class _Codebook:
    """Codes of one tensor and the value of each code."""

    codes: Tensor
    levels: Tensor
    bits: int
    length: int

    def dequantize(self) -> Tensor:
        codes = unpack_codes(self.codes, in_features=self.length, bits=self.bits)
        return self.levels[codes.long()]

    def summand(self) -> Summand:
        return levels_summand(
            "PackedDelta", self.codes, self.levels, bits=self.bits, length=self.length
        )

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.length

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.levels.numel() * self.levels.element_size()


class PackedDelta(NamedVector):
    """A packed task vector; ``packed[name]`` unpacks one tensor to float32.

    Made by :func:`quantize_delta`. It is added to float32, float16 and bfloat16 weights on the CPU
    in one pass over them, decoded on the way, and to a contiguous copy of a tensor whose strides do
    not allow that (``channels_last``). Elsewhere one tensor at a time is unpacked first.
    """

    def __init__(
        self,
        parts: Mapping[str, QTensor | _Codebook],
        shapes: Mapping[str, tuple[int, ...]],
        base_checksum: str | None = None,
    ) -> None:
        self._parts = dict(parts)
        self._summands: dict[str, Summand] = {}
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.base_checksum = base_checksum

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name].dequantize().reshape(self.shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # the inherited one would unpack the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_summands": {}}

    def _summand(self, name: str, target: Tensor) -> Summand | None:
        part = self._parts[name]
        if not takes(target, part.shape):
            return None
        if name not in self._summands:
            self._summands[name] = part.summand()
        return self._summands[name]

    def _add_apart_(self, change: Change) -> None:
        name, target, scale, _ = change
        dense = target.detach().contiguous()
        if (summand := self._summand(name, dense)) is not None:
            add_all_("PackedDelta.add_to_", [Addition(summand, dense, scale)])
            target.copy_(dense)
        else:
            target.add_(self[name].to(target.device, target.dtype), alpha=scale)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and levels: of the file without its header."""
        return sum(part.nbytes for part in self._parts.values())

    def unpack(self) -> TaskVector:
        """The float32 task vector that the codes stand for."""
        return TaskVector.from_deltas(dict(self.items()), self.base_checksum)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; it does not depend on the machine."""
        tensors: dict[str, Tensor] = {}
        notes: dict[str, object] = {}
        for name, part in self._parts.items():
            tensors[f"{name}/codes"] = part.codes
            if isinstance(part, QTensor):
                tensors[f"{name}/scale"] = part.scale
                if part.zero is not None:
                    tensors[f"{name}/zero"] = part.zero
                form = [part.bits, list(part.shape), part.group_size]
            else:
                tensors[f"{name}/levels"] = part.levels
                form = [part.bits, [1, part.length], 0]
            notes[name] = [form, list(self.shapes[name])]
        metadata = {"format": str(_FORMAT), "base_checksum": self.base_checksum or ""}
        write_safetensors(path, tensors, {**metadata, "parts": json.dumps(notes)})

    @classmethod
    def load(cls, path: str | Path) -> PackedDelta:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, not a packed delta, or of a later format.
        """
        metadata, stored = read_vector_file("PackedDelta", path)
        if "parts" not in metadata or metadata.get("format") != str(_FORMAT):
            raise ValueError(f"PackedDelta: {path} is not a packed delta of format {_FORMAT}.")
        parts: dict[str, QTensor | _Codebook] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (form, shape) in json.loads(metadata["parts"]).items():
            bits, size, group = form
            codes, shapes[name] = stored[f"{name}/codes"], tuple(shape)
            if group:
                scale, zero = stored[f"{name}/scale"], stored.get(f"{name}/zero")
                parts[name] = QTensor(codes, scale, zero, bits, tuple(size), group)
            else:
                parts[name] = _Codebook(codes, stored[f"{name}/levels"], bits, size[1])
        return cls(parts, shapes, metadata.get("base_checksum") or None)


def quantize_delta(
    delta: TaskVector,
    bits: float = 8,
    scheme: str = "linear",
    *,
    group_size: int | None = 128,
) -> PackedDelta:
    """Pack a task vector.

    Args:
        delta: the vector.
        bits: per weight: 1, 1.58, 2, 3, 4 or 8; ``"log"`` and ``"tanh"`` take 2, 3, 4 and 8.
        scheme: ``"linear"``: uniform steps per group (:func:`round_to_nearest`); ``"log"``: sign
            and logarithm of the magnitude, exact zeros kept; ``"tanh"``: uniform steps of tanh.
        group_size: weights that share a scale under ``"linear"``; None is the whole tensor, as
            in the code of robust weight signatures (which calls the number of levels bits).

    Raises:
        ValueError: an option is not accepted.
    """
    check_choice("quantize_delta", "scheme", scheme, ["linear", "log", "tanh"])
    if group_size is not None:
        check_integer("quantize_delta", "group_size", group_size, 1)
    if scheme != "linear":
        check_choice("quantize_delta", "bits", bits, [2, 3, 4, 8])
    parts: dict[str, QTensor | _Codebook] = {}
    for name, value in delta.items():
        flat = value.float().cpu()
        if scheme == "linear":
            whole = group_size is None or flat.ndim < 2
            rows = flat.reshape(1, -1) if whole else flat.flatten(1)
            size = rows.shape[1] if group_size is None else group_size
            parts[name] = round_to_nearest(rows, bits=bits, group_size=max(1, size))
        else:
            levels = _log_levels if scheme == "log" else _tanh_levels
            parts[name] = _nearest(flat.flatten(), levels(flat, int(bits)), int(bits))
    return PackedDelta(parts, {n: tuple(v.shape) for n, v in delta.items()}, delta.base_checksum)


def _tanh_levels(value: Tensor, bits: int) -> Tensor:
    low, high = torch.tanh(value.double().min()), torch.tanh(value.double().max())
    # tanh reaches 1 in double precision near 19; a step inside keeps atanh finite
    ends = torch.linspace(float(low), float(high), 2**bits, dtype=torch.float64)
    return torch.atanh(ends.clamp(-1 + 1e-15, 1 - 1e-15)).float()


def _log_levels(value: Tensor, bits: int) -> Tensor:
    used = value[value != 0].abs().double()
    if not used.numel():
        return torch.zeros(2**bits)
    count = 2 ** (bits - 1) - 1
    low, high = math.log2(float(used.min())), math.log2(float(used.max()))
    powers = torch.linspace(low, high, count, dtype=torch.float64).exp2().float()
    # one code for zero; the last one repeats the largest level, so that codes stay sorted
    return torch.cat([-powers.flip(0), torch.zeros(1), powers, powers[-1:]])


def _nearest(value: Tensor, levels: Tensor, bits: int) -> _Codebook:
    """Codes of the nearest levels (sorted, in the values' own scale)."""
    upper = torch.searchsorted(levels, value.contiguous()).clamp(1, len(levels) - 1)
    lower_closer = (value - levels[upper - 1]).abs() <= (levels[upper] - value).abs()
    codes = torch.where(lower_closer, upper - 1, upper).to(torch.uint8)
    return _Codebook(pack_codes(codes[None], bits=bits), levels, bits, len(value))
