"""FARMS: spectra of weight matrices from windows of one fixed aspect ratio.

The tail exponent of a layer's eigenvalue distribution is read as a sign of how well the layer is
trained (smaller: better), but it depends on the matrix's shape as well: a wide random matrix looks
light-tailed. FARMS cuts every matrix into windows of one aspect ratio and fits the exponent to
their pooled eigenvalues, so that layers of different shapes can be compared.

Source: Hu, Goel, Killiakov, Yang, "Eigenspectrum Analysis of Neural Networks without Aspect Ratio
Bias", ICML 2025, arXiv 2506.06280; section 3.
Departures: the peak rule bounds the search below at 0.95 of the peak (``compat=True`` takes
its logarithm instead, as the published code is reported to); windows wider than the matrix are
narrowed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_integer,
    check_positive,
)

__all__ = [
    "LayerSpectrum",
    "PowerLawFit",
    "esd",
    "farms_esd",
    "hill_alpha",
    "spectral_report",
]

_FEWEST = 5


@dataclass(frozen=True)
class PowerLawFit:
    """A power law ``density ~ x^-alpha`` fitted above ``xmin``.

    Attributes:
        alpha: the exponent; NaN where it is undefined.
        xmin: where the tail begins.
        ks: Kolmogorov-Smirnov distance of the tail to the fit, in [0, 1].
    """

    alpha: float
    xmin: float
    ks: float


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectral figures of one layer.

    Attributes:
        name: of the weight.
        alpha: tail exponent, NaN where undefined.
        alpha_hat: ``alpha * log10`` of the largest eigenvalue.
        stable_rank: sum of the eigenvalues over the largest.
        log_norm: ``log10`` of the sum of the eigenvalues.
        n_eigs: eigenvalues in the fit.
    """

    name: str
    alpha: float
    alpha_hat: float
    stable_rank: float
    log_norm: float
    n_eigs: int


def esd(matrix: Tensor) -> Tensor:
    """Eigenvalues of ``W^T W``, ascending: the squared singular values.

    Args:
        matrix: ``(R, C)`` float, or ``(..., R, C)`` in one batched call.

    Returns:
        ``(..., min(R, C))``; float32 for the half types.

    Raises:
        TypeError: not floating point.
        ValueError: fewer than two axes, or not finite.
    """
    check_float_tensor("esd", "matrix", matrix)
    if matrix.ndim < 2:
        raise ValueError(f"esd: matrix must have two axes or more; got {tuple(matrix.shape)}.")
    check_finite("esd", "matrix", matrix)
    wide = matrix.detach() if matrix.dtype == torch.float64 else matrix.detach().float()
    values: Tensor = torch.linalg.svdvals(wide)
    return values.square().flip(-1)


def farms_esd(
    weight: Tensor,
    *,
    rows: int | None = None,
    aspect: float = 1.0,
    windows: int | tuple[int, int] = 10,
    conv: str = "slices",
) -> Tensor:
    """Pooled eigenvalues of a weight's windows, all of one aspect ratio.

    Args:
        weight: ``(R, C)`` or a convolution ``(out, in, kh, kw)``.
        rows: height of a window; None is the shorter side. At most the shorter side.
        aspect: width over height, ``> 0``; 1 throughout the paper.
        windows: starts per axis, for rows and columns; repeated starts count once.
        conv: ``"slices"``: the kernel positions, each a matrix of ``out`` by ``in`` times
            ``sqrt(0.5)``, pooled; ``"flat"``: one matrix ``(out, in * kh * kw)``.

    Returns:
        ``(n,)`` eigenvalues, ascending.

    Raises:
        TypeError: not floating point.
        ValueError: the shape or an option is not accepted, or a weight is not finite.
    """
    blocks = _farms_blocks(weight, rows, aspect, windows, conv)
    return torch.cat(blocks).sort().values


