"""A model whose weights are a base plus task vectors, each block with a coefficient of its own.

Source: Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad, "Knowledge Composition using
Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880 (blocks, partitions
for fine-tuning, linearised form). What one learns with it stands in ``weights.atlas``.
Departure: in partition mode, tensors that are not matrices keep one coefficient (in the published
code they contribute nothing).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from pyrobust._checks import check_choice, check_integer
from pyrobust.weights._state import check_names, check_no_ties, check_state_finite, shorten
from pyrobust.weights.named_vector import find_targets
from pyrobust.weights.task_vector import TaskVector

__all__ = ["AnisotropicComposition"]

_SUBJECT = "AnisotropicComposition"


class AnisotropicComposition(nn.Module):
    """``theta_j = base_j + sum_i coefficient_ij * vector_ij`` for every block (tensor) ``j``.

    Coefficients start at zero, so the composed model starts as the base. Task vectors are kept in
    half precision outside autograd, and blocks are summed one at a time, so that a training step
    needs one more copy of the model, not one for each vector. A classifier head belongs outside:
    the composed model gives features, a frozen head reads them.

    Args:
        base: the pretrained model, frozen by the caller (``base.requires_grad_(False)``); its
            buffers are used as they are.
        task_vectors: at least one, over the same parameters; where a vector knows the checksum of
            its base, ``base`` must have it.
        granularity: ``"block"`` one coefficient for each tensor of each vector, ``"vector"`` one
            for each vector, ``"partition"`` K for each matrix of each vector.
        partitions: K, ``>= 1``; every entry of a matrix belongs to one of K fixed random parts,
            the same for matrices of one shape. Needed by, and only for, ``"partition"``.
        blocks: parameters that take part; None is all that the vectors hold.
        storage_dtype: floating type in which the vectors are kept.
        linearized: use the tangent model ``f(x; base) + J (sum of vectors)`` instead.
        seed: of the partitions.

    Attributes:
        coefficients: ``(T, L)``, ``(T,)`` or ``(T, L, K)``; the only trainable parameter.
        names: the ``L`` blocks, in order.

    Raises:
        ValueError: no vector, vectors that differ from each other or from ``base`` in names or
            shapes or have another base, non-finite weights, ``partitions < 1``, unknown blocks, or
            a base whose parameters require gradients.

    Example:
        >>> base = nn.Linear(2, 1).requires_grad_(False)
        >>> step = TaskVector.from_deltas({"weight": torch.ones(1, 2)})
        >>> AnisotropicComposition(base, [step, -step]).coefficients.shape
        torch.Size([2, 1])
    """

    members: Tensor

    def __init__(
        self,
        base: nn.Module,
        task_vectors: Sequence[TaskVector],
        *,
        granularity: str = "block",
        partitions: int | None = None,
        blocks: Sequence[str] | None = None,
        storage_dtype: torch.dtype = torch.float16,
        linearized: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice(_SUBJECT, "granularity", granularity, ("block", "vector", "partition"))
        if (partitions is not None) != (granularity == "partition"):
            raise ValueError(
                f"{_SUBJECT}: partitions must be given for granularity 'partition' and for no "
                f"other; got {partitions} for '{granularity}'."
            )
        check_integer(_SUBJECT, "partitions", 1 if partitions is None else partitions, 1)
        if not storage_dtype.is_floating_point:
            raise TypeError(f"{_SUBJECT}: storage_dtype must be floating; got {storage_dtype}.")
        self.names = _blocks(base, task_vectors, blocks)
        self.granularity, self.partitions, self.seed = granularity, partitions, seed
        self.linearized = linearized
        self.base = base
        self.vectors = len(task_vectors)
        parameters = dict(base.named_parameters())
        for j, name in enumerate(self.names):
            home = parameters[name].device
            stack = torch.stack([v[name].to(home, storage_dtype) for v in task_vectors])
            if not bool(torch.isfinite(stack).all()):
                raise ValueError(
                    f"{_SUBJECT}: storage_dtype must hold every weight; '{name}' overflows "
                    f"{storage_dtype}."
                )
            self.register_buffer(f"vectors_{j}", stack, persistent=False)
        members = torch.arange(self.vectors)[:, None].expand(-1, len(self.names))
        self._set_members(members.contiguous())
        self._draw_partitions(parameters)

    def _set_members(self, members: Tensor) -> None:
        """Which vector each row of coefficients belongs to, block by block; start at zero."""
        self.register_buffer("members", members, persistent=False)
        shape = [len(members)]
        if self.granularity != "vector":
            shape.append(len(self.names))
        if self.partitions is not None:
            shape.append(self.partitions)
        home = next(self.base.parameters())
        kind = home.dtype if home.dtype == torch.float64 else torch.float32
        self.coefficients = nn.Parameter(torch.zeros(shape, dtype=kind, device=home.device))

    def _draw_partitions(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parts: dict[str, str] = {}
        if self.partitions is None:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for name in self.names:
            value = parameters[name]
            if value.ndim != 2:
                continue
            key = "parts_" + "_".join(str(size) for size in value.shape)
            if not hasattr(self, key):
                order = torch.randperm(value.numel(), generator=generator) % self.partitions
                self.register_buffer(
                    key, order.view(value.shape).to(value.device), persistent=False
                )
            self._parts[name] = key

    def deltas(self) -> dict[str, Tensor]:
        """The weighted sum of the vectors, by block; differentiable in the coefficients."""
        targets = dict(self.base.named_parameters())
        found = {}
        for j, name in enumerate(self.names):
            stack = getattr(self, f"vectors_{j}")
            scale = self.coefficients if self.granularity == "vector" else self.coefficients[:, j]
            parts = getattr(self, self._parts[name]) if name in self._parts else None
            if self.partitions is not None and parts is None:
                scale = scale[:, 0]
            total = _WeightedSum.apply(scale, stack, parts)  # type: ignore[no-untyped-call]
            found[name] = total.to(targets[name].dtype)
        return found

    def state(self) -> dict[str, Tensor]:
        """The composed parameters, by block."""
        targets = dict(self.base.named_parameters())
        return {name: targets[name] + delta for name, delta in self.deltas().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the composed model; arguments are those of ``base``."""
        if not self.linearized:
            return functional_call(self.base, self.state(), args, kwargs)
        deltas = self.deltas()
        targets = dict(self.base.named_parameters())
        centre = {name: targets[name].detach() for name in deltas}

        def run(weights: dict[str, Tensor]) -> Any:
            return functional_call(self.base, weights, args, kwargs)

        value, slope = jvp(run, (centre,), (deltas,))[:2]
        return value + slope

    def merge(self) -> nn.Module:
        """A copy of the base with the composed weights, an ordinary module.

        Raises:
            ValueError: the composition is linearised; no weights compute the tangent model.
        """
        if self.linearized:
            raise ValueError(f"{_SUBJECT}.merge: linearized must be False; got True.")
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            targets = dict(merged.named_parameters())
            for name, value in self.state().items():
                targets[name].copy_(value)
        return merged

    def coefficient_table(self) -> dict[str, Tensor]:
        """For every block ``(T,)``, or ``(T, K)`` for matrices in parts; 0 for vectors left out."""
        rows = self.coefficients.detach()
        table = {}
        for j, name in enumerate(self.names):
            own = rows if self.granularity == "vector" else rows[:, j]
            if self.partitions is not None and name not in self._parts:
                own = own[:, 0]
            full = own.new_zeros((self.vectors, *own.shape[1:]))
            table[name] = full.index_copy(0, self.members[:, j], own)
        return table

    def restrict(self, members: Tensor) -> AnisotropicComposition:
        """A composition that keeps only some vectors, block by block, and drops the others.

        Args:
            members: ``(b, L)`` int64, for each block the ``b`` vectors to keep, all different; or
                ``(b,)``, the same for every block.

        Returns:
            A new composition on the same base, with coefficients at zero.

        Raises:
            ValueError: the shape does not fit, an index repeats or is not among the members, or
                the kept vectors differ between blocks where one coefficient serves all.
        """
        count = len(self.names)
        wanted = members[:, None].expand(-1, count) if members.ndim == 1 else members
        wanted = wanted.to(self.members.device)
        if wanted.ndim != 2 or wanted.shape[1] != count or len(wanted) == 0:
            raise ValueError(
                f"{_SUBJECT}.restrict: members must have shape (b, {count}) or (b,); "
                f"got {tuple(members.shape)}."
            )
        if self.granularity == "vector" and bool((wanted != wanted[:, :1]).any()):
            raise ValueError(
                f"{_SUBJECT}.restrict: members must be the same for every block when a vector has "
                "one coefficient."
            )
        place = wanted[:, None] == self.members[None]  # (b, rows, L)
        if not bool(place.any(1).all()) or bool((place.sum(0) > 1).any()):
            raise ValueError(
                f"{_SUBJECT}.restrict: members must be different indices among those in use."
            )
        rows = place.int().argmax(1)
        other = copy.copy(self)
        other._parameters, other._buffers = dict(self._parameters), dict(self._buffers)
        for j in range(count):
            setattr(other, f"vectors_{j}", getattr(self, f"vectors_{j}")[rows[:, j]])
        other._set_members(wanted.contiguous())
        return other

    def without(self, index: int) -> AnisotropicComposition:
        """Leave one vector out, as few-shot learning does with the target's own."""
        kept = [i for i in range(self.vectors) if i != index]
        if len(kept) == self.vectors or not kept:
            raise ValueError(
                f"{_SUBJECT}.without: index must be one of 0 to {self.vectors - 1} and leave a "
                f"vector; got {index}."
            )
        return self.restrict(torch.tensor(kept))

    def penalty(self, p: int = 1) -> Tensor:
        """Half the mean over blocks of the p-norm of their coefficients, ``p`` 1 or 2."""
        check_choice(_SUBJECT, "p", p, (1, 2))
        rows = self.coefficients[:, None] if self.granularity == "vector" else self.coefficients
        lengths: Tensor = torch.linalg.vector_norm(rows, p, dim=0)
        return 0.5 * lengths.mean()


