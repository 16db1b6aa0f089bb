"""Pruning layer by layer: how much of each layer goes, and which weights.

Source: the ratios are those of AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912) in the form
FARMS uses them (arXiv 2506.06280); ``"wanda"`` is Sun et al., ICLR 2024, arXiv 2306.11695;
``"sparsegpt"`` is Frantar and Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1.
Departures: ratios are scaled again after limiting, so that the target is met.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_finite
from pyrobust.weights._state import shorten

__all__ = ["layer_sparsity", "prune_"]

# SparseGPT chooses among the weights of this many columns at a time, with a Hessian damped by this
# share of its mean diagonal, as published.
_COLUMNS = 128
_DAMPING = 0.01


def layer_sparsity(
    alphas: Tensor,
    numel: Tensor,
    target: float,
    epsilon: float = 0.3,
    *,
    blocks: Sequence[Hashable] | None = None,
) -> Tensor:
    """Pruning ratios that spare layers with small exponents and meet the target exactly.

    Args:
        alphas: ``(L,)`` exponents.
        numel: ``(L,)`` weights per layer.
        target: share of all weights to prune, in ``(0, 1)``.
        epsilon: spread of the ratios around the target before scaling, in ``[0, 1)``.
        blocks: the block of each layer, ``L`` labels: a block's layers share one ratio, that of the
            mean of their exponents. None rates every layer by its own.

    Returns:
        ``(L,)`` float64 ratios in ``[0, 1)``; their weighted mean is ``target``. A ratio that had
        to be limited is compensated by the others, with a warning: on small networks at high
        targets such ratios starve layers.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < target < 1 or not 0 <= epsilon < 1:
        raise ValueError(
            f"layer_sparsity: target must lie in (0, 1) and epsilon in [0, 1); "
            f"got {target} and {epsilon}."
        )
    if alphas.ndim != 1 or alphas.shape != numel.shape or not alphas.numel():
        raise ValueError(
            f"layer_sparsity: alphas and numel must be (L,); got {tuple(alphas.shape)} and "
            f"{tuple(numel.shape)}."
        )
    check_finite("layer_sparsity", "alphas", alphas.double())
    score, size = alphas.double(), numel.double()
    if blocks is not None:
        score = _block_means(score, blocks)
    span = score.max() - score.min()
    shape = 1 - epsilon + 2 * epsilon * (score - score.min()) / span if span > 0 else score * 0 + 1
    ceiling = max(0.999, (1 + target) / 2)
    free = torch.ones_like(shape, dtype=torch.bool)
    ratios = shape.clone()
    for _ in range(len(shape) + 1):
        wanted = target * size.sum() - (size * ceiling)[~free].sum()
        ratios = torch.where(free, shape * wanted / (size * shape)[free].sum(), ceiling)
        over = free & (ratios > ceiling)
        if not bool(over.any()):
            break
        free &= ~over
    if bool((~free).any()):
        warnings.warn(
            f"layer_sparsity: {int((~free).sum())} ratios were limited to {ceiling:.4f}; such "
            "layers are pruned away almost whole.",
            stacklevel=2,
        )
    return ratios


def _block_means(score: Tensor, blocks: Sequence[Hashable]) -> Tensor:
    if len(blocks) != len(score):
        raise ValueError(
            f"layer_sparsity: blocks must hold one label a layer; got {len(blocks)} for "
            f"{len(score)} layers."
        )
    members: dict[Hashable, list[int]] = {}
    for i, block in enumerate(blocks):
        members.setdefault(block, []).append(i)
    return torch.stack([score[members[block]].mean() for block in blocks])


@torch.no_grad()
def prune_(
    model: nn.Module,
    ratios: Mapping[str, float],
    method: str = "magnitude",
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Set the least important weights of each named layer to zero, in place.

    Args:
        model: holds the named weights.
        ratios: weight name to the share to prune, in ``[0, 1)``.
        method: ``"magnitude"``: the smallest of the tensor; ``"wanda"``: the smallest
            ``|w| sqrt(mean x^2)`` of each row; ``"sparsegpt"``: those whose loss costs the layer's
            output least, the weights that are kept making up for it.
        inputs: for the last two: weight name to calibration inputs ``(N, columns)`` of the weight
            seen as a matrix ``(rows, columns)`` (for a convolution, unfolded patches).

    Raises:
        ValueError: a name is unknown, a ratio out of range, or inputs are missing or do not fit.
    """
    check_choice("prune_", "method", method, ["magnitude", "wanda", "sparsegpt"])
    state = model.state_dict(keep_vars=True)
    for name, ratio in ratios.items():
        if name not in state:
            raise ValueError(
                f"prune_: ratios must be for weights of the model, such as {shorten(list(state))}; "
                f"got '{name}'."
            )
        if not 0 <= ratio < 1:
            raise ValueError(f"prune_: the ratio of '{name}' must lie in [0, 1); got {ratio}.")
        if method != "magnitude":
            _check_inputs(name, state[name], inputs)
    for name, ratio in ratios.items():
        weight = state[name]
        matrix = weight.detach().flatten(1) if weight.ndim > 1 else weight.detach()[None]
        if method == "sparsegpt" and inputs is not None:
            weight.copy_(_sparse_gpt(matrix, inputs[name], ratio).reshape(weight.shape))
            continue
        score = matrix.abs().reshape(1, -1)
        if method == "wanda" and inputs is not None:
            score = matrix.abs() * inputs[name].square().mean(0).sqrt()
        count = round(ratio * score.shape[1])
        gone = score.argsort(1)[:, :count]
        flat = matrix.reshape(score.shape)
        weight.copy_(flat.scatter(1, gone, 0.0).reshape(weight.shape))


def _check_inputs(name: str, weight: Tensor, inputs: Mapping[str, Tensor] | None) -> None:
    if inputs is None or name not in inputs:
        raise ValueError(f"prune_: inputs must hold calibration inputs for '{name}'.")
    columns = weight.flatten(1).shape[1] if weight.ndim > 1 else len(weight)
    if inputs[name].ndim != 2 or inputs[name].shape[1] != columns or not len(inputs[name]):
        raise ValueError(
            f"prune_: inputs of '{name}' must be (N, {columns}); got {tuple(inputs[name].shape)}."
        )
    check_finite("prune_", f"inputs of '{name}'", inputs[name])


def _sparse_gpt(matrix: Tensor, x: Tensor, ratio: float) -> Tensor:
    """Columns from left to right; what a pruned weight did is handed to the columns behind it."""
    weight, wide = matrix.double().clone(), x.double()
    hessian = wide.T @ wide / len(wide)
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian.diagonal().add_(torch.where(dead, 1.0, _DAMPING * hessian.diagonal().mean()))
    whole = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(whole, upper=True)
    rows, columns = weight.shape
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        # counted from the left edge, so that rounding does not add up over blocks
        count = round(ratio * rows * end) - round(ratio * rows * begin)
        cost = weight[:, begin:end].square() / inverse.diagonal()[begin:end].square()
        gone = torch.zeros(cost.numel(), dtype=torch.bool, device=cost.device)
        gone[cost.flatten().argsort(stable=True)[:count]] = True
        gone = gone.reshape(cost.shape)
        for k in range(begin, end):
            lost = torch.where(gone[:, k - begin], weight[:, k], 0.0)
            weight[:, k:] -= torch.outer(lost / inverse[k, k], inverse[k, k:])
            weight[gone[:, k - begin], k] = 0.0
    return weight.to(matrix.dtype)
