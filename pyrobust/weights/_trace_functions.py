"""How functions and tensor methods move units: sums, products, reshapes (``trace_spec``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyrobust.weights._trace_call import Call, Layout, Recorder, pin_all
from pyrobust.weights._unit_classes import Axis, Run, join, narrow, pin, regroup

__all__ = ["function_rule", "reshape_layout"]


def function_rule(call: Call, recorder: Recorder) -> Any:
    """Layout of a function's or method's result; None for a result that is no tensor."""
    target = call.node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    rule = _FUNCTIONS.get(name.strip("_"))
    result = rule(call) if rule is not None else None
    if result is not None or not _holds_tensor(call.result):
        return result
    return pin_all(call, recorder, f"no rule for {name} here")


def _holds_tensor(value: Any) -> bool:
    """Sizes and numbers move nothing."""
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _same(call: Call) -> Layout | None:
    layout = call.layout(0, call.args[0])
    return layout if len(layout) == len(call.free) else None


def _pool(call: Call) -> Layout | None:
    layout = call.layout(0, call.args[0])
    return None if any(layout[2:]) else layout


def _broadcast(call: Call) -> Layout | None:
    """Elementwise in two operands: axes of equal size are joined."""
    operands = [
        (value, call.layout(i, value))
        for i, value in enumerate(call.args[:2])
        if isinstance(value, Tensor)
    ]
    result: list[Axis | None] = []
    for axis in range(-call.result.ndim, 0):
        parts = [
            layout[axis]
            for value, layout in operands
            if value.ndim >= -axis and value.shape[axis] == call.result.shape[axis]
        ]
        joined = parts[0] if parts else None
        for part in parts[1:]:
            joined = join(joined, part)
        result.append(joined)
    return tuple(result)


def _matmul(call: Call) -> Layout | None:
    first, second = call.args[0], call.args[1]
    a, b = call.layout(0, first), call.layout(1, second)
    if first.ndim != second.ndim or first.ndim < 2:
        return None
    join(a[-1], b[-2])
    batch = tuple(join(x, y) for x, y in zip(a[:-2], b[:-2], strict=True))
    return (*batch, a[-2], b[-1])


def _attention(call: Call) -> Layout | None:
    if len(call.args) < 3:
        return None
    q, k, v = (call.layout(i, call.args[i]) for i in range(3))
    join(q[-1], k[-1])
    join(k[-2], v[-2])
    batch = []
    for x, y, z in zip(q[:-2], k[:-2], v[:-2], strict=True):
        batch.append(join(join(x, y), z))
    return (*batch, q[-2], v[-1])


def _reshape(call: Call) -> Layout | None:
    layout = call.layout(0, call.args[0])
    return reshape_layout(layout, tuple(call.args[0].shape), tuple(call.result.shape))


def _permute(call: Call) -> Layout | None:
    layout = call.layout(0, call.args[0])
    given = call.argument(1, "dims", None)
    order = given if isinstance(given, (tuple, list)) else call.args[1:]
    return tuple(layout[i] for i in order)


def _transpose(call: Call) -> Layout | None:
    layout = list(call.layout(0, call.args[0]))
    if len(call.args) < 3:
        return None
    i, j = call.args[1], call.args[2]
    layout[i], layout[j] = layout[j], layout[i]
    return tuple(layout)


def _reduce(call: Call) -> Layout | None:
    """Sums, means and extremes: units that are summed over may be in any order."""
    layout = call.layout(0, call.args[0])
    if not isinstance(call.result, Tensor):
        return None
    dims = call.argument(1, "dim", None)
    given = (
        range(len(layout)) if dims is None else dims if isinstance(dims, (tuple, list)) else [dims]
    )
    gone = {dim % len(layout) for dim in given} if layout else set()
    if len(layout) == call.result.ndim:
        return tuple(None if i in gone else axis for i, axis in enumerate(layout))
    return tuple(axis for i, axis in enumerate(layout) if i not in gone)


def _softmax(call: Call) -> Layout | None:
    return call.layout(0, call.args[0])


def _concatenate(call: Call) -> Layout | None:
    parts, known = call.args[0], call.layouts[0]
    layouts = [
        layout if layout is not None else (None,) * part.ndim
        for part, layout in zip(parts, known, strict=True)
    ]
    dim = call.argument(1, "dim", 0) % call.result.ndim
    result: list[Axis | None] = []
    for axis in range(call.result.ndim):
        here = [layout[axis] for layout in layouts]
        if axis == dim:
            result.append(_chain(here))
            continue
        joined = here[0]
        for other in here[1:]:
            joined = join(joined, other)
        result.append(joined)
    return tuple(result)


def _chain(axes: list[Axis | None]) -> Axis | None:
    """Runs one after the other; a part without units pins the rest (a rare mixture)."""
    if any(axis is None for axis in axes):
        for axis in axes:
            pin(axis)
        return None
    return tuple(run for axis in axes for run in axis or ())


def _getitem(call: Call) -> Any:
    value, index = call.args[0], call.args[1]
    if not isinstance(value, Tensor):
        known = call.layouts[0]
        held = isinstance(known, tuple) and isinstance(index, int) and _holds_tensor(call.result)
        return known[index] if held else None
    layout = call.layout(0, value)
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [e for e in entries if not isinstance(e, Tensor)]:
        at = entries.index(Ellipsis)
        missing = value.ndim - sum(e is not None for e in entries) + 1
        entries[at : at + 1] = [slice(None)] * missing
    result: list[Axis | None] = []
    axis = 0
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        if isinstance(entry, slice):
            whole = entry == slice(None)
            if not whole:
                pin(layout[axis])
            result.append(layout[axis] if whole else None)
        elif isinstance(entry, int):
            pin(layout[axis])
        else:
            return None
        axis += 1
    return (*result, *layout[axis:])


def _unbind(call: Call) -> Any:
    layout = call.layout(0, call.args[0])
    dim = call.argument(1, "dim", 0) % len(layout)
    pin(layout[dim])
    rest = tuple(axis for i, axis in enumerate(layout) if i != dim)
    return tuple(rest for _ in call.result)


def _chunk(call: Call) -> Any:
    layout = call.layout(0, call.args[0])
    dim = call.argument(2, "dim", 0) % len(layout)
    if layout[dim] is not None:
        return None
    return tuple(layout for _ in call.result)


def _expand(call: Call) -> Layout | None:
    value = call.args[0]
    layout = call.layout(0, value)
    lead: Layout = (None,) * (call.result.ndim - value.ndim)
    return (*lead, *layout)


_SAME = (
    "relu relu6 leaky_relu elu selu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid "
    "softplus dropout dropout1d dropout2d clone contiguous detach neg abs exp sqrt rsqrt square "
    "float double half pow clamp to type_as"
)
_POOL = (
    "max_pool1d max_pool2d avg_pool2d avg_pool1d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_max_pool2d boolean_dispatch fn interpolate"
)
_BINARY = "add sub mul truediv div iadd isub imul radd rmul"
_FUNCTIONS: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_POOL.split(), _pool),
    **dict.fromkeys(_BINARY.split(), _broadcast),
    **dict.fromkeys(["matmul", "bmm"], _matmul),
    **dict.fromkeys(["reshape", "view", "flatten", "squeeze", "unsqueeze", "unflatten"], _reshape),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], _reduce),
    **dict.fromkeys(["softmax", "log_softmax"], _softmax),
    **dict.fromkeys(["cat", "concat", "concatenate"], _concatenate),
    **dict.fromkeys(["chunk", "split"], _chunk),
    **dict.fromkeys(["expand", "expand_as"], _expand),
    "permute": _permute,
    "transpose": _transpose,
    "scaled_dot_product_attention": _attention,
    "getitem": _getitem,
    "unbind": _unbind,
}


def reshape_layout(layout: Layout, before: tuple[int, ...], after: tuple[int, ...]) -> Layout:
    """The layout after a reshape, which merges or splits neighbouring axes."""
    result: list[Axis | None] = [None] * len(after)
    for ins, outs in _groups(before, after):
        held = [i for i in ins if layout[i] is not None]
        wide_in = [i for i in ins if before[i] != 1]
        wide_out = [j for j in outs if after[j] != 1]
        if not held:
            continue
        axis = layout[held[0]]
        if len(held) == 1 and axis is not None and len(wide_out) == 1 and held[0] in wide_in:
            place = wide_in.index(held[0])
            lead = math.prod(before[i] for i in wide_in[:place])
            trail = math.prod(before[i] for i in wide_in[place + 1 :])
            result[wide_out[0]] = _merged(axis, lead, trail)
        elif len(wide_in) == 1 and axis is not None and len(axis) == 1:
            place_out, split = _split(axis[0], [after[j] for j in wide_out])
            if split is not None:
                result[wide_out[place_out]] = (split,)
        else:
            for i in held:
                pin(layout[i])
    return tuple(result)


def _merged(axis: Axis, lead: int, trail: int) -> Axis | None:
    if lead == 1 and trail == 1:
        return axis
    if lead != 1 and len(axis) != 1:
        pin(axis)
        return None
    return tuple(Run(run.units, lead * run.length * trail, lead * run.outer) for run in axis)


def _split(run: Run, sizes: list[int]) -> tuple[int, Run | None]:
    """Heads of one axis: ``(heads, width)``, or ``(outer, heads, width)`` of a fused projection."""
    if len(sizes) == 3 and run.outer == 1 and not regroup(run, sizes[0]):
        return 0, None
    place = 0 if run.outer == 1 else 1
    if run.outer not in (1, sizes[0]) or place >= len(sizes):
        pin((run,))
        return 0, None
    narrow(run, sizes[place])
    return place, Run(run.units, sizes[place])


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest stretches of axes whose products agree on both sides."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        ins, outs = [], []
        left = right = 1
        while True:
            if i < len(before) and (left <= right or j >= len(after)):
                left *= before[i]
                ins.append(i)
                i += 1
            elif j < len(after):
                right *= after[j]
                outs.append(j)
                j += 1
            else:
                break
            if left == right and ins and outs:
                break
        while i < len(before) and before[i] == 1 and not (j < len(after) and after[j] == 1):
            ins.append(i)
            i += 1
        while j < len(after) and after[j] == 1 and not (i < len(before) and before[i] == 1):
            outs.append(j)
            j += 1
        groups.append((ins, outs))
    return groups
