"""Memory of large boxes and of the work on them, kept between calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust._checks import check_integer
from pyrobust.ops._interval_checks import Ends

__all__ = ["new_ends", "set_kept_memory"]


def set_kept_memory(limit: int) -> int:
    """Limit how many bytes of large ends of boxes, and of working memory, are kept for later calls.

    Fresh memory costs bounds of large networks up to a quarter of their time. So what native passes
    gave in blocks of 4 MiB and more is kept once no tensor needs it, up to 256 MiB at first, and
    lent to the system: it counts as memory of the process, but the system takes it, with no need to
    write it anywhere, before it would run short (``MADV_FREE``; on other systems than Linux
    nothing is kept). Smaller ends, from 128 KiB on, share 32 MiB with the work on them, which are
    not lent; with a limit of 0 they are torch's. The setting is that of the process;
    ``PYROBUST_KEPT_MEMORY=0`` in the environment is a limit of 0 from the start.

    Args:
        limit: bytes, ``>= 0``. What is kept beyond goes at once; with 0 nothing is kept.

    Returns:
        The limit before.

    Raises:
        TypeError: ``limit`` is not an integer.
        ValueError: ``limit`` is negative.

    Example:
        >>> before = set_kept_memory(0)
        >>> set_kept_memory(before)
        0
    """
    check_integer("set_kept_memory", "limit", limit, 0)
    before = _native.lent_limit()
    _native.set_lent_limit(min(limit, torch.iinfo(torch.int64).max))
    return before


def new_ends(like: Tensor, shape: Sequence[int] | None = None) -> Ends:
    """Both ends of a box, to be written: like ``like``, of its shape or another.

    Large float32 ends on the CPU lie in kept memory (:func:`set_kept_memory`); their storage cannot
    grow.
    """
    sizes = tuple(like.shape if shape is None else shape)
    if not sizes:
        return like.new_empty(()), like.new_empty(())
    return _native.new_end(like, sizes), _native.new_end(like, sizes)
