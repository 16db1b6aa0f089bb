"""How each layer moves the units of its operands (rules of ``trace_spec``).

A rule records the axes of the layer's tensors and returns the layout of its result, or None to
have everything pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pyrobust.weights._trace_call import Call, Layout, Recorder, pin_all
from pyrobust.weights._trace_functions import reshape_layout
from pyrobust.weights._unit_classes import Axis, Run, UnitClass, join, narrow, pin, tie

__all__ = ["module_rule"]

_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus,
    nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout,
)  # fmt: skip
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def module_rule(module: nn.Module, name: str, call: Call, recorder: Recorder) -> Any:
    """Layout of a layer's output; records the axes of its tensors."""
    if not call.args:
        return pin_all(call, recorder, f"'{name}' is called with keywords only")
    layout = call.layout(0, call.args[0])
    if isinstance(module, _POINTWISE):
        return layout
    if isinstance(module, (nn.Softmax, nn.LogSoftmax)):
        return layout
    if isinstance(module, _POOLS):
        spatial = layout[2:]
        return pin_all(call, recorder, name) if any(spatial) else layout
    if isinstance(module, nn.Flatten):
        return reshape_layout(layout, tuple(call.args[0].shape), tuple(call.result.shape))
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, name, call, recorder)
    for kinds, rule in _LAYERS:
        if isinstance(module, kinds):
            result = rule(module, name, layout, call, recorder)
            if result is not None:
                return result
    return pin_all(call, recorder, f"no rule for {type(module).__name__} '{name}'")


def _linear(
    module: Any, name: str, layout: Layout, call: Call, recorder: Recorder
) -> Layout | None:
    out = recorder.units(name, module.out_features)
    recorder.tensor(f"{name}.weight", out, layout[-1])
    recorder.tensor(f"{name}.bias", out)
    return (*layout[:-1], recorder.tensors[f"{name}.weight"][0])


def _convolution(
    module: Any, name: str, layout: Layout, call: Call, recorder: Recorder
) -> Layout | None:
    if isinstance(module, _ConvTransposeNd) or len(layout) != module.weight.ndim or any(layout[2:]):
        return None
    entering, kernel = layout[1], (None,) * (module.weight.ndim - 2)
    out = recorder.units(name, module.out_channels)
    if module.groups == 1:
        recorder.tensor(f"{name}.weight", out, entering, *kernel)
    else:
        _tie_groups(entering, out, module.groups)
        recorder.tensor(f"{name}.weight", out, None, *kernel)
    recorder.tensor(f"{name}.bias", out)
    return (layout[0], recorder.tensors[f"{name}.weight"][0], *kernel)


def _tie_groups(entering: Axis | None, out: Axis, groups: int) -> None:
    """Whole groups move together on both sides (each channel is a group when depthwise)."""
    if entering is None or len(entering) != 1 or entering[0].outer != 1:
        pin(entering)
        pin(out)
        return
    narrow(entering[0], groups)
    narrow(out[0], groups)
    tie(entering[0], out[0])


def _norm(module: Any, name: str, layout: Layout, call: Call, recorder: Recorder) -> Layout | None:
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return None
        channel = layout[-1]
    else:
        channel = layout[1]
        if isinstance(module, nn.GroupNorm):
            if channel is not None and (len(channel) != 1 or channel[0].outer != 1):
                return None
            for run in channel or ():
                narrow(run, module.num_groups)
    for entry in ("weight", "bias", "running_mean", "running_var"):
        if f"{name}.{entry}" in recorder.shapes:
            recorder.tensor(f"{name}.{entry}", channel)
    return layout


def _embedding(
    module: Any, name: str, layout: Layout, call: Call, recorder: Recorder
) -> Layout | None:
    recorder.tensor(f"{name}.weight", None, recorder.units(name, module.embedding_dim))
    return (*layout, recorder.tensors[f"{name}.weight"][1])


def _prelu(module: Any, name: str, layout: Layout, call: Call, recorder: Recorder) -> Layout | None:
    recorder.tensor(f"{name}.weight", layout[1] if module.num_parameters > 1 else None)
    return layout


_LAYERS: list[tuple[tuple[type, ...], Callable[..., Layout | None]]] = [
    ((nn.Linear,), _linear),
    ((_ConvNd,), _convolution),
    ((_BatchNorm, nn.LayerNorm, nn.GroupNorm), _norm),
    ((nn.Embedding,), _embedding),
    ((nn.PReLU,), _prelu),
]


def _attention(module: nn.MultiheadAttention, name: str, call: Call, recorder: Recorder) -> Any:
    """Heads are the units of the three projections and of the output projection's input."""
    if module.in_proj_weight is None or module.bias_k is not None:
        pin_all(call, recorder, f"'{name}' has separate key or value projections")
        return None
    width, heads = module.embed_dim, module.num_heads
    entering = call.layout(0, call.args[0])[-1]
    for i in (1, 2):
        entering = join(entering, call.layout(i, call.args[i])[-1])
    units = UnitClass(heads, f"{name}.heads")
    fused: Axis = (Run(units, 3 * width, outer=3),)
    out = recorder.units(f"{name}.out_proj", width)
    recorder.tensor(f"{name}.in_proj_weight", fused, entering)
    recorder.tensor(f"{name}.in_proj_bias", fused)
    recorder.tensor(f"{name}.out_proj.weight", out, (Run(units, width),))
    recorder.tensor(f"{name}.out_proj.bias", out)
    free = call.layout(0, call.args[0])[:-1]
    return ((*free, recorder.tensors[f"{name}.out_proj.weight"][0]), None)
