"""The operations of a model in order, sorted by what linear relaxation does with each.

- *affine*: pulled back exactly. Any affine torch operation serves, through its vector-Jacobian
  product; linear and convolution layers have products of their own.
- *bend*: a function of one number with lines (:mod:`pyrobust.certify.relaxation.bends`).
- *planes*: an operation of several numbers that has planes
  (:mod:`pyrobust.certify.relaxation.joint`).
- *cut*: everything else: the value is replaced by its interval, which is valid for every operation
  that has an interval rule.

Softmax, norms, attention, quotients and their kin are written out as such operations first
(:mod:`pyrobust.certify.relaxation.decomposition`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyrobust.certify.relaxation.bends import BENDS
from pyrobust.certify.relaxation.compositions.parts import (
    centred,
    magnitude_of_centred,
    meet,
)
from pyrobust.certify.relaxation.decomposition import function_name
from pyrobust.certify.relaxation.joint import relaxation_of
from pyrobust.certify.relaxation.lines import Bend
from pyrobust.certify.relaxation.planes import Relaxation
from pyrobust.certify.relaxation.selections import (
    SELECTIONS,
    is_selection,
    magnitude_of_selection,
)
from pyrobust.interval.type import Interval
from pyrobust.nn.packed_conv import PackedConv
from pyrobust.nn.packed_linear import PackedLinear

__all__ = ["Affine", "Step", "step_of", "trace_graph"]

Product = Callable[..., Tensor]


@dataclass
class Affine:
    """An affine operation of some boxes.

    Attributes:
        apply: from the boxes' points, in the working dtype, to the value's.
        reach: the same with every coefficient and constant replaced by its magnitude; bounds the
            sum of the magnitudes of all terms, given the magnitudes of the points.
        weight: of a linear or convolution layer, else None.
        options: stride, padding, dilation, groups of a convolution, else None.
        pull: ``(S, B, *value)`` coefficients and the shape of an input to coefficients of the
            inputs, where known; else through the vector-Jacobian product.
        offset: from a tensor shaped as the value to the value at 0, where known.
        per_image: whether it is known to treat the images of a batch alike and apart.
        local: whether ``pull`` serves coefficients of windows of the value as well.
    """

    apply: Product
    reach: Product
    weight: Tensor | None = None
    options: dict[str, Any] | None = None
    pull: Callable[[Tensor, torch.Size], list[Tensor]] | None = None
    offset: Callable[[Tensor], Tensor | None] | None = None
    per_image: bool = False
    local: bool = False


@dataclass
class Step:
    """One operation.

    Attributes:
        node: of the traced graph.
        inputs: the nodes whose values are boxes, in the order of the operation's arguments.
        run: computes the value from the boxes.
        affine: where the operation is affine.
        bend: where it bends one number.
        planes: where it is an operation of several numbers with planes.
        closed: whether a value before it was replaced by parts, whose bounds may be looser than
            the interval of the result.
    """

    node: fx.Node
    inputs: list[fx.Node]
    run: Callable[..., Any]
    affine: Affine | None = None
    bend: Bend | None = None
    planes: Relaxation | None = None
    closed: bool = False


class _Tracer(fx.Tracer):
    """Keeps the library's layers whole, as torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        packed = isinstance(m, PackedLinear | PackedConv)
        return packed or super().is_leaf_module(m, module_qualified_name)


