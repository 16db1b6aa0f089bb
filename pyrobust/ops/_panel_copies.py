"""Whether products may keep a second copy of packed weights in memory."""

from __future__ import annotations

from pyrobust import _native
from pyrobust._checks import check_instance

__all__ = ["set_panel_copies"]

_MAKING_PRODUCT = 2  # the first one of a weight is no sign that another will follow
_LEAST_ELEMENTS = 1 << 17  # of smaller weights a copy saves nothing


def set_panel_copies(allowed: bool) -> bool:
    """Allow copies of packed weights in the order of the fastest kernels (the default), or not.

    Where the processor has kernels for it (AVX-512), the second product with a weight makes such a
    copy, as large as the weight, which lives as long as the weight. Products have the same bits
    without it, and take up to 3 times as long. ``False`` frees what exists; ``PYROBUST_PANELS=0``
    in the environment has the same effect from the start. The setting is that of the process.

    Args:
        allowed: whether products may make and keep copies.

    Returns:
        What was set before.

    Raises:
        TypeError: ``allowed`` is not a bool.

    Example:
        >>> before = set_panel_copies(False)
        >>> set_panel_copies(before)
        False
    """
    check_instance("set_panel_copies", "allowed", allowed, bool)
    product, _ = _native.set_panels(_MAKING_PRODUCT if allowed else 0, _LEAST_ELEMENTS)
    return product != 0
