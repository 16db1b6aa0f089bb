"""In which precision the interval kernels may multiply radii."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyrobust import _native
from pyrobust._checks import check_choice

__all__ = ["radius_precision"]

_CHOICES = ("float32", "bfloat16")
coarse = False  # the setting of the kernels


@contextmanager
def radius_precision(name: str) -> Iterator[None]:
    """Let interval products multiply radii in ``"bfloat16"``, or in ``"float32"`` (the default).

    Radii and absolute weights are rounded up first, so bounds stay sound; a layer widens its box by
    at most 1.6%, about 0.6% on average. It is a permission: kernels use it for float weights, more
    than four inputs (or a convolution), 24 outputs and 64 terms, on processors with AVX512_BF16 or
    AMX-BF16; elsewhere nothing changes. The setting is that of the process, for all threads, and
    ends with the block; ``torch.compile`` does not record it.

    Args:
        name: ``"float32"`` or ``"bfloat16"``.

    Raises:
        ValueError: another name.

    Example:
        >>> import torch
        >>> from pyrobust.ops import interval_linear
        >>> box = torch.zeros(8, 64), torch.ones(8, 64)
        >>> with radius_precision("bfloat16"):
        ...     lower, upper = interval_linear(*box, torch.ones(32, 64))
        >>> bool((upper >= 64).all())
        True
    """
    check_choice("radius_precision", "name", name, _CHOICES)
    before = _set(name == "bfloat16")
    try:
        yield
    finally:
        _set(before)


def _set(allowed: bool) -> bool:
    global coarse
    coarse = allowed
    before: bool = _native.set_interval_coarse_radius(allowed)
    return before
