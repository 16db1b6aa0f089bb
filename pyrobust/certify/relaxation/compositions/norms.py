"""Layer, group, instance and root-mean-square norms: a product with an inverse root."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pyrobust.certify.relaxation.compositions.parts import centred, meet
from pyrobust.certify.relaxation.compositions.site import Site, emit

__all__ = ["group_norm", "instance_norm", "layer_norm", "layer_normed", "rms_norm"]


def _normalised(x: Any, dims: Sequence[int], eps: float, plain: Any, *, centre: bool) -> Any:
    """``d / sqrt(mean(d^2) + eps)``; ``plain`` is the same in one operation."""
    d = emit(centred, x, tuple(dims)) if centre else x
    mean = torch.square(d).mean(list(dims), keepdim=True)
    return emit(meet, d * torch.rsqrt(mean + eps), plain)


def _scaled(y: Any, weight: Any, bias: Any, shape: Sequence[int] | None = None) -> Any:
    if weight is not None:
        y = y * (weight if shape is None else weight.reshape(*shape))
    if bias is not None:
        y = y + (bias if shape is None else bias.reshape(*shape))
    return y


def layer_norm(
    site: Site, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Layer norm over all axes but the batch at most."""
    axes = len(tuple(shape))
    if eps <= 0 or axes >= len(site.shapes[0]):
        return None
    return layer_normed(x, tuple(shape), weight, bias, eps)


def layer_normed(x: Any, shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Any:
    """Layer norm over the last axes."""
    plain = F.layer_norm(x, shape, None, None, eps)
    y = _normalised(x, range(-len(shape), 0), eps, plain, centre=True)
    return _scaled(y, weight, bias)


def rms_norm(site: Site, x: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
    """Division by the root of the mean square."""
    eps = torch.finfo(site.dtype).eps if eps is None else eps
    shape = tuple(shape)
    if eps <= 0 or len(shape) >= len(site.shapes[0]):
        return None
    plain = F.rms_norm(x, shape, None, eps)
    y = _normalised(x, range(-len(shape), 0), eps, plain, centre=False)
    return _scaled(y, weight, None)


def group_norm(
    site: Site, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Layer norm of groups of channels."""
    if eps <= 0:
        return None
    whole = site.shapes[0]
    size = whole[1:].numel() // groups
    rows = x.reshape(-1, groups, size)
    plain = F.layer_norm(rows, (size,), None, None, eps)
    y = _normalised(rows, (-1,), eps, plain, centre=True).reshape(-1, *whole[1:])
    return _scaled(y, weight, bias, (1, -1, *[1] * (len(whole) - 2)))


def instance_norm(
    site: Site,
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Layer norm of each channel by the statistics of the input."""
    shape = site.shapes[0]
    if eps <= 0 or not use_input_stats or running_mean is not None or len(shape) < 3:
        return None
    plain = F.instance_norm(x, eps=eps)
    y = _normalised(x, range(2 - len(shape), 0), eps, plain, centre=True)
    return _scaled(y, weight, bias, (1, -1, *[1] * (len(shape) - 2)))
