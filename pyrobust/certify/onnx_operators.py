"""How each ONNX operator becomes a torch layer or function; used by :func:`load_onnx`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrobust.certify.onnx_constants import CONSTANT_OPERATORS
from pyrobust.certify.onnx_shapes import SHAPE_OPERATORS, Unsupported, axes_of, constant, known

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


def _div(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if all(isinstance(v, Tensor) and not v.is_floating_point() for v in inputs):
        return torch.div(*inputs, rounding_mode="trunc")  # of sizes
    return reader.call(torch.div, *inputs)


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


def _window(
    options: dict[str, Any], axes: int, kernel: tuple[int, ...] = ()
) -> tuple[Any, list[int] | None]:
    """Symmetric padding, or zero and the amounts of ``F.pad``; with ``kernel``, of stride 1 too."""
    pads = list(options.get("pads", [0] * 2 * axes))
    auto = options.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER") and kernel and max(options.get("strides", [1])) == 1:
        gaps = options.get("dilations", [1] * axes)
        totals = [gap * (size - 1) for gap, size in zip(gaps, kernel, strict=True)]
        less, more = [n // 2 for n in totals], [n - n // 2 for n in totals]
        pads = less + more if auto == b"SAME_UPPER" else more + less
    elif auto not in (b"NOTSET", b"VALID"):
        raise Unsupported(f"auto_pad={auto.decode()}")
    begin, end = pads[:axes], pads[axes:]
    if begin == end:
        return tuple(begin), None
    amounts = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    return (0,) * axes, amounts


def _conv(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    weight = constant(inputs[1], "the weight")
    bias = constant(inputs[2], "the bias") if len(inputs) > 2 else None
    axes = weight.ndim - 2
    padding, amounts = _window(options, axes, tuple(weight.shape[2:]))
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


def _global_pool(function: Callable[..., Any]) -> Callable[..., Any]:
    def make(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
        axes = len(reader.shape)
        if axes < 3:
            raise Unsupported(f"an input of {axes} axes")
        return reader.call(function, inputs[0], list(range(2, axes)), keepdim=True)

    return make


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


_PAD_MODES = {
    b"constant": "constant",
    b"reflect": "reflect",
    b"edge": "replicate",
    b"wrap": "circular",
}


def _pad(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    mode = options.get("mode", b"constant")
    pads = list(options["pads"]) if "pads" in options else constant(inputs[1], "pads").tolist()
    given = inputs[2] if len(inputs) > 2 else None
    value = float(constant(given, "the value")) if given is not None else options.get("value", 0.0)
    half = len(pads) // 2
    axes, rank = list(range(-half, 0)), half
    if len(inputs) > 3 and inputs[3] is not None:
        rank = len(reader.shape)
        axes = [a if a < 0 else a - rank for a in constant(inputs[3], "axes").tolist()]
        if rank == 0:
            raise Unsupported("axes of an input of unknown shape")
    amounts = [0] * (-2 * min(axes))
    for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True):
        amounts[-2 * axis - 2 : -2 * axis] = [int(before), int(after)]
    while amounts and amounts[-2:] == [0, 0]:
        amounts = amounts[:-2]
    if len(amounts) == 2 * rank:
        raise Unsupported("pads of the batch")
    extra = {} if value == 0 else {"value": value}
    if mode != b"constant":
        extra = {"mode": _PAD_MODES[mode]}
        amounts += [0] * (2 * rank - 4 - len(amounts))  # torch wants all but channels
    return reader.call(F.pad, inputs[0], amounts, **extra)


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


def _instance_norm(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    statistics = (None, None, *(constant(value, "scale and bias") for value in inputs[1:]))
    fixed = (True, 0.0, options.get("epsilon", 1e-5))
    return reader.call(F.instance_norm, inputs[0], *statistics, *fixed)


def _of_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of two tensors, of all inputs one after the other."""

    def make(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
        value, *others = [known(v, "sizes") if isinstance(v, Tensor) else v for v in inputs]
        for other in others:
            value = reader.call(function, value, other)
        return value

    return make


def _pow(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    exponent = constant(inputs[1], "the exponent")
    if isinstance(inputs[0], Tensor):
        return torch.pow(inputs[0], exponent).to(inputs[0].dtype)
    if exponent.numel() != 1:
        raise Unsupported("several exponents")
    return reader.call(torch.pow, inputs[0], exponent.item())


def _where(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    return reader.call(torch.where, constant(inputs[0], "the condition"), *inputs[1:])


def _hard_sigmoid(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    alpha, beta = options.get("alpha", 0.2), options.get("beta", 0.5)
    scaled = reader.call(torch.add, reader.call(torch.mul, inputs[0], alpha), beta)
    return reader.call(torch.clamp, scaled, 0.0, 1.0)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": _unary(torch.abs),
    "Add": _unary(torch.add),
    "AveragePool": _pool(average=True),
    "BatchNormalization": _batch_norm,
    "Celu": _with(F.celu, alpha=("alpha", 1.0)),
    "Clip": _clip,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _div,
    "Dropout": lambda reader, inputs, options: inputs[0],
    "Elu": _with(F.elu, alpha=("alpha", 1.0)),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Gelu": lambda reader, inputs, options: reader.call(
        F.gelu, inputs[0], approximate=options.get("approximate", b"none").decode()
    ),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": lambda reader, inputs, options: inputs[0],
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _with(F.leaky_relu, negative_slope=("alpha", 0.01)),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _matmul,
    "Max": _of_all(torch.maximum),
    "MaxPool": _pool(average=False),
    "Min": _of_all(torch.minimum),
    "Mish": _unary(F.mish),
    "Mul": _unary(torch.mul),
    "Neg": _unary(torch.neg),
    "Pad": _pad,
    "PRelu": _prelu,
    "Pow": _pow,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Selu": _unary(F.selu),
    "Sigmoid": _unary(torch.sigmoid),
    "Softmax": _softmax(torch.softmax),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _unary(torch.sub),
    "Sum": _of_all(torch.add),
    "Tanh": _unary(torch.tanh),
    "Where": _where,
    **CONSTANT_OPERATORS,
    **SHAPE_OPERATORS,
}