def trace_graph(model: nn.Module, subject: str) -> tuple[fx.Graph, nn.Module]:
    """The graph of ``model``.

    Raises:
        TypeError: torch.fx cannot trace the model, or it has more than one input or output.
    """
    whole = nn.Sequential(model) if _is_leaf(model) else model
    try:
        graph = _Tracer().trace(whole)
    except Exception as error:
        raise TypeError(
            f"{subject}: torch.fx cannot trace {type(model).__name__} ({error}); methods other "
            'than "ibp" need a model that it can.'
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    required = [node for node in inputs if not node.args]
    if len(required) != 1:
        raise TypeError(f"{subject}: the model must take one input; it takes {len(required)}.")
    return graph, whole


def _is_leaf(model: nn.Module) -> bool:
    return not any(True for _ in model.children())


def step_of(node: fx.Node, root: nn.Module, values: dict[fx.Node, Any], dtype: torch.dtype) -> Step:
    """The step of a node whose arguments are known."""
    inputs = [n for n in node.all_input_nodes if isinstance(values[n], Interval)]
    if node.target is meet:
        inputs = inputs[:1]

    def run(*points: Any) -> Any:
        known = {**values, **dict(zip(inputs, points, strict=True))}
        args = fx.node.map_arg(node.args, lambda n: known[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n])
        return _call(node, root, args, kwargs)

    step = Step(node, inputs, run)
    if not inputs:
        return step
    if node.op == "call_module":
        _sort_module(step, root.get_submodule(str(node.target)), dtype)
    else:
        _sort_function(step, root, values, dtype)
    return step


def _call(node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


# -- modules -------------------------------------------------------------------------------------

_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PLAIN = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
_BENT: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.PReLU: ("prelu", ("weight",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.SELU: ("selu", ()),
    nn.CELU: ("celu", ("alpha",)),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Softsign: ("softsign", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.LogSigmoid: ("logsigmoid", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.Mish: ("mish", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
}


def _sort_module(step: Step, module: nn.Module, dtype: torch.dtype) -> None:
    kind = type(module)
    if kind in _BENT:
        name, attributes = _BENT[kind]
        step.bend = BENDS[name](*(getattr(module, a) for a in attributes))
    elif isinstance(module, nn.Linear) and kind is nn.Linear:
        step.affine = _linear(module.weight, module.bias, dtype)
    elif isinstance(module, PackedLinear) and module.activations is None:
        step.affine = _linear(module.dequantize(), module.bias, dtype)
    elif kind in _CONVS or (isinstance(module, PackedConv) and module.activations is None):
        step.affine = _convolution(module, dtype)
    elif kind in _TRANSPOSED:
        step.affine = _with_parameters(module, dtype)
    elif kind in _NORMS and getattr(module, "running_var", None) is not None:
        step.affine = _normalisation(module, dtype)
    elif kind in _PLAIN:
        same = isinstance(module, nn.Identity | nn.Dropout)
        step.affine = Affine(
            module, module, pull=_reshaping(module), per_image=_is_apart(module), local=same
        )


def _is_apart(module: nn.Module) -> bool:
    shaped = isinstance(module, nn.Flatten | nn.Unflatten)
    return not shaped or getattr(module, "start_dim", getattr(module, "dim", 1)) == 1


def _reshaping(module: nn.Module) -> Callable[[Tensor, torch.Size], list[Tensor]] | None:
    if isinstance(module, nn.Flatten) and _is_apart(module):
        return lambda a, shape: [a.reshape(*a.shape[:2], *shape)]
    if isinstance(module, nn.Identity | nn.Dropout):
        return lambda a, shape: [a]
    return None


def _along_channels(values: Tensor | None) -> Callable[[Tensor], Tensor | None]:
    """The offset of a layer: its biases, the same at every place."""
    if values is None:
        return lambda like: None
    return lambda like: values.reshape(1, -1, *[1] * (like.ndim - 2))


def _magnitude(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.abs()


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Affine:
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    return Affine(
        lambda x: F.linear(x, w, b),
        lambda x: F.linear(x, w.abs(), _magnitude(b)),
        w,
        offset=lambda like: None if b is None else b.expand(1, *like.shape[1:]),
        per_image=True,
    )


def _convolution(module: Any, dtype: torch.dtype) -> Affine:
    packed = isinstance(module, PackedConv)
    function = _CONVS[module.layer_type if packed else type(module)]
    stored = module.dequantize() if packed else module.weight
    w, b = stored.to(dtype), None if module.bias is None else module.bias.to(dtype)
    options = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
    }
    if module.padding_mode != "zeros":
        border = module._reversed_padding_repeated_twice
        mode, options["padding"] = module.padding_mode, 0

        def padded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return function(F.pad(x, border, mode=mode), weight, bias, **options)

        return Affine(lambda x: padded(x, w, b), lambda x: padded(x, w.abs(), _magnitude(b)))
    plain = function is F.conv2d and not isinstance(module.padding, str)
    return Affine(
        lambda x: function(x, w, b, **options),
        lambda x: function(x, w.abs(), _magnitude(b), **options),
        w if plain else None,
        options if plain else None,
        offset=_along_channels(b) if plain else None,
        per_image=True,
    )


def _with_parameters(module: nn.Module, dtype: torch.dtype) -> Affine:
    wide = {name: p.to(dtype) for name, p in module.named_parameters()}
    positive = {name: p.abs() for name, p in wide.items()}
    call = torch.func.functional_call
    return Affine(lambda x: call(module, wide, (x,)), lambda x: call(module, positive, (x,)))


def _normalisation(module: Any, dtype: torch.dtype) -> Affine:
    scale = 1 / (module.running_var.to(dtype) + module.eps).sqrt()
    scale = scale if module.weight is None else scale * module.weight.to(dtype)
    mean = module.running_mean.to(dtype)
    shift = torch.zeros_like(mean) if module.bias is None else module.bias.to(dtype)

    def shaped(values: Tensor, x: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (x.ndim - 2))

    return Affine(
        lambda x: (x - shaped(mean, x)) * shaped(scale, x) + shaped(shift, x),
        lambda x: (x + shaped(mean.abs(), x)) * shaped(scale.abs(), x) + shaped(shift.abs(), x),
        pull=lambda a, shape: [a * shaped(scale, a[0])],
        per_image=True,
        local=True,
    )


# -- functions and methods -----------------------------------------------------------------------

# Affine in their boxes with coefficients that are 0, positive or those of constant arguments.
_MOVES = {
    "add", "iadd", "sum", "mean", "flatten", "reshape", "view", "permute", "transpose", "t",
    "squeeze", "unsqueeze", "expand", "contiguous", "clone", "cat", "concat", "stack", "pad",
    "_pad", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "getitem", "swapaxes", "movedim", "unflatten", "pixel_shuffle",
    "repeat", "tile", "narrow", "select", "flip", "positive", "linear", "conv1d", "conv2d",
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul", "__matmul__",
    "bmm", "mm", "cumsum", "index_select", "roll", "tril", "triu", "moveaxis", "concatenate",
    "repeat_interleave", "pixel_unshuffle",
}  # fmt: skip
_MATRICES = {"matmul", "__matmul__", "bmm", "mm"}
_OUTER = {"neg", "sub", "isub", "rsub"}
_SCALED = {"mul", "imul", "div", "truediv", "itruediv", "true_divide", "multiply"}
_ALIASES = {
    "absolute": "abs",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "log_sigmoid": "logsigmoid",
    "expit": "sigmoid",
    "special_expit": "sigmoid",
    "__pow__": "pow",
}


def _sort_function(step: Step, root: nn.Module, values: dict[fx.Node, Any], dtype: Any) -> None:
    node = step.node
    name = function_name(node)
    if node.target in (meet, centred):
        step.affine, step.closed = _own(node), node.target is meet
        return
    if len(step.inputs) == 1 and node.args and node.args[0] is step.inputs[0]:
        step.bend = _bend(name, node, values)
    if step.bend is not None:
        return
    boxes = set(step.inputs)
    moves = name in _MOVES and not _signed(name, node, boxes)
    moves = moves or is_selection(name, node, values)
    if moves or name in _OUTER or (name in _SCALED and _scales(name, node, boxes)):
        step.affine = _function(step, root, values, dtype, name)
        if name in ("add", "iadd") and len(boxes) == 2 and _alike(step, values):
            step.affine.pull = lambda a, shape: [a, a]
            step.affine.local = True
    else:
        step.planes = relaxation_of(name, node, values, step.inputs)


def _own(node: fx.Node) -> Affine:
    """The affine operations that composite ones are written with."""
    if node.target is meet:
        same = lambda x: x  # noqa: E731
        return Affine(same, same, pull=lambda a, shape: [a], per_image=True, local=True)
    dims: Any = node.args[1]

    def pull(a: Tensor, shape: torch.Size) -> list[Tensor]:
        return [a - a.mean(dims, keepdim=True)]  # it is its own adjoint

    return Affine(
        lambda x: centred(x, dims),
        lambda x: magnitude_of_centred(x, dims),
        pull=pull,
        offset=lambda like: None,
        per_image=True,
    )


def _alike(step: Step, values: dict[fx.Node, Any]) -> bool:
    """Whether two boxes have one shape, so that a sum broadcasts neither."""
    first, second = (values[n].shape for n in step.inputs)
    return bool(first == second)


def _signed(name: str, node: fx.Node, boxes: set[fx.Node]) -> bool:
    """Whether an option makes the coefficients negative, or both factors are boxes."""
    if name in _MATRICES and len(boxes) != 1:
        return True
    if name in ("linear", "addmm") or name.startswith("conv"):
        return any(a in boxes for a in node.args[1:] if isinstance(a, fx.Node))
    padded = name in ("pad", "_pad") and (len(node.args) > 3 or bool(node.kwargs.get("value")))
    return padded or "alpha" in node.kwargs or "out" in node.kwargs


def _scales(name: str, node: fx.Node, boxes: set[fx.Node]) -> bool:
    """Whether a product or quotient has one box, and not as divisor or squared."""
    if len(boxes) != 1 or len(node.args) != 2:
        return False
    (box,) = boxes
    first, second = node.args
    return (first is box) != (second is box) and ("div" not in name or first is box)


def _bend(name: str, node: fx.Node, values: dict[fx.Node, Any]) -> Bend | None:
    make = BENDS.get(_ALIASES.get(name, name))
    if make is None:
        return None
    known = lambda n: values[n]  # noqa: E731
    args = list(fx.node.map_arg(node.args[1:], known))
    kwargs = dict(fx.node.map_arg(node.kwargs, known))
    kwargs.pop("inplace", None)
    if name == "clamp_max":
        args = [None, *args]
    flags = {"relu": 0, "relu6": 0, "silu": 0, "mish": 0, "hardswish": 0, "selu": 0}
    limits = {"hardtanh": 2, "leaky_relu": 1, "elu": 1, "celu": 1, **flags}
    return make(*args[: limits.get(name, len(args))], **kwargs)


def _function(
    step: Step, root: nn.Module, values: dict[fx.Node, Any], dtype: Any, name: str
) -> Affine:
    node, inputs = step.node, step.inputs

    def call(points: tuple[Tensor, ...], change: Callable[[Tensor], Tensor], sign: bool) -> Tensor:
        def known(n: fx.Node) -> Any:
            if n in inputs:
                return points[inputs.index(n)]
            value = values[n]
            floats = isinstance(value, Tensor) and value.is_floating_point()
            return change(value.to(dtype)) if floats else value

        args = fx.node.map_arg(node.args, known)
        kwargs = fx.node.map_arg(node.kwargs, known)
        if sign and (name in _OUTER or name in _SCALED):
            return _of_magnitudes(name, *args)
        if sign and name in ("add", "iadd"):
            args = tuple(abs(a) if isinstance(a, int | float) else a for a in args)
        if sign and name in SELECTIONS:
            return magnitude_of_selection(name, lambda a, k: _call(node, root, a, k), args, kwargs)
        result = _call(node, root, args, kwargs)
        assert isinstance(result, Tensor)
        return result

    return Affine(
        lambda *points: call(points, lambda t: t, False),
        lambda *points: call(points, torch.abs, True),
    )


def _of_magnitudes(name: str, *args: Any) -> Tensor:
    sizes = [abs(a) for a in args]
    if name == "neg":
        result: Tensor = sizes[0]
    elif name in _OUTER:
        result = sizes[0] + sizes[1]
    elif "div" in name:
        result = operator.truediv(sizes[0], sizes[1])
    else:
        result = operator.mul(sizes[0], sizes[1])
    return result