class _WeightedSum(torch.autograd.Function):
    """Sum of scaled vectors; keeps no float copy of the vectors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, stack: Tensor, parts: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale, stack, parts)
        total = torch.zeros(stack.shape[1:], dtype=scale.dtype, device=stack.device)
        for weight, vector in zip(scale, stack, strict=True):
            factor = weight if parts is None else weight[parts]
            total.addcmul_(vector.to(scale.dtype), factor)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        scale, stack, parts = ctx.saved_tensors
        result = torch.zeros_like(scale)
        for i, vector in enumerate(stack):
            product = grads[0] * vector.to(scale.dtype)
            if parts is None:
                result[i] = product.sum()
            else:
                result[i].index_add_(0, parts.flatten(), product.flatten())
        return result, None, None


def _blocks(
    base: nn.Module, task_vectors: Sequence[TaskVector], blocks: Sequence[str] | None
) -> list[str]:
    """Checks everything about base and vectors; returns the names that take part."""
    if not task_vectors:
        raise ValueError(f"{_SUBJECT}: task_vectors must hold at least one; got 0.")
    first = task_vectors[0]
    for vector in task_vectors[1:]:
        check_names(_SUBJECT, first, vector)
    for vector in task_vectors:
        find_targets(_SUBJECT, base, vector.shapes)
        check_state_finite(_SUBJECT, vector)
    check_no_ties(_SUBJECT, base)
    state = base.state_dict()
    check_state_finite(_SUBJECT, state)
    for vector in task_vectors:
        vector.check_base(state)
    learned = [name for name, value in base.named_parameters() if value.requires_grad]
    if learned:
        raise ValueError(
            f"{_SUBJECT}: base must be frozen, call base.requires_grad_(False); "
            f"{shorten(learned)} require gradients."
        )
    parameters = {name for name, _ in base.named_parameters()}
    held = [name for name in first if name in parameters]
    wanted = held if blocks is None else list(blocks)
    unknown = [name for name in wanted if name not in held]
    if unknown or not wanted:
        raise ValueError(
            f"{_SUBJECT}: blocks must name parameters that the vectors hold, such as "
            f"{shorten(held)}; got {shorten(unknown) or 'none'}."
        )
    return wanted