def _farms_blocks(
    weight: Tensor,
    rows: int | None,
    aspect: float,
    windows: int | tuple[int, int],
    conv: str,
) -> list[Tensor]:
    """Pools to fit one by one: one for a matrix, one per row block for a convolution."""
    _check_weight("farms_esd", weight)
    check_positive("farms_esd", "aspect", aspect)
    check_choice("farms_esd", "conv", conv, ["slices", "flat"])
    if rows is not None:
        check_integer("farms_esd", "rows", rows, 2)
    if weight.ndim == 4 and conv == "slices":
        return _conv_blocks(weight, aspect)
    matrix = weight.detach().flatten(1)
    counts = (windows, windows) if isinstance(windows, int) else windows
    for count in counts:
        check_integer("farms_esd", "windows", count, 1)
    height = min(matrix.shape) if rows is None else min(rows, *matrix.shape)
    # a window wider than the matrix would change the aspect ratio: lower it instead
    height = max(1, min(height, int(matrix.shape[1] / aspect)))
    width = max(1, int(height * aspect))
    top, left = (
        _starts(size, window, count)
        for size, window, count in zip(matrix.shape, (height, width), counts, strict=True)
    )
    stack = torch.stack([matrix[i : i + height, j : j + width] for i in top for j in left])
    return [esd(stack).flatten()]


def _conv_blocks(weight: Tensor, aspect: float) -> list[Tensor]:
    slices = weight.detach().flatten(2).movedim(-1, 0) * math.sqrt(0.5)
    if slices.shape[1] < slices.shape[2]:
        slices = slices.transpose(1, 2)
    columns = slices.shape[2]
    count = slices.shape[1] // columns
    high = max(1, int(columns / aspect)) if aspect > 1 else columns
    wide = columns if aspect > 1 else max(1, int(columns * aspect))
    return [esd(slices[:, i * columns : i * columns + high, :wide]).flatten() for i in range(count)]


