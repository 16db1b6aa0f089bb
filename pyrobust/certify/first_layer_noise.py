"""Gaussian input noise drawn after a first linear layer, where there are fewer numbers to draw.

For a network that begins with ``y = W x + b``, H outputs of D inputs, noise ``N(0, sigma^2 I)`` on
``x`` is noise ``N(0, sigma^2 W W^T)`` on ``y``, and the rest of the network sees nothing else. With
``H < D`` drawing that takes H normals and an H x H product per copy instead of D normals and a
D x H product. Exact in distribution: a certificate holds for the whole network and its input, under
the rounding of float32 that any evaluation has. The votes differ from those of noise on the input,
since other random numbers make them.

The factor comes from the QR decomposition of ``W^T`` in float64, ``W W^T = R^T R``, which needs no
full rank and does not square the condition number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_float_tensor, check_positive
from pyrobust.nn._hooks import is_customised
from pyrobust.ops.sampling import gaussian_samples

__all__ = ["after_linear_samples", "noise_factor", "split_first_linear"]


def noise_factor(weight: Tensor) -> Tensor:
    """``R`` with ``R^T R = W W^T``: ``z @ R`` has the covariance of ``W`` times white noise.

    Args:
        weight: ``(H, D)`` float.

    Returns:
        ``(min(H, D), H)`` float64 on the device of ``weight``, upper triangular.

    Raises:
        TypeError: ``weight`` is not floating-point.
        ValueError: ``weight`` is not a matrix or not finite.

    Example:
        >>> factor = noise_factor(torch.tensor([[3.0, 4.0]]))
        >>> round(abs(factor.item()), 6)
        5.0
    """
    subject = "noise_factor"
    check_float_tensor(subject, "weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"{subject}: weight must have shape (H, D); got {tuple(weight.shape)}.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{subject}: weight must be finite; it holds NaN or infinite values.")
    factor: Tensor = torch.linalg.qr(weight.detach().double().T, mode="r").R
    return factor


def after_linear_samples(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float,
    n: int,
    *,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
    factor: Tensor | None = None,
) -> Tensor:
    """Outputs ``W (x + sigma z) + b`` of a linear layer on ``n`` noisy copies, without the copies.

    Args:
        x: ``(B, D)`` float32 inputs on the CPU.
        weight: ``(H, D)`` float32.
        bias: ``(H,)`` float32, or None.
        sigma: standard deviation of the noise on ``x``, ``> 0``.
        n: number of samples per input, ``>= 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        first_sample: sample index of the first copy.
        first_index: image index of ``x[0]``.
        factor: :func:`noise_factor` of ``weight``, to compute it once; None computes it.

    Returns:
        ``(B, n, H)`` float32. Row ``[b, j]`` depends on ``x[b]`` and its position only, up to the
        order of summation in a matrix product. Differentiable in ``x``; the noise is a constant.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: ``sigma`` not positive, shapes that disagree, or a position out of range.

    Example:
        >>> weight = torch.ones(1, 400) / 20
        >>> y = after_linear_samples(torch.zeros(1, 400), weight, None, 0.5, 4000, seed=0)
        >>> bool(abs(y.std() - 0.5) < 0.03)
        True
    """
    subject = "after_linear_samples"
    check_float_tensor(subject, "x", x)
    check_positive(subject, "sigma", sigma)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{subject}: x must be (B, D) and weight (H, D); got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    factor = noise_factor(weight) if factor is None else factor
    with torch.no_grad():
        white = gaussian_samples(
            torch.zeros(x.shape[0], factor.shape[0]),
            1.0,
            n,
            seed=seed,
            first_sample=first_sample,
            first_index=first_index,
        )
        noise = white @ (sigma * factor).float()
    return F.linear(x, weight, bias)[:, None] + noise


def split_first_linear(base: nn.Module) -> tuple[nn.Linear, nn.Module]:
    """The first linear layer of a network and all that follows it.

    Args:
        base: ``nn.Sequential`` of an optional ``nn.Flatten`` and an ``nn.Linear`` with fewer
            outputs than inputs, and further layers.

    Returns:
        The layer, and an ``nn.Sequential`` that shares the other layers, in the mode of ``base``.

    Raises:
        ValueError: the network does not begin so, its first layer does not narrow, or hooks may
            change what the layers before the rest compute.

    Example:
        >>> base = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> linear, rest = split_first_linear(base)
        >>> linear.out_features, len(rest)
        (16, 2)
    """
    subject = "split_first_linear"
    layers = list(base) if type(base) is nn.Sequential else []
    bypassed = [base]
    if layers and type(layers[0]) is nn.Flatten and layers[0].start_dim == 1:
        bypassed.append(layers.pop(0))
    if not layers or type(layers[0]) is not nn.Linear:
        raise ValueError(
            f"{subject}: base must be a Sequential of an optional Flatten, a Linear and further "
            f"layers; got {type(base).__name__}"
            + (f" that starts with {type(layers[0]).__name__}." if layers else ".")
        )
    if any(is_customised(module) for module in (*bypassed, layers[0])):
        raise ValueError(
            f"{subject}: base must have no hooks and no forward of its own up to its first layer, "
            "which would not be called."
        )
    linear, rest = layers[0], nn.Sequential(*layers[1:])
    if linear.out_features >= linear.in_features:
        raise ValueError(
            f"{subject}: the first layer must have fewer outputs than inputs, else noise on the "
            f"input is cheaper; it has {linear.out_features} of {linear.in_features}."
        )
    rest.training = base.training  # of the container; the layers keep theirs
    return linear, rest
