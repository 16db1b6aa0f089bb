"""How each ONNX operator becomes a torch layer or function; used by :func:`load_onnx`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrobust.certify.onnx_shapes import SHAPE_OPERATORS, Unsupported, axes_of, constant

if TYPE_CHECKING:
    from pyrobust.certify.onnx_model import Reader

__all__ = ["OPERATORS"]


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda reader, inputs, options: reader.call(function, *inputs)


def _with(function: Callable[..., Any], **names: tuple[str, Any]) -> Callable[..., Any]:
    """A torch function whose keywords come from attributes with defaults."""
    return lambda reader, inputs, options: reader.call(
        function, inputs[0], **{key: options.get(a, d) for key, (a, d) in names.items()}
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias.expand(weight.shape[0]))
    return module


def _gemm(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("transA", 0):
        raise Unsupported("transA")
    weight = constant(inputs[1], "the second matrix")
    weight = weight if options.get("transB", 0) else weight.mT
    bias = constant(inputs[2], "the bias").flatten() if len(inputs) > 2 else None
    beta = options.get("beta", 1.0)
    bias = bias if bias is None or beta == 1.0 else beta * bias
    return reader.layer(_linear(options.get("alpha", 1.0) * weight, bias), inputs[0])


def _matmul(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if isinstance(inputs[1], Tensor) and inputs[1].ndim == 2 and not isinstance(inputs[0], Tensor):
        return reader.layer(_linear(inputs[1].mT, None), inputs[0])
    return reader.call(torch.matmul, *inputs)


def _window(options: dict[str, Any], axes: int) -> tuple[Any, list[int] | None]:
    """Symmetric padding, or zero and the amounts of ``F.pad``."""
    if options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise Unsupported(f"auto_pad={options['auto_pad'].decode()}")
    pads = list(options.get("pads", [0] * 2 * axes))
    begin, end = pads[:axes], pads[axes:]
    if begin == end:
        return tuple(begin), None
    amounts = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    return (0,) * axes, amounts


def _conv(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    weight = constant(inputs[1], "the weight")
    bias = constant(inputs[2], "the bias") if len(inputs) > 2 else None
    axes = weight.ndim - 2
    padding, amounts = _window(options, axes)
    value = inputs[0] if amounts is None else reader.call(F.pad, inputs[0], amounts)
    groups = options.get("group", 1)
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    module = kinds[axes - 1](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(options.get("strides", [1] * axes)),
        padding=padding,
        dilation=tuple(options.get("dilations", [1] * axes)),
        groups=groups,
        bias=bias is not None,
    )
    return reader.layer(_filled(module, weight, bias), value)


def _conv_transpose(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    weight = constant(inputs[1], "the weight")
    bias = constant(inputs[2], "the bias") if len(inputs) > 2 else None
    axes = weight.ndim - 2
    padding, amounts = _window(options, axes)
    if amounts is not None or "output_shape" in options:
        raise Unsupported("uneven pads or output_shape")
    groups = options.get("group", 1)
    kinds: list[Any] = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    module = kinds[axes - 1](
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=tuple(options.get("strides", [1] * axes)),
        padding=padding,
        output_padding=tuple(options.get("output_padding", [0] * axes)),
        dilation=tuple(options.get("dilations", [1] * axes)),
        groups=groups,
        bias=bias is not None,
    )
    return reader.layer(_filled(module, weight, bias), inputs[0])


def _filled(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    result: nn.Module = module
    return result


def _batch_norm(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("training_mode", 0):
        raise Unsupported("training_mode")
    kinds: dict[int, Any] = {
        2: nn.BatchNorm1d,
        3: nn.BatchNorm1d,
        4: nn.BatchNorm2d,
        5: nn.BatchNorm3d,
    }
    if len(reader.shape) not in kinds:
        raise Unsupported(f"an input of {len(reader.shape)} axes")
    statistics = [constant(v, "every statistic") for v in inputs[1:5]]
    module = kinds[len(reader.shape)](len(statistics[0]), eps=options.get("epsilon", 1e-5))
    targets = (module.weight, module.bias, module.running_mean, module.running_var)
    with torch.no_grad():
        for target, value in zip(targets, statistics, strict=True):
            target.copy_(value)
    return reader.layer(module, inputs[0])


def _pool(average: bool) -> Callable[..., Any]:
    def make(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
        kernel = tuple(options["kernel_shape"])
        axes = len(kernel)
        padding, amounts = _window(options, axes)
        if amounts is not None:
            raise Unsupported("uneven pads")
        shared = {
            "stride": tuple(options.get("strides", [1] * axes)),
            "padding": padding,
            "ceil_mode": bool(options.get("ceil_mode", 0)),
        }
        if average:
            kinds: list[Any] = [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d]
            counted = bool(options.get("count_include_pad", 0))
            return reader.layer(
                kinds[axes - 1](kernel, count_include_pad=counted, **shared), inputs[0]
            )
        kinds = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]
        dilation = tuple(options.get("dilations", [1] * axes))
        return reader.layer(kinds[axes - 1](kernel, dilation=dilation, **shared), inputs[0])

    return make


def _global_pool(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    axes = len(reader.shape)
    if axes < 3:
        raise Unsupported(f"an input of {axes} axes")
    return reader.call(torch.mean, inputs[0], list(range(2, axes)), keepdim=True)


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def make(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
        axes = axes_of(inputs, options)
        if not axes or 0 in axes or -len(reader.shape) in axes:
            raise Unsupported("a reduction over the batch")
        keep = bool(options.get("keepdims", 1))
        return reader.call(function, inputs[0], list(axes), keepdim=keep)

    return make


def _clip(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    ends = [
        float(constant(inputs[i], "a limit"))
        if len(inputs) > i and inputs[i] is not None
        else options.get(name)
        for i, name in ((1, "min"), (2, "max"))
    ]
    return reader.call(torch.clamp, inputs[0], *ends)


def _pad(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("mode", b"constant") != b"constant":
        raise Unsupported(f"mode={options['mode'].decode()}")
    pads = list(options["pads"]) if "pads" in options else constant(inputs[1], "pads").tolist()
    given = inputs[2] if len(inputs) > 2 else None
    value = float(constant(given, "the value")) if given is not None else options.get("value", 0.0)
    half = len(pads) // 2
    pairs = zip(reversed(pads[:half]), reversed(pads[half:]), strict=True)
    amounts = [int(n) for pair in pairs for n in pair]
    extra = {} if value == 0 else {"value": value}
    return reader.call(F.pad, inputs[0], amounts, **extra)


def _constant_node(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    if "value" in options:
        return torch.from_numpy(numpy_helper.to_array(options["value"]).copy())
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        if name in options:
            return torch.tensor(options[name])
    raise Unsupported(f"{', '.join(options)}")


def _cast(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    from onnx import TensorProto

    if isinstance(inputs[0], Tensor):
        kinds = {TensorProto.INT64: torch.int64, TensorProto.FLOAT: torch.float32}
        if options["to"] in kinds:
            return inputs[0].to(kinds[options["to"]])
    elif options["to"] == TensorProto.FLOAT:
        return inputs[0]
    raise Unsupported("a type other than float32")


def _layer_norm(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    scale = constant(inputs[1], "the scale")
    shift = constant(inputs[2], "the bias") if len(inputs) > 2 else torch.zeros_like(scale)
    axis = options.get("axis", -1)
    place = axis if axis < 0 else axis - len(reader.shape)
    if place != -scale.ndim:
        raise Unsupported(f"axis={axis} with a scale of {scale.ndim} axes")
    module = nn.LayerNorm(tuple(scale.shape), eps=options.get("epsilon", 1e-5))
    with torch.no_grad():
        module.weight.copy_(scale)
        module.bias.copy_(shift)
    return reader.layer(module, inputs[0])


def _prelu(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    slope = constant(inputs[1], "the slope")
    axes = len(reader.shape)
    sizes = [1] * (axes - slope.ndim) + list(slope.shape)
    if slope.numel() > 1 and (axes < 2 or sizes[1] != slope.numel()):
        raise Unsupported("slopes that are neither one nor one per channel")
    module = nn.PReLU(slope.numel())
    with torch.no_grad():
        module.weight.copy_(slope.flatten())
    return reader.layer(module, inputs[0])


def _softmax(function: Callable[..., Any]) -> Callable[..., Any]:
    def make(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
        if reader.opset >= 13:
            return reader.call(function, inputs[0], options.get("axis", -1))
        # before, all axes from this one on were taken together; only a last axis means the same
        axis = options.get("axis", 1)
        if axis not in (-1, len(reader.shape) - 1):
            raise Unsupported(f"axis={axis} of operator set {reader.opset}")
        return reader.call(function, inputs[0], -1)

    return make


def _hard_sigmoid(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    alpha, beta = options.get("alpha", 0.2), options.get("beta", 0.5)
    scaled = reader.call(torch.add, reader.call(torch.mul, inputs[0], alpha), beta)
    return reader.call(torch.clamp, scaled, 0.0, 1.0)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _unary(torch.add),
    "AveragePool": _pool(average=True),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Constant": _constant_node,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _unary(torch.div),
    "Dropout": lambda reader, inputs, options: inputs[0],
    "Elu": _with(F.elu, alpha=("alpha", 1.0)),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Gelu": lambda reader, inputs, options: reader.call(
        F.gelu, inputs[0], approximate=options.get("approximate", b"none").decode()
    ),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": lambda reader, inputs, options: inputs[0],
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _with(F.leaky_relu, negative_slope=("alpha", 0.01)),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _matmul,
    "MaxPool": _pool(average=False),
    "Mish": _unary(F.mish),
    "Mul": _unary(torch.mul),
    "Neg": _unary(torch.neg),
    "Pad": _pad,
    "PRelu": _prelu,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Selu": _unary(F.selu),
    "Sigmoid": _unary(torch.sigmoid),
    "Softmax": _softmax(torch.softmax),
    "Softplus": _unary(F.softplus),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _unary(torch.sub),
    "Tanh": _unary(torch.tanh),
    **SHAPE_OPERATORS,
}