def _starts(size: int, window: int, count: int) -> list[int]:
    step = max(1, (size - window) // (count - 1)) if count > 1 else 1
    return sorted({min(i * step, size - window) for i in range(count)})


def _check_weight(subject: str, weight: Tensor) -> None:
    check_float_tensor(subject, "weight", weight)
    if weight.ndim not in (2, 4):
        raise ValueError(
            f"{subject}: weight must have two or four axes; got {tuple(weight.shape)}."
        )
    check_finite(subject, "weight", weight)


def hill_alpha(
    eigs: Tensor, method: str = "median", xmin_pos: int = 2, *, compat: bool = False
) -> PowerLawFit:
    """Hill's estimate of the tail exponent of a density.

    Args:
        eigs: ``(n,)`` eigenvalues, ``>= 0``, in any order.
        method: where the tail begins: ``"median"``: the upper ``1 - 1/xmin_pos`` of the values;
            ``"ks"``: where the Kolmogorov-Smirnov distance is smallest; ``"peak"``: the same,
            near the fullest bin of a histogram of the logarithms.
        xmin_pos: for ``"median"``, ``>= 2``.
        compat: for ``"peak"``, the lower bound of the authors' code (the logarithm of 0.95 of
            the peak), which in effect is none.

    Returns:
        The fit; NaN with fewer than five eigenvalues or none above zero (with a warning).

    Raises:
        ValueError: an option is not accepted, or a value is negative or not finite.
    """
    check_choice("hill_alpha", "method", method, ["median", "peak", "ks"])
    check_integer("hill_alpha", "xmin_pos", xmin_pos, 2)
    check_finite("hill_alpha", "eigs", eigs)
    values = eigs.detach().double().flatten().sort().values
    if values.numel() and float(values[0]) < 0:
        raise ValueError(f"hill_alpha: eigs must be at least 0; got {float(values[0])}.")
    n = values.numel()
    start = n // xmin_pos
    if n < _FEWEST or float(values[-1]) == 0 or (method == "median" and values[start] == 0):
        warnings.warn("hill_alpha: too few eigenvalues above zero; alpha is NaN.", stacklevel=2)
        return PowerLawFit(math.nan, math.nan, math.nan)
    if method == "median":
        return _fit(values, start)
    low, high = float(values[values > 0][0]), math.inf
    if method == "peak":
        logs = values[values > 0].log10()
        counts = torch.histc(logs, 100)
        edge = torch.linspace(float(logs[0]), float(logs[-1]), 101).double()[counts.argmax()]
        peak = 10 ** float(edge)
        low, high = (math.log10(0.95 * peak) if compat else 0.95 * peak), 1.5 * peak
    starts = [
        i
        for i in range(n - 1)
        if values[i] > 0 and low <= values[i] <= high and values[i] < values[-1]
    ]
    fits = [_fit(values, i) for i in starts or [start]]
    return min(fits, key=lambda fit: fit.ks)


def _fit(values: Tensor, start: int) -> PowerLawFit:
    tail = values[start:]
    n, xmin = tail.numel(), tail[0]
    spread = float((tail / xmin).log().sum())
    if spread == 0:
        return PowerLawFit(math.inf, float(xmin), 1.0)
    alpha = 1 + n / spread
    model = 1 - (tail / xmin) ** (1 - alpha)
    seen = torch.arange(n, dtype=torch.float64) / n
    return PowerLawFit(alpha, float(xmin), float((model - seen).abs().max()))


def spectral_report(
    model: nn.Module | Mapping[str, Tensor],
    estimator: str = "farms",
    *,
    rows: int | None = None,
    aspect: float = 1.0,
    windows: int | tuple[int, int] = 10,
    method: str = "median",
) -> list[LayerSpectrum]:
    """Spectral figures of every linear and convolution weight.

    Args:
        model: a module or its state dict.
        estimator: ``"farms"`` or ``"full"`` (whole matrices; kernel positions pooled).
        rows: window height for all matrices; None uses the shortest side in the model, so that
            all windows are of one size.
        aspect: as for :func:`farms_esd`.
        windows: as for :func:`farms_esd`.
        method: as for :func:`hill_alpha`.

    Returns:
        One entry per weight of two or four axes, in order; layers without an exponent have NaN.

    Raises:
        ValueError: an option is not accepted, or a weight is not finite.
    """
    check_choice("spectral_report", "estimator", estimator, ["farms", "full"])
    state = model.state_dict() if isinstance(model, nn.Module) else model
    weights = {n: v for n, v in state.items() if v.ndim in (2, 4) and v.is_floating_point()}
    if rows is None and weights:
        rows = max(2, min(min(v.shape[0], v.flatten(1).shape[1]) for v in weights.values()))
    report = []
    for name, value in weights.items():
        _check_weight("spectral_report", value)
        if estimator == "farms":
            pools = _farms_blocks(value, rows, aspect, windows, "slices")
        else:
            whole = value.detach()
            slices = whole[None] if whole.ndim == 2 else whole.flatten(2).movedim(-1, 0) * 0.5**0.5
            pools = [esd(slices).flatten()]
        report.append(_summary(name, pools, method))
    return report


def _summary(name: str, pools: list[Tensor], method: str) -> LayerSpectrum:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alphas = [hill_alpha(pool, method).alpha for pool in pools]
    usable = [alpha for alpha in alphas if not math.isnan(alpha)]
    if not usable:
        warnings.warn(f"spectral_report: '{name}' has no tail exponent; skipped.", stacklevel=3)
    alpha = sum(usable) / len(usable) if usable else math.nan
    pooled = torch.cat(pools).double()
    top, total = float(pooled.max()), float(pooled.sum())
    return LayerSpectrum(
        name,
        alpha,
        alpha * math.log10(top) if top > 0 else math.nan,
        total / top if top > 0 else 0.0,
        math.log10(total) if total > 0 else -math.inf,
        pooled.numel(),
    )
