"""Adaptive smoothing: an accurate and a robust classifier mixed in probability space.

A robust classifier is more confident where it is right than where it is wrong, even under attack;
an accurate one added with a small weight corrects its errors on clean inputs and rarely overrules
its right answers. From a robust weight of 1/2 on the robust part's certificate carries over
(:mod:`pyrobust.certify.mixture_radius`). A small network can choose the weight for each input.

Source: Y. Bai, B. Anderson, A. Kim, S. Sojoudi, "Improving the Accuracy-Robustness Trade-Off of
Classifiers via Adaptive Smoothing", arXiv 2301.12554, equations 3 to 5 and section 5.
Departures: probabilities are mixed in log space (the logarithm of a mixture of two underflown
softmaxes is not finite); certificates take confidence bounds and the lowest possible weight.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import (
    check_at_least,
    check_eval_mode,
    check_finite,
    check_float_tensor,
    check_instance,
    check_positive,
    check_unit,
)
from pyrobust.certify.bound import bound, margin_specification
from pyrobust.certify.certificates import ABSTAIN, Certificate
from pyrobust.certify.mixture_radius import NO_RADIUS
from pyrobust.interval import Interval
from pyrobust.nn.feature_tap import FeatureTap

__all__ = ["AdaptiveMixedClassifier", "MixedClassifier"]

_SPREAD = 0.6  # standard deviations of a batch beyond which gamma is clamped in training


class MixedClassifier(nn.Module):
    """Log-probabilities of ``(1 - alpha) softmax(s_g g) + alpha softmax(s_h h)``.

    Both parts stay frozen and in evaluation mode whatever mode the mixture is put into.

    Args:
        standard: the accurate classifier ``g``, ``(N, ...)`` to ``(N, K)`` logits; float or packed.
        robust: the robust classifier ``h``, of the same classes.
        alpha: weight of ``h``, in [0, 1]; 0 and 1 skip the other classifier.
        standard_scale: factor ``s_g > 0`` of the logits of ``g``.
        robust_scale: factor ``s_h > 0`` of the logits of ``h``; above 1 for one that is right but
            not confident.

    Raises:
        ValueError: an argument out of range, or a part that is in training mode or has a parameter
            that requires a gradient.

    Example:
        >>> g, h = (nn.Linear(2, 3).requires_grad_(False).eval() for _ in range(2))
        >>> mixed = MixedClassifier(g, h, alpha=0.8).eval()
        >>> bool(mixed(torch.rand(4, 2)).exp().sum(1).sub(1).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        standard: nn.Module,
        robust: nn.Module,
        alpha: float = 0.5,
        standard_scale: float = 1.0,
        robust_scale: float = 1.0,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        check_unit(subject, "alpha", alpha)
        check_positive(subject, "standard_scale", standard_scale)
        check_positive(subject, "robust_scale", robust_scale)
        for name, part in (("standard", standard), ("robust", robust)):
            _check_frozen(subject, name, part)
        self.standard, self.robust = standard, robust
        self.alpha = alpha
        self.standard_scale, self.robust_scale = standard_scale, robust_scale

    @property
    def lowest_alpha(self) -> float:
        """The smallest weight of ``h`` that an input can get: what certificates count on."""
        return self.alpha

    def train(self, mode: bool = True) -> MixedClassifier:
        """Set the mode of the mixture; its two classifiers stay in evaluation mode."""
        super().train(mode)
        self.standard.eval()
        self.robust.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``(N, K)`` log-probabilities.

        Raises:
            ValueError: the two classifiers return different shapes.
        """
        if self.alpha == 0:
            return F.log_softmax(self.standard_scale * self.standard(x), 1)
        if self.alpha == 1:
            return F.log_softmax(self.robust_scale * self.robust(x), 1)
        return self._mix(self.standard(x), self.robust(x), self.alpha)

    def certify(
        self, x: Tensor, eps: float, *, clamp: tuple[float, float] | None = (0.0, 1.0)
    ) -> Certificate:
        """Prove by interval bounds of ``h`` that no input within ``eps`` (l-infinity) changes.

        The answer is the mixture's class at ``x`` where the margin of ``h`` stays above
        ``(1 - a) / a`` in the whole box, ``a`` the lowest weight of ``h``.

        Args:
            x: ``(N, ...)`` float inputs.
            eps: radius, ``>= 0``, in the units of ``x``.
            clamp: range of valid inputs, cut from the box; None for any.

        Returns:
            A deterministic certificate; with a weight below 1/2 it abstains everywhere, and its
            ``assumption`` says why.

        Raises:
            TypeError: ``x`` is not floating-point.
            ValueError: ``x`` is not finite, ``eps`` negative or a module in training mode.
            NotImplementedError: an operation of ``h`` has no interval rule.
        """
        subject = f"{type(self).__name__}.certify"
        check_float_tensor(subject, "x", x)
        check_finite(subject, "x", x)
        check_at_least(subject, "eps", eps, 0.0)
        check_eval_mode(subject, self)
        robust = self.robust.model if isinstance(self.robust, FeatureTap) else self.robust
        with torch.no_grad():
            answer: Tensor = self(x).argmax(1)
            classes = int(self(x[:1]).shape[1])
            box = Interval.ball(x, eps, clamp=clamp)
            margins = bound(robust, box, margin_specification(answer, classes)).lower
            gap = _softmax_gap(self.robust_scale * margins.double())
        weight = self.lowest_alpha
        needed = (1 - weight) / weight if weight >= 0.5 else math.inf
        proven = gap * (1 - 1e-12) > needed
        reason = "" if weight >= 0.5 else f"; {NO_RADIUS}"
        return Certificate(
            prediction=torch.where(proven, answer, ABSTAIN),
            radius=proven.double() * eps,
            alpha=0.0,
            assumption=(
                "real arithmetic on the robust part's stored weights; its share is at least "
                f"{weight:g}; the standard part may answer anything{reason}"
            ),
            norm="linf",
        )

    def extra_repr(self) -> str:
        """The weight and the scales."""
        return (
            f"alpha={self.alpha}, standard_scale={self.standard_scale}, "
            f"robust_scale={self.robust_scale}"
        )

    def _mix(self, g: Tensor, h: Tensor, alpha: float | Tensor) -> Tensor:
        """The logarithm of the mixture, ``alpha`` strictly between 0 and 1."""
        if g.shape != h.shape or g.ndim != 2:
            raise ValueError(
                f"{type(self).__name__}: both classifiers must return the same shape (N, K); "
                f"got {tuple(g.shape)} and {tuple(h.shape)}."
            )
        weight = torch.as_tensor(alpha, dtype=h.dtype, device=h.device)
        weight = weight[:, None] if weight.ndim else weight
        return torch.logaddexp(
            torch.log1p(-weight) + F.log_softmax(self.standard_scale * g.to(h), 1),
            torch.log(weight) + F.log_softmax(self.robust_scale * h, 1),
        )


class AdaptiveMixedClassifier(MixedClassifier):
    """A mixture whose weight is chosen for each input by a small network on features of both.

    ``gamma`` is the network's number after batch norm (without affine part, momentum 0.01) and a
    fixed affine map; the weight is ``sigmoid(gamma)``, in evaluation squeezed into ``alpha_range``.
    Only the network and the batch norm learn.

    Args:
        standard: :class:`FeatureTap` of the accurate classifier with an early and a later layer.
        robust: the same of the robust classifier.
        mixer: a :class:`MixingNetwork` for their features.
        alpha_range: the weights possible in evaluation, ``0 < low <= high < 1``; certificates need
            ``low >= 1/2``. The paper's: (.84, .99), (.815, .915), (.20, .95).
        gamma_affine: scale and offset of ``gamma`` in evaluation.
        training_affine: the same in training.
        standard_scale: factor of the logits of the accurate classifier, ``> 0``.
        robust_scale: factor of the logits of the robust classifier, ``> 0``.
        standard_size: height and width that the accurate classifier's input is resized to; None
            for the input's own.
        mixer_gradient: False hides the network from gradients with respect to the input: cheaper
            training attacks, but an attack that relies on them is not adaptive, so a warning is
            given.

    Raises:
        TypeError: a part is not a :class:`FeatureTap`.
        ValueError: an argument out of range, or a part that is not frozen.
    """

    def __init__(
        self,
        standard: FeatureTap,
        robust: FeatureTap,
        mixer: nn.Module,
        *,
        alpha_range: tuple[float, float] = (0.84, 0.99),
        gamma_affine: tuple[float, float] = (2.0, 1.3),
        training_affine: tuple[float, float] = (2.0, 0.4),
        standard_scale: float = 1.0,
        robust_scale: float = 1.0,
        standard_size: tuple[int, int] | None = None,
        mixer_gradient: bool = True,
    ) -> None:
        subject = type(self).__name__
        for name, part in (("standard", standard), ("robust", robust)):
            check_instance(subject, name, part, FeatureTap)
            if len(part.layers) != 2:
                raise ValueError(
                    f"{subject}: {name} must tap two layers, an early and a later one; "
                    f"got {len(part.layers)}."
                )
        low, high = alpha_range
        if not 0 < low <= high < 1:
            raise ValueError(
                f"{subject}: alpha_range must be (low, high) with 0 < low <= high < 1; "
                f"got {alpha_range}."
            )
        for name, pair in (("gamma_affine", gamma_affine), ("training_affine", training_affine)):
            check_positive(subject, f"the scale of {name}", pair[0])
        super().__init__(standard, robust, low, standard_scale, robust_scale)
        self.mixer = mixer
        self.norm = nn.BatchNorm1d(1, affine=False, momentum=0.01)
        self.alpha_range = alpha_range
        self.gamma_affine, self.training_affine = gamma_affine, training_affine
        self.standard_size = standard_size
        self.mixer_gradient = mixer_gradient

    @property
    def lowest_alpha(self) -> float:
        """The lower end of ``alpha_range``, also after it was changed."""
        return self.alpha_range[0]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, K)`` log-probabilities."""
        return self.with_gamma(x)[0]

    def with_gamma(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, K)`` log-probabilities and the ``(N,)`` ``gamma`` behind the weights."""
        g, h, gamma = self._parts(x)
        return self._mix(g, h, self._weight(gamma)), gamma

    def weights(self, x: Tensor) -> Tensor:
        """``(N,)`` weights of the robust classifier; in evaluation inside ``alpha_range``."""
        return self._weight(self._parts(x)[2])

    def extra_repr(self) -> str:
        """Ranges and scales."""
        return f"alpha_range={self.alpha_range}, gamma_affine={self.gamma_affine}"

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both classifiers and ``gamma``."""
        enlarged = x
        if self.standard_size is not None:
            enlarged = F.interpolate(x, self.standard_size, mode="bilinear", align_corners=False)
        g, seen_by_g = self.standard(enlarged)
        h, seen_by_h = self.robust(x)
        early, later = zip(seen_by_g, seen_by_h, strict=True)
        if not self.mixer_gradient:
            if x.requires_grad and torch.is_grad_enabled():
                warnings.warn(
                    "AdaptiveMixedClassifier: gradients do not pass the mixing network "
                    "(mixer_gradient=False): an attack that uses them is not adaptive.",
                    stacklevel=3,
                )
            early, later = (tuple(f.detach() for f in group) for group in (early, later))
        return g, h, self._gamma(self.mixer(early, later))

    def _gamma(self, raw: Tensor) -> Tensor:
        if self.training:
            mean, spread = raw.detach().mean(), _SPREAD * raw.detach().std()
            raw = raw.clamp(mean - spread, mean + spread)
        scale, offset = self.training_affine if self.training else self.gamma_affine
        normed: Tensor = self.norm(raw[:, None])[:, 0]
        return normed * scale + offset

    def _weight(self, gamma: Tensor) -> Tensor:
        weight = torch.sigmoid(gamma)
        if self.training:  # away from 0 and 1, whose logarithms are not finite
            tiny = torch.finfo(weight.dtype).eps
            return weight.clamp(tiny, 1 - tiny)
        low, high = self.alpha_range
        return (low + (high - low) * weight).clamp(low, high)


def _softmax_gap(margins: Tensor) -> Tensor:
    """Least lead of a class's softmax over any other, from lower bounds of its logit margins.

    With ``m_j`` the margins, ``h_y - h_i = (1 - e^-m_i) / (1 + sum_j e^-m_j)`` rises in each of
    them while it is positive.

    Args:
        margins: ``(N, K - 1)`` float64 lower bounds of ``z_y - z_j``.

    Returns:
        ``(N,)``; not above 0 where a margin is not.
    """
    worst = margins.amin(1)
    return -torch.expm1(-worst) / (1 + (-margins).exp().sum(1))


def _check_frozen(subject: str, name: str, part: Any) -> None:
    check_instance(subject, name, part, nn.Module)
    check_eval_mode(f"{subject}: {name}", part)
    learning = [key for key, value in part.named_parameters() if value.requires_grad]
    if learning:
        raise ValueError(
            f"{subject}: {name} must be frozen, but {len(learning)} of its parameters require "
            f"gradients ({learning[0]}, ...); call {name}.requires_grad_(False) first."
        )
