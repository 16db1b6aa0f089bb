"""Robust weight signatures (RWS): robustness to a corruption as a small patch of weights.

Fine-tuning one pretrained network on clean and on corrupted data moves mostly its first layers, and
differently. What the corrupted run moves beyond the clean direction is the signature: a vector that
makes another clean descendant of the same network robust to that corruption when it is added to its
weights, scaled at will, and taken off again (:class:`Patcher`). Sums of signatures serve several
corruptions; :func:`quantize_delta` makes the small file. Use it where a network was trained from a
known checkpoint; it does not give a guarantee.

Source: Cai, Zhang, Wang, "Robust Weight Signatures: Gaining Robustness as Easy as Patching
Weights?", ICML 2023, arXiv 2302.12480; the projection is that of section 3, tensor by tensor.
Departures: strengths enter once and linearly (the published script multiplies by them twice);
affine weights of batch norms are patched like all others and running statistics stay (the script
copies both), so that removal is exact; ``recalibrate_batchnorm`` re-estimates statistics on demand.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pyrobust._checks import check_integer
from pyrobust.weights._state import (
    check_names,
    check_no_ties,
    check_same_state,
    check_state_finite,
    shorten,
)
from pyrobust.weights.named_vector import state_checksum
from pyrobust.weights.task_vector import TaskVector

__all__ = ["compose_signatures", "project_out", "robust_weight_signature", "signature_parameters"]

_SUBJECT = "robust_weight_signature"
_STATISTICS = ("running_mean", "running_var")


def project_out(vector: Tensor, direction: Tensor) -> Tensor:
    """The part of ``vector`` that is orthogonal to ``direction``, both taken as flat vectors.

    Args:
        vector: any shape, float.
        direction: the same shape; where it is zero nothing is removed.

    Returns:
        ``r - (<r, c> / <c, c>) c``, computed in float64, in the dtype of ``vector``.

    Example:
        >>> import torch
        >>> project_out(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 3.0]))
        tensor([1., 0.])
    """
    r, c = vector.double(), direction.double()
    square = (c * c).sum()
    if float(square) == 0:
        return vector.clone()
    return (r - ((r * c).sum() / square) * c).to(vector.dtype)


def robust_weight_signature(
    robust: nn.Module | Mapping[str, Tensor],
    clean: nn.Module | Mapping[str, Tensor],
    pretrained: nn.Module | Mapping[str, Tensor],
    *,
    params: Sequence[str] | None = None,
    layers: int | Sequence[str] | None = None,
    project: bool = True,
) -> TaskVector:
    """What training on corrupted data changed, beyond what training on clean data changes.

    Args:
        robust: fine-tuned from ``pretrained`` on corrupted data.
        clean: fine-tuned from ``pretrained`` on clean data.
        pretrained: the network that both started from; all three are modules or state dicts.
        params: names of the parameters to keep.
        layers: instead, as :func:`signature_parameters` takes it.
        project: remove, within each tensor, the direction of clean fine-tuning.

    Returns:
        The signature; ``base_checksum`` is that of the pretrained tensors. Put it on any
        descendant of ``pretrained`` with :class:`Patcher`.

    Raises:
        TypeError: dtypes differ, or a named tensor is not floating point.
        ValueError: names or shapes differ, a name is unknown, a weight is not finite or tied, or
            both ``params`` and ``layers`` are given.

    Warns:
        UserWarning: ``clean`` equals ``pretrained`` in all kept tensors: nothing to project out.

    Example:
        >>> import torch
        >>> base = {"w": torch.zeros(2), "head": torch.zeros(1)}
        >>> clean, robust = ({"w": torch.tensor(v), "head": torch.zeros(1)} for v in
        ...                  ([1.0, 0.0], [5.0, 2.0]))
        >>> robust_weight_signature(robust, clean, base, params=["w"])["w"]
        tensor([0., 2.])
    """
    r, c, p = (_state_of(model) for model in (robust, clean, pretrained))
    for state in (c, p):
        check_same_state(_SUBJECT, r, state)
    for state in (r, c, p):
        check_state_finite(_SUBJECT, state)
    names = _kept(p, params, layers)
    moved = {name: c[name] - p[name] for name in names}
    if project and not any(bool(value.any()) for value in moved.values()):
        warnings.warn(
            f"{_SUBJECT}: clean equals pretrained in all kept tensors; nothing is projected out.",
            stacklevel=2,
        )
    change = {name: r[name] - p[name] for name in names}
    if project:
        change = {name: project_out(value, moved[name]) for name, value in change.items()}
    return TaskVector.from_deltas(change, state_checksum(p, names))


def signature_parameters(
    model: nn.Module | Mapping[str, Tensor], layers: int | Sequence[str] | None = None
) -> list[str]:
    """Names of the parameters in the first layers, or in named ones.

    Args:
        model: a module, or a state dict in its module's order.
        layers: a number K takes the first K modules that own parameters, weights and biases and
            the affine terms of norms; names take everything below these modules, so that whole
            blocks can be named (``["conv1", "bn1", "layer1.0"]``); None takes all but the last
            module, the classifier head, which no number includes either.

    Returns:
        The names in the order of the state.

    Raises:
        TypeError: ``layers`` is not an integer or a sequence of names.
        ValueError: K is less than 1 or reaches the head, or a name is unknown.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> signature_parameters(net, 1)
        ['0.weight', '0.bias']
    """
    state = _state_of(model)
    owners = list(
        dict.fromkeys(name.rpartition(".")[0] for name in state if _trainable(state, name))
    )
    if layers is None:
        chosen = owners[:-1]
    elif isinstance(layers, int):
        check_integer(_SUBJECT, "layers", layers, 1)
        if layers > len(owners) - 1:
            raise ValueError(
                f"{_SUBJECT}: layers must be at most {len(owners) - 1}, the layers before the "
                f"classifier head; got {layers}."
            )
        chosen = owners[:layers]
    else:
        below = {n: [o for o in owners if o == n or o.startswith(f"{n}.")] for n in layers}
        unknown = [name for name, found in below.items() if not found]
        if unknown or not below:
            raise ValueError(
                f"{_SUBJECT}: layers must name modules with parameters, such as {shorten(owners)}; "
                f"got {shorten(unknown) or 'none'}."
            )
        chosen = [owner for found in below.values() for owner in found]
    kept = set(chosen)
    return [n for n in state if _trainable(state, n) and n.rpartition(".")[0] in kept]


def compose_signatures(
    signatures: Sequence[TaskVector], strengths: Sequence[float] | None = None
) -> TaskVector:
    """The weighted sum of signatures, to serve several corruptions at once.

    Args:
        signatures: at least one, over the same tensors.
        strengths: one number each; None gives all ``1 / n``.

    Raises:
        ValueError: there is no signature, or names, shapes or lengths differ.

    Example:
        >>> import torch
        >>> one = TaskVector.from_deltas({"w": torch.ones(2)})
        >>> compose_signatures([one, -one], [1.0, 0.25])["w"]
        tensor([0.7500, 0.7500])
    """
    subject = "compose_signatures"
    if not signatures:
        raise ValueError(f"{subject}: signatures must hold at least one; got 0.")
    shares = [1 / len(signatures)] * len(signatures) if strengths is None else list(strengths)
    if len(shares) != len(signatures):
        raise ValueError(
            f"{subject}: strengths must hold one number for each of {len(signatures)} signatures; "
            f"got {len(shares)}."
        )
    for signature in signatures[1:]:
        check_names(subject, signatures[0], signature)
    total = signatures[0] * shares[0]
    for signature, share in zip(signatures[1:], shares[1:], strict=True):
        total = total + signature * share
    return total


def _state_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        check_no_ties(_SUBJECT, model)
        model = model.state_dict()
    return {name: value.detach() for name, value in model.items()}


def _trainable(state: Mapping[str, Tensor], name: str) -> bool:
    return state[name].is_floating_point() and name.rpartition(".")[2] not in _STATISTICS


def _kept(
    state: Mapping[str, Tensor],
    params: Sequence[str] | None,
    layers: int | Sequence[str] | None,
) -> list[str]:
    if params is None:
        return signature_parameters(state, layers)
    if layers is not None:
        raise ValueError(f"{_SUBJECT}: params and layers must not both be given.")
    unknown = [name for name in params if name not in state]
    if unknown or not params:
        raise ValueError(
            f"{_SUBJECT}: params must name entries of the state; unknown {shorten(unknown)}."
            if unknown
            else f"{_SUBJECT}: params must name at least one entry; got none."
        )
    for name in params:
        if not state[name].is_floating_point():
            raise TypeError(
                f"{_SUBJECT}: params must name floating-point tensors; '{name}' is "
                f"{state[name].dtype}."
            )
        if not _trainable(state, name):
            raise ValueError(
                f"{_SUBJECT}: params must not name running statistics ('{name}'); re-estimate them "
                "with recalibrate_batchnorm."
            )
    return list(params)
