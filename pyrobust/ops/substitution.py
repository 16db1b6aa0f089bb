"""Random substitution of tokens: each is replaced by a uniform member of its candidate list.

Counter-based like :mod:`pyrobust.ops.sampling`: a choice is a pure function of (seed, text index,
sample index, position).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust.ops import _cuda_sampling
from pyrobust.ops._library import define, dispatcher_needed, slice_by_slice
from pyrobust.ops._sampling_checks import check_positions, rows_of

__all__ = ["substituted_tokens"]


def substituted_tokens(
    tokens: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    n: int,
    *,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
) -> Tensor:
    """Copies of texts in which every token is drawn anew from its list.

    The list of token ``t`` is ``candidates[offsets[t] : offsets[t + 1]]``; each member has the
    same probability to within 2**-64. A token outside ``[0, V)``, such as -1 for "unknown", and a
    token with an empty list stay as they are.

    Args:
        tokens: ``(B, ...)`` int64 on the CPU or a CUDA device. There lists are not checked: one
            that does not lie within ``candidates`` counts as empty.
        offsets: ``(V + 1,)`` int64, from 0 on, not falling, up to ``len(candidates)``.
        candidates: ``(M,)`` int64.
        n: number of samples per text, ``>= 0``.
        seed: key of the choices, in ``[0, 2**63)``.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: index of ``tokens[0]``, in ``[0, 2**48)``.

    Returns:
        ``(B, n, ...)`` int64.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: offsets that do not describe lists, or ``n``, ``seed`` or an index out of range.
        NotImplementedError: ``tokens`` is on a device without kernels.

    Example:
        >>> offsets, candidates = torch.tensor([0, 1, 3]), torch.tensor([7, 8, 9])
        >>> drawn = substituted_tokens(torch.tensor([[0, 1, -1]]), offsets, candidates, 50, seed=0)
        >>> [sorted(set(drawn[0, :, i].tolist())) for i in range(3)]
        [[7], [8, 9], [-1]]
    """
    subject = "substituted_tokens"
    if has_torch_function((tokens,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: Tensor = handle_torch_function(
            substituted_tokens, (tokens,), tokens, offsets, candidates, n, **options
        )
        return result
    for name, value in (("tokens", tokens), ("offsets", offsets), ("candidates", candidates)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{subject}: {name} must be an int64 tensor; got {seen}.")
    check_positions(subject, tokens, n, seed, first_sample, first_index)
    if offsets.ndim != 1 or candidates.ndim != 1 or len(offsets) == 0:
        raise ValueError(
            f"{subject}: offsets must have shape (V + 1,) and candidates (M,); got "
            f"{tuple(offsets.shape)} and {tuple(candidates.shape)}."
        )
    position = (n, seed, first_sample, first_index)
    if not dispatcher_needed(tokens, offsets, candidates):
        return _substituted_cpu(tokens, offsets, candidates, *position)
    samples: Tensor = torch.ops.pyrobust.substituted_tokens(tokens, offsets, candidates, *position)
    return samples


def _substituted_cpu(
    tokens: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
) -> Tensor:
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(candidates):
        raise ValueError(
            f"substituted_tokens: offsets must run from 0 to the {len(candidates)} candidates; got "
            f"{int(offsets[0])} to {int(offsets[-1])}."
        )
    out = torch.empty((tokens.shape[0], n, *tokens.shape[1:]), dtype=torch.int64)
    flat = rows_of(tokens, torch.int64)
    _native.substituted_tokens(
        flat,
        offsets.contiguous(),
        candidates.contiguous(),
        out.view(tokens.shape[0], n, flat.shape[1]),
        seed,
        first_sample,
        first_index,
        torch.get_num_threads(),
    )
    return out


def _substituted_fake(
    tokens: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
) -> Tensor:
    return tokens.new_empty((tokens.shape[0], n, *tokens.shape[1:]))


define(
    "substituted_tokens(Tensor tokens, Tensor offsets, Tensor candidates, int n, int seed,"
    " int first_sample, int first_index) -> Tensor",
    _substituted_cpu,
    _substituted_fake,
    cuda=_cuda_sampling.substituted,
    vmap=slice_by_slice("substituted_tokens"),
)
