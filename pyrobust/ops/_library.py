"""The torch.library object of pyrobust, and the guard of the eager fast path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = [
    "assert_all",
    "autocasting",
    "call_override",
    "define",
    "differentiation_transforms",
    "dispatcher_needed",
    "dispatcher_watched",
    "function_modes",
    "onnx_exporting",
    "plain_eager",
    "refuse_forward_mode",
    "slice_by_slice",
]

# Library, not custom_op: 2.2 us a call against 8 (docs/design.md).
_LIBRARY = torch.library.Library("pyrobust", "DEF")

try:  # private names of torch; where one is missing the operator is always taken
    from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import maybe_current_level
    from torch.autograd import forward_ad as _forward_ad

    _GUARD_AVAILABLE = hasattr(_forward_ad, "_current_level")
except ImportError:  # pragma: no cover - depends on the torch version
    _GUARD_AVAILABLE = False


_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", None)  # one call instead of two


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    fallback: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Register one operator: ``schema`` without namespace, CPU kernel, fake kernel, gradients.

    ``cuda`` serves CUDA tensors; ``fallback``, written in torch operations, every other device.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    if fallback is not None:
        _LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyrobust::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"pyrobust::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    if vmap is not None and hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(f"pyrobust::{name}", vmap, lib=_LIBRARY)


def _define_assertion() -> None:
    """``assert_all``, which every backend keeps and ``torch.vmap`` hands all slices together."""
    _LIBRARY.define("assert_all(Tensor condition, str message) -> ()")
    _LIBRARY.impl(
        "assert_all",
        lambda condition, message: torch._assert_async(condition.all(), message),
        "CompositeImplicitAutograd",
    )
    operator = torch.ops.pyrobust.assert_all
    torch.fx.node.has_side_effect(operator.default)
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5

        def all_slices(
            info: Any, dims: tuple[int | None, ...], condition: Tensor, message: str
        ) -> tuple[None, None]:
            operator(condition, message)
            return None, None

        torch.library.register_vmap("pyrobust::assert_all", all_slices, lib=_LIBRARY)


_define_assertion()


def assert_all(condition: Tensor, message: str) -> None:
    """Raise RuntimeError, in compiled code too, unless ``condition`` is true throughout."""
    torch.ops.pyrobust.assert_all(condition, message)


def call_override(
    function: Callable[..., Any], operands: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """What ``function`` answers for operands of which one overrides torch's functions.

    ``torch.overrides.handle_torch_function`` takes 1.4 us to find whom to ask. Where it is the
    first operand, no tensor itself, and nobody else is concerned, it is asked at once.
    """
    kind = type(operands[0])
    asked_alone = (
        not torch.compiler.is_compiling()
        and _len_torch_function_stack() == 0
        and not issubclass(kind, Tensor)
        and not has_torch_function(operands[1:])
    )
    if asked_alone and hasattr(kind, "__torch_function__"):
        return kind.__torch_function__(function, (kind,), operands, options)
    return handle_torch_function(function, operands, *operands, **options)


def slice_by_slice(name: str) -> Callable[..., Any]:
    """Vmap rule: one call per slice of the mapped axis, so that ``vmap`` gives a loop's results.

    Right where a result depends on its position in the batch, as noise does: every slice sees the
    same positions, as every pass of a loop would.
    """

    def rule(info: Any, dims: tuple[int | None, ...], *values: Any) -> Any:
        operator = getattr(torch.ops.pyrobust, name)
        results = [
            operator(
                *(v if d is None else v.select(d, i) for v, d in zip(values, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(
            results[0]
        )

    return rule


def dispatcher_needed(*tensors: Tensor | None) -> bool:
    """Whether a call must go through torch's dispatcher instead of straight to the native kernel.

    False only in plain eager inference: exact ``torch.Tensor`` (or Parameter) on the CPU, none of
    which asks for a gradient while gradients are on, and nothing of :func:`dispatcher_watched`.
    """
    if dispatcher_watched():
        return True
    grad_enabled = torch.is_grad_enabled()
    for tensor in tensors:  # a generator would cost another 0.5 us
        kind = type(tensor)
        if tensor is not None and not (
            (kind is Tensor or kind is torch.nn.Parameter)
            and tensor.is_cpu
            and not (grad_enabled and tensor.requires_grad)
        ):
            return True
    return False


def plain_eager(*tensors: Tensor | None) -> bool:
    """The opposite but for gradients, which the tensors may ask for: only autograd is at work."""
    if dispatcher_watched():
        return False
    for tensor in tensors:
        kind = type(tensor)
        if tensor is not None and not (
            (kind is Tensor or kind is torch.nn.Parameter) and tensor.is_cpu
        ):
            return False
    return True


def dispatcher_watched() -> bool:
    """Whether something sees every call of an operator, whatever its tensors.

    A compiler or tracer, a forward-mode level, a functorch transform or a dispatch mode.
    """
    return (
        not _GUARD_AVAILABLE
        or torch.compiler.is_compiling()
        or _is_tracing()
        or _forward_ad._current_level >= 0
        or maybe_current_level() is not None
        or _len_torch_dispatch_stack() != 0
    )


def onnx_exporting() -> bool:
    """Whether ``torch.onnx.export`` is looking, which knows torch's own operations only."""
    watched = torch.compiler.is_compiling() or (_GUARD_AVAILABLE and _is_tracing())
    return watched and torch.onnx.is_in_onnx_export()


def autocasting() -> bool:
    """Whether autocast is on, for any kind of device that intervals know."""
    if _any_autocast is None or torch.compiler.is_compiling():
        return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return bool(_any_autocast())


def function_modes() -> bool:
    """Whether a ``TorchFunctionMode`` wants to see every torch function."""
    return not _GUARD_AVAILABLE or _len_torch_function_stack() != 0


def differentiation_transforms() -> bool:
    """Whether a functorch transform or a forward-mode level is active.

    ``torch.func.grad`` and tangents do not pass through operators of ``torch.library``; a function
    that can be written in torch's own operations around one takes those instead.
    """
    if torch.compiler.is_compiling() or not _GUARD_AVAILABLE:
        return False
    return _forward_ad._current_level >= 0 or maybe_current_level() is not None


def refuse_forward_mode(subject: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a forward-mode tangent, which the operator would drop."""
    if torch.compiler.is_compiling() or not _GUARD_AVAILABLE or _forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and _forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{subject}: forward-mode automatic differentiation.")
