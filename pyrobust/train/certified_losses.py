"""Losses of certified training: CROWN-IBP, SABR, MTL-IBP and TAPS, each a function of tensors.

All are losses over l-infinity balls cut to the range of valid inputs. From the plain interval loss
(:func:`pyrobust.train.interval_loss`) they differ in what they trade for regularisation:

- :func:`crown_ibp_loss` bounds more tightly; it still bounds the loss at every point of the ball
  from above. Fused, one backward pass bounds the loss itself instead of every margin.
- :func:`sabr_loss` propagates a small box around an adversarial point.
- :func:`mtl_ibp_loss` mixes an adversarial loss with the interval loss.
- :func:`taps_loss` propagates intervals through the first part of a network and attacks the
  second part inside the box that arrives.

The last three bound nothing; networks trained with them are certified afterwards.

Source: H. Zhang et al., ICLR 2020, arXiv 1906.06316 (CROWN-IBP); K. Xu et al., NeurIPS 2020, arXiv
2002.12920, section 3.3 (loss fusion); M. N. Mueller et al., ICLR 2023, arXiv 2210.04871 (SABR); A.
De Palma et al., ICLR 2024, arXiv 2305.13991 (MTL-IBP); Y. Mao et al., NeurIPS 2023, arXiv
2305.04574 (TAPS).
Departures: loss fusion bounds each exponential by its chord over the interval bounds of the
margins; TAPS attacks one margin at a time through all classes and links gradients as the source
does, without its multi-estimator batching.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_integer, check_open_unit, check_unit
from pyrobust.certify.bound import bound, margin_specification
from pyrobust.evaluate.pgd import pgd
from pyrobust.interval import Interval
from pyrobust.train.ibp import interval_loss, worst_logits

__all__ = ["crown_ibp_loss", "mtl_ibp_loss", "sabr_loss", "taps_loss"]

Clamp = tuple[float, float] | None


def crown_ibp_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    share: float = 1.0,
    fused: bool = False,
    clamp: Clamp = (0.0, 1.0),
) -> Tensor:
    """Cross-entropy of the worst margins by linear relaxation over interval bounds.

    Args:
        model: classifier that torch.fx can trace, in evaluation mode or without batch norm.
        x: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64.
        eps: l-infinity radius, ``>= 0``.
        share: weight of the relaxation's margins against those of intervals, in [0, 1]; training
            lowers it from 1 to 0 or keeps it (section 3 of CROWN-IBP).
        fused: bound the sum of exponentials by one linear function and that by one backward pass:
            a single specification instead of ``K - 1``; neither is always the tighter.
        clamp: range of valid inputs; None for any.

    Returns:
        Scalar, nats; with any ``share`` an upper bound, up to float rounding, of the mean loss at
        every point of the balls.

    Raises:
        ValueError: ``eps`` is negative or ``share`` outside [0, 1].
        TypeError: the model cannot be traced.
    """
    check_at_least("crown_ibp_loss", "eps", eps, 0.0)
    check_unit("crown_ibp_loss", "share", share)
    box = Interval.ball(x, eps, clamp=clamp, rounding="nearest")
    spec = margin_specification(labels, _classes(model, x)).to(x)
    if fused:
        return _fused(model, box, spec, bound(model, box, spec), share)
    # a share of 1 needs no intervals of its own: the relaxation is cut by them already
    worst = bound(model, box, spec).lower if share < 1 else torch.zeros(())
    if share > 0:
        tight = bound(model, box, spec, "crown-ibp", lower_only=True).lower
        worst = share * tight + (1 - share) * worst.to(tight.device)
    return _margin_loss(worst)


def sabr_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    ratio: float = 0.4,
    steps: int = 8,
    clamp: Clamp = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """The interval loss of a box of radius ``ratio * eps`` around an adversarial point.

    The point is found by PGD within ``(1 - ratio) * eps``, so that the box stays inside the ball.

    Args:
        model: classifier.
        x: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64.
        eps: l-infinity radius, ``>= 0``.
        ratio: size of the small box, in [0, 1]; 1 is the interval loss, 0 an adversarial one.
        steps: PGD steps, ``>= 1``.
        clamp: range of valid inputs; None for any.
        seed: of the attack's start.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: an argument is out of range.
    """
    check_at_least("sabr_loss", "eps", eps, 0.0)
    check_unit("sabr_loss", "ratio", ratio)
    centre = _attacked(model, x, labels, (1 - ratio) * eps, steps, clamp, seed)
    return interval_loss(model, centre, labels, eps=ratio * eps, clamp=clamp)


def mtl_ibp_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    weight: float = 0.5,
    attack_eps: float | None = None,
    steps: int = 8,
    clamp: Clamp = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """``(1 - weight) * adversarial + weight * interval`` loss.

    Args:
        model: classifier.
        x: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64.
        eps: l-infinity radius of the interval loss, ``>= 0``.
        weight: of the interval loss, in [0, 1].
        attack_eps: radius of the attack, ``>= 0``; None takes ``eps``.
        steps: PGD steps, ``>= 1``.
        clamp: range of valid inputs; None for any.
        seed: of the attack's start.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: an argument is out of range.
    """
    check_at_least("mtl_ibp_loss", "eps", eps, 0.0)
    check_unit("mtl_ibp_loss", "weight", weight)
    radius = eps if attack_eps is None else attack_eps
    moved = _attacked(model, x, labels, radius, steps, clamp, seed)
    adversarial = F.cross_entropy(model(moved), labels)
    return (1 - weight) * adversarial + weight * interval_loss(
        model, x, labels, eps=eps, clamp=clamp
    )


def taps_loss(
    extractor: nn.Module,
    classifier: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 8,
    link: float = 0.5,
    weight: float = 0.5,
    clamp: Clamp = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """Intervals through the extractor, attacks on the classifier inside the box that arrives.

    For each wrong class PGD lowers the margin inside the latent box; the worst margins make a
    cross-entropy, which is multiplied by the interval loss of the whole network. The latent points
    pass gradients on to the ends of the box by a rectified linear link.

    Args:
        extractor: first part, accepts an Interval.
        classifier: second part, ``(N, K)`` logits.
        x: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64.
        eps: l-infinity radius, ``>= 0``.
        steps: attack steps in the latent box, ``>= 1``.
        link: ``c`` of the gradient link in (0, 1): an end receives gradient from points within
            ``c`` of the width of the box.
        weight: share of the gradient of the attacked part, in [0, 1]; its value does not change.
        clamp: range of valid inputs; None for any.
        seed: of the attack's start.

    Returns:
        Scalar: product of the two losses, with the gradient ``2 weight`` of the first factor's and
        ``2 (1 - weight)`` of the second's.

    Raises:
        ValueError: an argument is out of range.
    """
    check_at_least("taps_loss", "eps", eps, 0.0)
    check_integer("taps_loss", "steps", steps, 1)
    check_open_unit("taps_loss", "link", link)
    check_unit("taps_loss", "weight", weight)
    latent = extractor(Interval.ball(x, eps, clamp=clamp, rounding="nearest"))
    with torch.no_grad():
        classes = int(classifier(latent.center[:1]).shape[-1])
    places = _latent_attack(classifier, latent, labels, classes, steps, seed)
    low, high = latent.lower.unsqueeze(1), latent.upper.unsqueeze(1)
    points = _linked(low, high, places, link)
    logits = classifier(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    # each class was attacked on its own: its margin is read at its own point
    own = logits.gather(2, labels[:, None, None].expand(-1, classes, 1))[..., 0]
    margins = own - logits.diagonal(dim1=1, dim2=2)
    wrong = ~F.one_hot(labels, classes).bool()
    attacked = _margin_loss(margins[wrong].reshape(len(x), classes - 1))
    output = classifier(latent)
    whole = F.cross_entropy(worst_logits(output.lower, output.upper, labels), labels)
    value = attacked.detach() * whole.detach()
    first = 2 * weight * whole.detach() * (attacked - attacked.detach())
    second = 2 * (1 - weight) * attacked.detach() * (whole - whole.detach())
    return value + first + second


def _classes(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return int(model(x[:1]).shape[-1])


def _margin_loss(margins: Tensor) -> Tensor:
    """``mean log(1 + sum exp(-margin))``: the cross-entropy of the margins."""
    worst = torch.cat([torch.zeros_like(margins[:, :1]), -margins], 1)
    return worst.logsumexp(1).mean()


def _fused(model: nn.Module, box: Interval, spec: Tensor, plain: Interval, share: float) -> Tensor:
    """``log(1 + sum_j exp(-m_j))`` through one linear bound of the sum.

    On ``[l, u]`` the convex ``exp(-m)`` lies below its chord ``a - k m``; so the sum is at most
    ``sum a - min (sum_j k_j m_j)``, one specification. A common factor keeps the exponents small.
    """
    low, high = plain.lower, plain.upper
    shift = (-low).amax(1, keepdim=True).clamp(min=0).detach()
    at_low, at_high = torch.exp(-low - shift), torch.exp(-high - shift)
    width = (high - low).clamp(min=1e-6)
    slope = (at_low - at_high) / width
    level = at_low + slope * low
    combined = (slope.unsqueeze(-1) * spec).sum(1, keepdim=True)
    least = bound(model, box, combined, "crown-ibp", lower_only=True).lower[:, 0]
    total = (level.sum(1) - least).clamp(min=1e-30)
    intervals = at_low.sum(1)
    total = share * torch.minimum(total, intervals) + (1 - share) * intervals
    one = torch.exp(-shift[:, 0])
    return (torch.log(one + total) + shift[:, 0]).mean()


def _attacked(
    model: nn.Module, x: Tensor, labels: Tensor, eps: float, steps: int, clamp: Clamp, seed: int
) -> Tensor:
    return pgd(model, x, labels, eps=eps, steps=steps, clamp=clamp, keep="last", seed=seed)


def _latent_attack(
    classifier: nn.Module, latent: Interval, labels: Tensor, classes: int, steps: int, seed: int
) -> Tensor:
    """``(N, K, ...)`` places in [0, 1] of the box: the point found against each class."""
    low, high = latent.lower.detach().unsqueeze(1), latent.upper.detach().unsqueeze(1)
    shape = (low.shape[0], classes, *low.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(shape, generator=generator).to(low)
    for step in range(steps):
        place.requires_grad_(True)
        points = low + place * (high - low)
        logits = classifier(points.flatten(0, 1)).unflatten(0, shape[:2])
        own = logits.gather(2, labels[:, None, None].expand(-1, classes, 1))[..., 0]
        gap = logits.diagonal(dim1=1, dim2=2) - own
        (gradient,) = torch.autograd.grad(gap.sum(), place)
        length = 0.5 * (1 - step / steps) + 0.05
        place = (place.detach() + length * gradient.sign()).clamp(0, 1)
    return place


def _linked(low: Tensor, high: Tensor, place: Tensor, link: float) -> Tensor:
    """Points at ``place``, whose gradients reach an end in proportion to how near it they lie."""
    with torch.no_grad():
        points = low + place * (high - low)
        to_low = (1 - place / link).clamp(min=0)
        to_high = (1 - (1 - place) / link).clamp(min=0)
    return points + to_low * (low - low.detach()) + to_high * (high - high.detach())
