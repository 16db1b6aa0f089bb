"""The largest scores of several layers together, taken layer by layer and kept in a folder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrobust.quantize.conversion_folder import ConversionFolder
from pyrobust.quantize.outliers import largest

__all__ = ["Ranked", "largest_of_all", "load_ranked", "save_ranked"]

Ranked = dict[str, tuple[Tensor, Tensor]]
"""By layer: flat positions, ascending int64, and the scores there, float32."""


def largest_of_all(ranked: Mapping[str, tuple[Tensor, Tensor]], count: int) -> Ranked:
    """The ``count`` largest scores of all layers; of equal ones the first.

    Applied to the layers so far after each, it drops only what the last application would drop, so
    that no more than ``count`` scores need be in memory beside those of the next layers.
    """
    total = sum(len(places) for places, _ in ranked.values())
    if total <= count:
        return dict(ranked)
    chosen = largest(torch.cat([scores for _, scores in ranked.values()]), count)
    result: Ranked = {}
    begin = 0
    for name, (places, scores) in ranked.items():
        inside = chosen[(chosen >= begin) & (chosen < begin + len(places))] - begin
        result[name] = places[inside], scores[inside]
        begin += len(places)
    return result


def save_ranked(folder: ConversionFolder, index: int, ranked: Ranked) -> None:
    """Keep the scores of group ``index`` of the layers."""
    pairs = {"places": 0, "scores": 1}
    tensors = {
        f"{name}/{key}": pair[at] for name, pair in ranked.items() for key, at in pairs.items()
    }
    folder.save_tensors(_file(index), tensors, {"layers": list(ranked)})


def load_ranked(folder: ConversionFolder, index: int) -> Ranked | None:
    """What :func:`save_ranked` kept, or None.

    Raises:
        ValueError: the file is damaged.
    """
    found = folder.load_tensors(_file(index))
    if found is None:
        return None
    plain, tensors = found
    return {n: (tensors[f"{n}/places"], tensors[f"{n}/scores"]) for n in plain["layers"]}


def _file(index: int) -> str:
    return f"scores-{index:04d}"
