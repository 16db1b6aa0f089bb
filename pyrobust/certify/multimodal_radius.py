"""Certified l2 radii of late-fusion classifiers, jointly or one modality at a time.

For logits ``o = sum_m a_m h_m + b`` the margin of class ``y`` over ``j`` changes by at most ``sum_m
D_m[y, j] ||d_m||`` when modality ``m`` moves by ``d_m``; over all moves of joint l2 norm ``r`` that
is ``r sqrt(sum_m D_m^2)``, and ``r D_m`` where only modality ``m`` moves. ``D_m[y, j]`` is
``|a_m[y]| tau_m[y] + |a_m[j]| tau_m[j]`` from constants of each ``h_m[k]``, or, tighter,
``||a_m[y] W~_m[y] - a_m[j] W~_m[j]|| L_m`` from one constant of each encoder.

Source: Z. Yang, Y. Wei, C. Liang, D. Hu, "Quantifying and Enhancing Multi-modal Robustness with
Modality Preference", ICLR 2024, arXiv 2402.06244, theorem 3.3 and section 4.
Departures: scales enter by their absolute value (the published formula is wrong for negative
ones); the pairwise bound is ours. Constants measured at samples are estimates and say so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_choice,
    check_eval_mode,
    check_finite,
    check_integer,
    check_shape,
)
from pyrobust.certify.certificates import ABSTAIN, Certificate
from pyrobust.certify.lipschitz import lipschitz_bound
from pyrobust.interval import Interval
from pyrobust.nn.orthogonal_fusion import LateFusion, OrthogonalFusion
from pyrobust.nn.packed_linear import PackedLinear

__all__ = [
    "ModalityLipschitz",
    "certify_multimodal",
    "fused_radius",
    "modality_lipschitz",
    "multimodal_radius",
]

_ASSUMPTION = {
    True: (
        "exact evaluation of the stored encoders, and of the head with the orthogonal rows that "
        "float64 finds; Lipschitz constants bounded layer by layer"
    ),
    False: "Lipschitz constants measured at samples",
}


@dataclass(frozen=True)
class ModalityLipschitz:
    """l2 Lipschitz constants of a late-fusion model.

    Attributes:
        per_class: ``(M, K)`` float64, of input ``m`` to ``h_m[k]``.
        encoder: ``(M,)`` float64, of input ``m`` to its features; None where unknown.
        certified: whether they are proven bounds.
        method: ``"spectral"`` or ``"empirical"``.
    """

    per_class: Tensor
    encoder: Tensor | None
    certified: bool
    method: str


def modality_lipschitz(
    model: LateFusion,
    loader: Iterable[tuple[Sequence[Tensor], Tensor]] | None = None,
    method: str = "empirical",
) -> ModalityLipschitz:
    """Lipschitz constants of each modality's classifier.

    Args:
        model: in evaluation mode.
        loader: batches of (inputs of each modality, labels); needed by ``"empirical"``.
        method: ``"empirical"``, the largest gradient norm over the samples, an estimate (section
            4.3 of the paper); ``"spectral"``, products of layer norms, proven
            (:func:`~pyrobust.certify.lipschitz_bound`).

    Raises:
        ValueError: the model is in training mode, or the loader is missing or empty.
        NotImplementedError: ``"spectral"`` meets a layer without a rule.
    """
    subject = "modality_lipschitz"
    check_choice(subject, "method", method, ("empirical", "spectral"))
    check_eval_mode(subject, model)
    if method == "spectral":
        constants = torch.tensor([lipschitz_bound(e) for e in model.encoders], dtype=torch.float64)
        rows = [
            model.head.classifier(m).detach().double().norm(dim=1) * (1 + 1e-9)
            for m in range(len(constants))
        ]
        per_class = torch.stack(rows).cpu() * constants[:, None]
        return ModalityLipschitz(per_class, constants, certified=True, method=method)
    largest: Tensor | None = None
    for inputs, _ in loader if loader is not None else ():
        norms = torch.stack([_gradient_norms(model, m, x) for m, x in enumerate(inputs)])
        largest = norms if largest is None else torch.maximum(largest, norms)
    if largest is None:
        raise ValueError(f'{subject}: method="empirical" needs a loader with at least one batch.')
    return ModalityLipschitz(largest, None, certified=False, method=method)


def multimodal_radius(
    head: OrthogonalFusion,
    modality_logits: Sequence[Tensor],
    lipschitz: Tensor | ModalityLipschitz,
    target: Tensor | None = None,
    *,
    attacked: int | None = None,
    certified: bool = False,
) -> Tensor:
    """The l2 radius within which the fused class does not change.

    Args:
        head: the fusion head.
        modality_logits: ``(B, K)`` for each modality, as the head returns them.
        lipschitz: ``(M, K)`` constants of ``h_m[k]``, ``(M,)`` constants of the encoders (a tighter
            radius), or a :class:`ModalityLipschitz`, of which the tighter is taken.
        target: ``(B,)`` int64 classes; None takes the predicted ones.
        attacked: the one modality that may move; None lets all move within one joint radius.
        certified: refuse constants that are not proven.

    Returns:
        ``(B,)`` float64, 0 where the target does not win; differentiable in the scales and bias.

    Raises:
        ValueError: shapes disagree, a constant is not positive and finite, ``attacked`` is no
            modality, or ``certified`` is asked of measured constants.
    """
    subject = "multimodal_radius"
    if isinstance(lipschitz, ModalityLipschitz):
        if certified and not lipschitz.certified:
            raise ValueError(
                f"{subject}: certified=True needs proven constants; got {lipschitz.method} ones."
            )
        constants = lipschitz.per_class if lipschitz.encoder is None else lipschitz.encoder
    else:
        constants = lipschitz
    logits = head.fuse([logits.double() for logits in modality_logits])
    tables = _tables(subject, head, constants.to(logits.device))
    return _radius(subject, logits, tables, target, attacked)


def fused_radius(
    classifier: nn.Linear | PackedLinear,
    features: Sequence[Tensor],
    lipschitz: Tensor,
    target: Tensor | None = None,
    *,
    attacked: int | None = None,
) -> Tensor:
    """:func:`multimodal_radius` of any linear classifier of the concatenated features.

    It serves heads turned into one layer (:meth:`~pyrobust.nn.OrthogonalFusion.to_linear`), packed
    or not, and late fusion trained in any other way.

    Args:
        classifier: ``nn.Linear``, or a packed one without activation rounding.
        features: ``(B, d_m)`` of each modality, in the order of the classifier's columns.
        lipschitz: ``(M,)`` constants of the encoders, ``> 0``.
        target: as in :func:`multimodal_radius`.
        attacked: as in :func:`multimodal_radius`.

    Returns:
        ``(B,)`` float64.

    Raises:
        ValueError: shapes disagree or a constant is not positive.
        NotImplementedError: the classifier rounds its activations.
    """
    subject = "fused_radius"
    if isinstance(classifier, PackedLinear) and classifier.activations is not None:
        raise NotImplementedError(f"{subject}: a classifier that rounds its activations.")
    stored = classifier.dequantize() if isinstance(classifier, PackedLinear) else classifier.weight
    weight = stored.detach().double()
    joined = torch.cat(list(features), dim=1).double()
    check_shape(subject, "the joined features", joined, (None, weight.shape[1]))
    logits = joined @ weight.mT
    if classifier.bias is not None:
        logits = logits + classifier.bias.detach().double()
    parts = weight.split([feature.shape[1] for feature in features], dim=1)
    check_shape(subject, "lipschitz", lipschitz, (len(features),))
    _check_constants(subject, lipschitz)
    tables = torch.stack([torch.cdist(w, w) for w in parts]) * lipschitz.double()[:, None, None]
    return _radius(subject, logits, tables, target, attacked)


@torch.no_grad()
def certify_multimodal(
    model: LateFusion,
    inputs: Sequence[Tensor],
    lipschitz: ModalityLipschitz | None = None,
    *,
    attacked: int | None = None,
) -> Certificate:
    """Predicted class and certified radius of each sample.

    With proven constants the margins are proven too: the features are bounded at the sample, and
    what rounding may have added to a margin is taken off.

    Args:
        model: in evaluation mode.
        inputs: ``(B, ...)`` of each modality.
        lipschitz: constants; None computes proven ones.
        attacked: the one modality that may move; None lets all move within one joint radius.

    Returns:
        The certificate; an estimate where the constants are.

    Raises:
        ValueError: the model is in training mode, sizes disagree, or an output is not finite.
        NotImplementedError: an encoder has a layer without a rule.
    """
    check_eval_mode("certify_multimodal", model)
    constants = modality_lipschitz(model, method="spectral") if lipschitz is None else lipschitz
    output = model(*inputs)
    check_finite("certify_multimodal", "the model's logits", output.logits)
    top = output.logits.double().argmax(-1)
    if constants.certified:
        radius = _proven_radius(model, inputs, constants, top, attacked)
    else:
        radius = multimodal_radius(
            model.head, output.modality_logits, constants, top, attacked=attacked
        )
    return Certificate(
        prediction=torch.where(radius > 0, top, ABSTAIN),
        radius=radius * (1 - 1e-9),
        alpha=0.0,
        assumption=_ASSUMPTION[constants.certified],
        certified=constants.certified,
    )


def _proven_radius(
    model: LateFusion,
    inputs: Sequence[Tensor],
    lipschitz: ModalityLipschitz,
    top: Tensor,
    attacked: int | None,
) -> Tensor:
    """``(B,)`` float64 radii of classes ``top``, of margins that hold for the real functions."""
    subject = "certify_multimodal"
    head = copy.deepcopy(model.head).double()
    boxes = [encoder(Interval(x, x)) for encoder, x in zip(model.encoders, inputs, strict=True)]
    ends = [(box.lower.double(), box.upper.double()) for box in boxes]
    centers = [(lower + upper) / 2 for lower, upper in ends]
    spread = torch.stack([((upper - lower) / 2).norm(dim=1) for lower, upper in ends])
    logits = head.fuse(head.modality_logits(*centers))
    gaps = _tables(subject, head, torch.ones(len(boxes), device=logits.device))
    reach = sum(center.norm(dim=1) for center in centers) + head.bias.abs().amax()
    # far above the rounding of a float64 logit
    rounding = 1e-12 * (1 + gaps.amax()) * reach
    lost = torch.einsum("mbk,mb->bk", gaps[:, top], spread) * (1 + 1e-9) + rounding[:, None]
    constants = lipschitz.per_class if lipschitz.encoder is None else lipschitz.encoder
    tables = _tables(subject, head, constants.to(logits.device))
    return _radius(subject, logits, tables, top, attacked, lost)


def _gradient_norms(model: LateFusion, modality: int, x: Tensor) -> Tensor:
    """``(K,)`` largest norm over the batch of the gradient of ``h_m[k]`` with respect to ``x``."""
    moved = x.detach().requires_grad_(True)
    logits = model.encoders[modality](moved) @ model.head.classifier(modality).detach().mT
    largest = []
    for k in range(logits.shape[1]):
        # samples do not mix in evaluation mode, so one backward pass serves the batch
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), moved, retain_graph=True)
        largest.append(gradient.flatten(1).double().norm(dim=1).max())
    return torch.stack(largest).cpu()


def _tables(subject: str, head: OrthogonalFusion, constants: Tensor) -> Tensor:
    """``(M, K, K)``: how fast the margin of each pair of classes can change with each modality."""
    modalities, classes = len(head.in_features), head.num_classes
    if constants.shape not in ((modalities,), (modalities, classes)):
        raise ValueError(
            f"{subject}: lipschitz must have shape ({modalities}, {classes}) or ({modalities},); "
            f"got {tuple(constants.shape)}."
        )
    _check_constants(subject, constants)
    wide = constants.double()
    if wide.ndim == 2:
        scaled = torch.stack([scale.double().abs() for scale in head.scale]) * wide
        return scaled[:, :, None] + scaled[:, None, :]
    rows = [
        scale.double()[:, None] * head.classifier(m).double() for m, scale in enumerate(head.scale)
    ]
    gaps = [(row[:, None] - row[None]).square().sum(-1) for row in rows]
    # the root of exactly 0 (a class against itself) has no derivative
    return torch.stack([gap.clamp(min=1e-300).sqrt() for gap in gaps]) * wide[:, None, None]


def _check_constants(subject: str, constants: Tensor) -> None:
    if not bool(((constants > 0) & torch.isfinite(constants)).all()):
        raise ValueError(f"{subject}: lipschitz must be positive and finite; got {constants}.")


def _radius(
    subject: str,
    logits: Tensor,
    tables: Tensor,
    target: Tensor | None,
    attacked: int | None,
    lost: Tensor | float = 0.0,
) -> Tensor:
    """Radii of ``target``, of margins less what is ``lost`` of them, ``(B, K)`` or a number."""
    count, classes = logits.shape
    top = logits.argmax(-1) if target is None else target
    check_shape(subject, "target", top, (count,))
    if attacked is not None:
        check_integer(subject, "attacked", attacked, 0)
        if attacked >= len(tables):
            raise ValueError(
                f"{subject}: attacked must be below {len(tables)}, the number of modalities; got "
                f"{attacked}."
            )
        tables = tables[attacked : attacked + 1]
    rate = tables.square().sum(0).sqrt()[top]
    margin = logits.gather(1, top[:, None]) - logits - lost
    other = torch.arange(classes, device=logits.device) != top[:, None]
    ratio = torch.where(other, margin, torch.inf) / torch.where(other, rate, 1.0)
    return ratio.amin(-1).clamp(min=0)
