"""Upper bounds of l2 Lipschitz constants, layer by layer.

The constant of a chain is at most the product of its layers'. A linear layer's is its spectral
norm. A convolution's is at most the largest spectral norm of its transfer matrix over all
frequencies: zero padding cuts a section out of the full convolution and a stride drops outputs,
neither of which can raise the norm. The largest value over a grid of ``N`` points per axis is
raised by Bernstein's inequality: a trigonometric polynomial of degree ``d`` changes by at most ``d
pi / N`` of its maximum between a point and the nearest grid point, so over ``D`` axes the maximum
is at most the grid's divided by ``1 - D d pi / N``.

Source: H. Sedghi, V. Gupta, P. Long, "The Singular Values of Convolutional Layers", ICLR 2019,
arXiv 1805.10408 (transfer matrices); S. Bernstein's inequality for the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyrobust.nn._hooks import is_customised
from pyrobust.nn.packed_conv import PackedConv, PackedConv1d, PackedConv2d
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.packed_sequential import PackedSequential

__all__ = ["conv_norm_bound", "lipschitz_bound"]

# Far above the rounding of a float64 singular value.
_OUTWARD = 1 + 1e-9
_GRID = 64
_CHAINS = (nn.Sequential, PackedSequential)


def lipschitz_bound(module: nn.Module) -> float:
    """An upper bound of the l2 Lipschitz constant of ``module`` in evaluation mode.

    Args:
        module: an ``nn.Sequential``, nested at will, of linear and convolutional layers (float or
            packed without activation rounding; zero or circular padding), batch norms, pooling,
            flattening, dropout and 1-Lipschitz activations; or one such layer.

    Returns:
        The bound, for the real function of the stored weights.

    Raises:
        NotImplementedError: a layer without a rule, or with hooks, named.
        ValueError: the module is in training mode.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> round(lipschitz_bound(nn.Sequential(layer, nn.ReLU()).eval()), 6)
        3.0
    """
    if module.training:
        raise ValueError("lipschitz_bound: the module must be in evaluation mode; call .eval().")
    if is_customised(module):
        raise NotImplementedError(
            f"lipschitz_bound: {type(module).__name__} has hooks or a forward of its own, of which "
            "nothing is known."
        )
    if isinstance(module, nn.Sequential) and type(module) in _CHAINS:  # others may do more
        return math.prod(lipschitz_bound(layer) for layer in module)
    for kinds, rule in _RULES:
        if type(module) in kinds:
            return rule(module)
    raise NotImplementedError(f"lipschitz_bound: no rule for {type(module).__name__}.")


def conv_norm_bound(weight: Tensor, groups: int = 1) -> float:
    """An upper bound of the spectral norm of a convolution, any stride, dilation and input size.

    Args:
        weight: ``(out, in / groups, *kernel)``, one to three kernel axes.
        groups: as in torch.

    Returns:
        The bound, for zero or circular padding.
    """
    axes = weight.ndim - 2
    grid = _GRID if axes < 3 else 16
    degrees = sum((size - 1) / 2 for size in weight.shape[2:])
    while degrees * math.pi >= 0.25 * grid:
        grid *= 2
    spectrum = torch.fft.fftn(
        weight.detach().double(), s=[grid] * axes, dim=tuple(range(2, axes + 2))
    )
    largest = 0.0
    for part in spectrum.chunk(groups, dim=0):
        matrices = part.flatten(2).permute(2, 0, 1)
        gram = matrices @ matrices.mH if part.shape[0] <= part.shape[1] else matrices.mH @ matrices
        largest = max(largest, float(torch.linalg.eigvalsh(gram).amax().clamp(min=0).sqrt()))
    return largest / (1 - degrees * math.pi / grid) * _OUTWARD


def _spectral(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), ord=2)) * _OUTWARD


def _linear(module: nn.Module) -> float:
    assert isinstance(module, nn.Linear)
    return _spectral(module.weight)


def _packed(module: nn.Module) -> float:
    assert isinstance(module, PackedLinear | PackedConv)
    if module.activations is not None:
        raise NotImplementedError(
            f"lipschitz_bound: {type(module).__name__} with activations={module.activations!r} "
            "rounds its input and has no Lipschitz constant."
        )
    weight = module.dequantize()
    if isinstance(module, PackedLinear):
        return _spectral(weight)
    _check_padding(module.padding_mode)
    return conv_norm_bound(weight, module.groups)


def _conv(module: nn.Module) -> float:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    _check_padding(module.padding_mode)
    return conv_norm_bound(module.weight, module.groups)


def _check_padding(mode: str) -> None:
    if mode not in ("zeros", "circular"):
        raise NotImplementedError(f"lipschitz_bound: no rule for padding_mode={mode!r}.")


def _batch_norm(module: nn.Module) -> float:
    assert isinstance(module, _NORMS)
    if module.running_var is None:
        raise NotImplementedError("lipschitz_bound: a batch norm without running statistics.")
    factor = 1 / (module.running_var.double() + module.eps).sqrt()
    if module.weight is not None:
        factor = factor * module.weight.detach().double().abs()
    return float(factor.max().item()) * _OUTWARD


def _pool(module: nn.Module) -> float:
    """A window's mean or maximum is at most its norm; windows that overlap count inputs again."""
    assert isinstance(module, _POOLS)
    axes = int(type(module).__name__[-2])
    if getattr(module, "divisor_override", None) is not None:
        raise NotImplementedError(
            f"lipschitz_bound: no rule for divisor_override={module.divisor_override}."
        )
    sizes, steps = _per_axis(module.kernel_size, axes), _per_axis(module.stride, axes)
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        widen = _per_axis(module.dilation, axes)
        spans = [d * (k - 1) + 1 for k, d in zip(sizes, widen, strict=True)]
        return math.sqrt(_overlap(spans, steps))
    if module.ceil_mode or not module.count_include_pad:
        return math.sqrt(_overlap(sizes, steps))  # a window at the border may have few elements
    # Else a convolution by a constant kernel, whose transfer function is largest, 1, at 0.
    return _OUTWARD / math.sqrt(math.prod(sizes)) if _overlap(sizes, steps) == 1 else 1.0


def _per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * axes


def _overlap(sizes: Sequence[int], steps: Sequence[int]) -> float:
    """Most windows that one input belongs to."""
    return float(math.prod(math.ceil(k / s) for k, s in zip(sizes, steps, strict=True)))


def _softplus(module: nn.Module) -> float:
    """The smooth function; torch's steps by less than 2.1e-9 / beta at its threshold of 20."""
    assert isinstance(module, nn.Softplus)
    if module.threshold < 20 or module.beta <= 0:
        raise NotImplementedError(
            "lipschitz_bound: Softplus needs beta > 0 and a threshold of at least 20; got "
            f"{module.beta:g} and {module.threshold:g}."
        )
    return 1.0


def _leaky(module: nn.Module) -> float:
    assert isinstance(module, nn.LeakyReLU)
    return max(1.0, abs(module.negative_slope))


_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ONE = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Softsign,
)
_RULES: list[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module], float]]] = [
    ((nn.Linear,), _linear),
    ((PackedLinear, PackedConv1d, PackedConv2d), _packed),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    (_NORMS, _batch_norm),
    (_POOLS, _pool),
    ((nn.LeakyReLU,), _leaky),
    ((nn.Softplus,), _softplus),
    ((nn.Sigmoid,), lambda module: 0.25),
    (_ONE, lambda module: 1.0),
]
