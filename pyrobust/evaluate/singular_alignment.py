"""Singular alignment: whether two networks' layers share their leading singular vectors.

Source: Ito, Yamada, Kumagai, "Analysis of Linear Mode Connectivity via Permutation-Based Weight
Matching", ICLR 2025, arXiv 2402.04051 (the score R and its cut gamma).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrobust.weights._state import check_same_state, check_state_finite

__all__ = ["singular_alignment"]


def singular_alignment(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], gamma: float = 0.3
) -> float:
    """Mean agreement of the singular vectors with large singular values.

    Over all weight matrices (convolutions as ``(out, rest)``): the sum of
    ``(u_i . u'_j) (v_i . v'_j)`` over the singular vectors whose value is at least ``gamma`` times
    the largest of their matrix, divided by how many were kept (the smaller count of the two).

    Args:
        a: state of one model.
        b: state of the other, usually already matched.
        gamma: in ``[0, 1]``; 0 keeps all vectors.

    Returns:
        1 for equal states, near 0 for unrelated ones.

    Raises:
        ValueError: ``gamma`` lies outside ``[0, 1]``, states differ or hold no matrix.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"singular_alignment: gamma must lie in [0, 1]; got {gamma}.")
    check_same_state("singular_alignment", a, b)
    check_state_finite("singular_alignment", a)
    check_state_finite("singular_alignment", b)
    score, kept = 0.0, 0
    for name, value in a.items():
        if value.ndim < 2 or not value.is_floating_point():
            continue
        (u1, v1), (u2, v2) = (_leading(state[name], gamma) for state in (a, b))
        score += float(((u1.t() @ u2) * (v1 @ v2.t())).sum())
        kept += min(u1.shape[1], u2.shape[1])
    if kept == 0:
        raise ValueError("singular_alignment: the states must hold at least one nonzero matrix.")
    return score / kept


def _leading(value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(value.detach().double().flatten(1), full_matrices=False)
    keep = (s >= gamma * s[0]) & (s > 0)
    return u[:, keep], vh[keep]
