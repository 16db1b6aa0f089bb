"""In which precision the interval kernels may multiply radii."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager

from pyrobust import _native
from pyrobust._checks import check_choice

__all__ = ["coarse_radii", "radius_precision"]

_CHOICES = ("float32", "bfloat16")
coarse = False  # the setting of the kernels
coarse_gradients = False  # and that of the backward passes of what is computed now


class radius_precision(ContextDecorator):
    """Let interval products multiply radii in ``"bfloat16"``, or in ``"float32"`` (the default).

    Radii and absolute weights are rounded up first, so bounds stay sound; a layer widens its box by
    at most 1.6%, about 0.6% on average; a packed linear layer with groups of a multiple of 32
    columns, whose weights are whole numbers there, by half of that. It is a permission: kernels use
    it for more than four inputs (or a convolution), 24 outputs and 64 terms, on processors with
    AVX512_BF16 or AMX-BF16; elsewhere nothing changes. The setting is that of the process, for all
    threads, and ends with the block; ``torch.compile`` does not record it.

    Gradients have a setting of their own: they promise nothing, but where bounds in bfloat16 keep
    their promise, gradients in bfloat16 lose digits. ``gradients="bfloat16"`` rounds operands and
    results of the radii's products in the backward pass to nearest: the radius's part of a gradient
    errs by at most ``3.1 / 256`` of the sum of magnitudes that it is made of, the centre's part
    stays in float32. As with ``torch.autocast`` the setting holds for the backward pass of what is
    computed in the block, wherever that pass runs: in plain eager mode, without ``create_graph``,
    for products of 2^16 multiplications and more on the same processors.

    Args:
        name: ``"float32"`` or ``"bfloat16"``, of the bounds.
        gradients: the same choice for the products of radii in the backward pass.

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

    # no generator, which takes 1 us longer: as much as the box of a small network's logits
    def __init__(self, name: str, *, gradients: str = "float32") -> None:
        check_choice("radius_precision", "name", name, _CHOICES)
        check_choice("radius_precision", "gradients", gradients, _CHOICES)
        self._wanted = name == "bfloat16", gradients == "bfloat16"
        self._before: list[tuple[bool, bool]] = []  # of each block that was entered and not left

    def __enter__(self) -> None:
        self._before.append((coarse, coarse_gradients))
        _set(self._wanted[0])
        _set_gradients(self._wanted[1])

    def __exit__(self, *_: object) -> None:
        before = self._before.pop()
        _set(before[0])
        _set_gradients(before[1])


@contextmanager
def coarse_radii(allowed: bool) -> Iterator[None]:
    """Run kernels that were asked for where the setting was ``allowed``."""
    if allowed == coarse:
        yield
        return
    before = coarse
    _set(allowed)
    try:
        yield
    finally:
        _set(before)


def _set(allowed: bool) -> None:
    global coarse
    if allowed != coarse:
        coarse = allowed
        _native.set_interval_coarse_radius(allowed)


def _set_gradients(allowed: bool) -> None:
    global coarse_gradients
    coarse_gradients = allowed
