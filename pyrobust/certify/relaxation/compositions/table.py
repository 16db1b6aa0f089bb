"""Which operations are written out, by the name of the function and by the kind of module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from pyrobust.certify.relaxation.compositions import arithmetic, attention, norms, softmax
from pyrobust.certify.relaxation.compositions.site import Rule, Site

__all__ = ["FUNCTIONS", "MODULES"]


def _not_the_batch(rule: Rule) -> Rule:
    """Not along the batch."""

    def checked(site: Site, x: Any, sizes: Any, dim: int = 0) -> Any:
        return None if dim % len(site.shapes[0]) == 0 else rule(site, x, sizes, dim)

    return checked


def _along(rule: Rule, dim: int | None = None) -> Rule:
    return lambda site, module, x: rule(site, x, module.dim if dim is None else dim)


def _affine_norm(rule: Rule, *options: str) -> Rule:
    """A norm with its parameters from the module."""

    def written(site: Site, module: Any, x: Any) -> Any:
        chosen = [getattr(module, option) for option in options]
        affine = [site.parameter(module, name) for name in ("weight", "bias")]
        return rule(site, x, *chosen, *affine, module.eps)

    return written


def _root_norm(site: Site, module: Any, x: Any) -> Any:
    weight = site.parameter(module, "weight")
    return norms.rms_norm(site, x, module.normalized_shape, weight, module.eps)


def _instance(site: Site, module: Any, x: Any) -> Any:
    if module.running_mean is not None:
        return None
    weight, bias = site.parameter(module, "weight"), site.parameter(module, "bias")
    return norms.instance_norm(site, x, weight=weight, bias=bias, eps=module.eps)


def _pool(function: Callable[..., Any], *options: str) -> Rule:
    def written(site: Site, module: Any, x: Any) -> Any:
        if module.return_indices:
            return None
        return function(x, *(getattr(module, option) for option in options))

    return written


def _upsample(site: Site, module: Any, x: Any) -> Any:
    options = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    chosen: dict[str, Any] = {option: getattr(module, option, None) for option in options}
    return F.interpolate(x, **chosen)


_WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

FUNCTIONS: dict[str, Rule] = {
    "softmax": softmax.softmax,
    "log_softmax": softmax.log_softmax,
    "softmin": softmax.softmin,
    "logsumexp": softmax.log_sum_exp,
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "group_norm": norms.group_norm,
    "instance_norm": norms.instance_norm,
    "scaled_dot_product_attention": attention.attention,
    **dict.fromkeys(("div", "truediv", "divide", "true_divide"), arithmetic.quotient),
    **dict.fromkeys(("mul", "multiply"), arithmetic.product),
    "maximum": arithmetic.maximum,
    "minimum": arithmetic.minimum,
    "max": arithmetic.largest,
    "min": arithmetic.smallest,
    "amin": arithmetic.amin,
    "chunk": _not_the_batch(arithmetic.chunk),
    "split": _not_the_batch(arithmetic.split),
    "unbind": lambda site, x, dim=0: None if dim == 0 else arithmetic.unbind(site, x, dim),
}

MODULES: dict[type[nn.Module], Rule] = {
    nn.Softmax: _along(softmax.softmax),
    nn.LogSoftmax: _along(softmax.log_softmax),
    nn.Softmin: _along(softmax.softmin),
    nn.Softmax2d: _along(softmax.softmax, -3),
    nn.LayerNorm: _affine_norm(norms.layer_norm, "normalized_shape"),
    nn.GroupNorm: _affine_norm(norms.group_norm, "num_groups"),
    nn.RMSNorm: _root_norm,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance),
    nn.MaxPool1d: _pool(F.max_pool1d, *_WINDOW),
    nn.MaxPool2d: _pool(F.max_pool2d, *_WINDOW),
    nn.MaxPool3d: _pool(F.max_pool3d, *_WINDOW),
    nn.AdaptiveMaxPool1d: _pool(F.adaptive_max_pool1d, "output_size"),
    nn.AdaptiveMaxPool2d: _pool(F.adaptive_max_pool2d, "output_size"),
    nn.AdaptiveMaxPool3d: _pool(F.adaptive_max_pool3d, "output_size"),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _upsample),
    nn.MultiheadAttention: attention.multi_head_attention,
    nn.TransformerEncoderLayer: attention.encoder_layer,
    nn.TransformerEncoder: attention.encoder,
}
