"""Sequential designs kept on disk, so that each is computed once per machine.

A design lies as JSON in the folder ``designs`` of ``PYROBUST_CACHE``, of
``XDG_CACHE_HOME/pyrobust`` or of ``~/.cache/pyrobust``; ``PYROBUST_CACHE=off`` keeps none. What is
read is not trusted: looks must be those asked for, and the recursion must give the error that
stands in the file, at most alpha. A file that fails is computed again and replaced; a folder that
cannot be written is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyrobust._files import write_text
from pyrobust.certify.design import SequentialDesign, finished, look_schedule

__all__ = ["cached_design", "design_folder"]

_VERSION = 1  # a change of the algorithm or the default population needs another


def design_folder() -> Path | None:
    """Where designs lie; None where none are kept."""
    named = os.environ.get("PYROBUST_CACHE")
    if named == "off":
        return None
    if named:
        return Path(named) / "designs"
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return root / "pyrobust" / "designs"


def cached_design(key: dict[str, Any], make: Callable[[], SequentialDesign]) -> SequentialDesign:
    """The design of ``key`` from the disk, or made, kept and returned.

    Args:
        key: the numbers that define it: ``p_null``, ``alpha``, ``budget`` and the rest.
        make: computes it.
    """
    folder = design_folder()
    if folder is None:
        return make()
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
    place = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    found = _read(place, text, key)
    if found is not None:
        return found
    design = make()
    kept = {"key": text, "error": design.error}
    for name in ("looks", "upper", "lower"):
        kept[name] = getattr(design, name).tolist()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps(kept))
    except OSError:
        pass
    return design


def _read(place: Path, text: str, key: dict[str, Any]) -> SequentialDesign | None:
    """The design in the file, if it is the one asked for and the recursion confirms its error."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        looks, upper, lower = (
            np.array(kept[name], dtype=np.int64) for name in ("looks", "upper", "lower")
        )
        error = float(kept["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = (
        kept.get("key") == text
        and np.array_equal(looks, look_schedule(key["budget"]))
        and upper.shape == lower.shape == looks.shape
        and bool((lower < upper).all() and lower[-1] == upper[-1] - 1)
    )
    if not fits:
        return None
    design = finished(key["p_null"], key["alpha"], looks, upper, lower, binding=True)
    confirmed = abs(design.error - error) <= 1e-9 * error and design.error <= key["alpha"]
    return design if confirmed else None
