"""Late fusion of modalities by orthogonal per-modality classifiers.

Each modality ``m`` gets a classifier ``h_m = W~_m phi_m`` whose rows are orthonormal, so that the
margins of the modalities are comparable; the fused logits are ``sum_m a_m h_m + b`` with one scale
per modality and class.

Source: Z. Yang, Y. Wei, C. Liang, D. Hu, "Quantifying and Enhancing Multi-modal Robustness with
Modality Preference", ICLR 2024, arXiv 2402.06244, section 4.2.
Departures: ``orthogonal="full"`` makes the rows orthonormal to each other; the published code
normalises each row by itself, which is ``"row"`` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_integer

__all__ = ["FusionOutput", "LateFusion", "OrthogonalFusion"]

_FLOOR = 1e-8
_FIRST_SCALE = 0.1


class FusionOutput(NamedTuple):
    """Fused logits ``(B, K)`` and the logits ``(B, K)`` of each modality's own classifier."""

    logits: Tensor
    modality_logits: list[Tensor]


class OrthogonalFusion(nn.Module):
    """The fusion head.

    Args:
        in_features: feature size ``d_m`` of each modality, at least one.
        num_classes: ``K >= 2``.
        orthogonal: ``"full"``, rows orthonormal (needs ``K <= d_m - 1`` when centred, else ``K <=
            d_m``); ``"row"``, each row of unit norm.
        center: subtract its mean from each row first.
        device: as in torch.
        dtype: as in torch.

    Attributes:
        weight: list of ``(K, d_m)`` parameters, the rows before orthogonalisation.
        scale: list of ``(K,)`` parameters ``a_m``, starting at 0.1.
        bias: ``(K,)`` parameter.

    Raises:
        ValueError: no modality, or sizes that allow no orthonormal rows.

    Example:
        >>> head = OrthogonalFusion([8, 6], 3)
        >>> output = head(torch.randn(2, 8), torch.randn(2, 6))
        >>> output.logits.shape, len(output.modality_logits)
        (torch.Size([2, 3]), 2)
    """

    def __init__(
        self,
        in_features: Sequence[int],
        num_classes: int,
        *,
        orthogonal: str = "full",
        center: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        subject = "OrthogonalFusion"
        check_choice(subject, "orthogonal", orthogonal, ("full", "row"))
        check_integer(subject, "num_classes", num_classes, 2)
        check_integer(subject, "the number of modalities", len(in_features), 1)
        for size in in_features:
            check_integer(subject, "in_features", size, 2)
            most = size - 1 if center else size
            if orthogonal == "full" and num_classes > most:
                raise ValueError(
                    f"{subject}: num_classes must be at most {most} for a modality of {size} "
                    f'features; got {num_classes}. orthogonal="row" has no such limit.'
                )
        self.in_features = tuple(in_features)
        self.num_classes = num_classes
        self.orthogonal = orthogonal
        self.center = center
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(num_classes, size, **options))
            for size in in_features
        )
        self.scale = nn.ParameterList(
            torch.full((num_classes,), _FIRST_SCALE, **options) for _ in in_features
        )
        self.bias = nn.Parameter(torch.zeros(num_classes, **options))

    def classifier(self, modality: int) -> Tensor:
        """``W~_m``, ``(K, d_m)``: the rows that act on the features; differentiable."""
        rows: Tensor = self.weight[modality]
        if self.center:
            rows = rows - rows.mean(1, keepdim=True)
        if self.orthogonal == "row":
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            return torch.div(rows, norms.clamp(min=_FLOOR**0.5))
        return torch.mm(inverse_square_root(rows @ rows.mT), rows)

    def modality_logits(self, *features: Tensor) -> list[Tensor]:
        """``h_m``, ``(B, K)`` for each modality's ``(B, d_m)`` features.

        Raises:
            ValueError: another number of modalities, or a feature size that does not fit.
        """
        if len(features) != len(self.in_features):
            raise ValueError(
                f"OrthogonalFusion: there must be {len(self.in_features)} modalities; got "
                f"{len(features)}."
            )
        for m, (feature, size) in enumerate(zip(features, self.in_features, strict=True)):
            if feature.ndim != 2 or feature.shape[1] != size:
                raise ValueError(
                    f"OrthogonalFusion: features of modality {m} must have shape (B, {size}); got "
                    f"{tuple(feature.shape)}."
                )
        return [feature @ self.classifier(m).mT for m, feature in enumerate(features)]

    def fuse(self, modality_logits: Sequence[Tensor]) -> Tensor:
        """``sum_m a_m h_m + b``, ``(B, K)``."""
        total: Tensor = self.bias
        for scale, logits in zip(self.scale, modality_logits, strict=True):
            total = total + scale * logits
        return total

    def forward(self, *features: Tensor) -> FusionOutput:
        """Fused logits and the logits of each modality."""
        each = self.modality_logits(*features)
        return FusionOutput(self.fuse(each), each)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The head as one linear layer on the concatenated features, to deploy or to pack."""
        rows = [scale[:, None] * self.classifier(m) for m, scale in enumerate(self.scale)]
        weight = torch.cat(rows, dim=1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        linear.to(weight.dtype)
        linear.weight.copy_(weight)
        linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return (
            f"in_features={list(self.in_features)}, num_classes={self.num_classes}, "
            f"orthogonal={self.orthogonal!r}, center={self.center}"
        )


class LateFusion(nn.Module):
    """Encoders, one per modality, and the head that joins them.

    Args:
        encoders: modules that map each modality's input to ``(B, d_m)`` features.
        head: the fusion head, for as many modalities.

    Raises:
        ValueError: the numbers of encoders and modalities differ.
    """

    def __init__(self, encoders: Sequence[nn.Module], head: OrthogonalFusion) -> None:
        super().__init__()
        if len(encoders) != len(head.in_features):
            raise ValueError(
                f"LateFusion: encoders must number {len(head.in_features)}, as the head's "
                f"modalities; got {len(encoders)}."
            )
        self.encoders = nn.ModuleList(encoders)
        self.head = head

    def features(self, *inputs: Tensor) -> list[Tensor]:
        """``(B, d_m)`` features of each modality.

        Raises:
            ValueError: another number of inputs.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"LateFusion: there must be {len(self.encoders)} inputs; got {len(inputs)}."
            )
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]

    def forward(self, *inputs: Tensor) -> FusionOutput:
        """Fused logits and the logits of each modality."""
        output: FusionOutput = self.head(*self.features(*inputs))
        return output


class _InverseSquareRoot(torch.autograd.Function):
    """``S^(-1/2)`` of a symmetric positive matrix.

    The derivative of an eigendecomposition divides by differences of eigenvalues and fails where
    two are equal, as they are once the rows are orthonormal; that of the root does not.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=_FLOOR).sqrt()
        ctx.save_for_backward(roots, vectors)
        return torch.mm(vectors / roots, vectors.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        divided = -1 / (roots[:, None] * roots * (roots[:, None] + roots))
        inner = vectors.mT @ gradients[0] @ vectors
        gradient = vectors @ (divided * inner) @ vectors.mT
        return torch.add(gradient, gradient.mT) / 2


def inverse_square_root(matrix: Tensor) -> Tensor:
    """``S^(-1/2)`` of a symmetric matrix ``(K, K)``, eigenvalues floored at 1e-8."""
    result: Tensor = _InverseSquareRoot.apply(matrix)  # type: ignore[no-untyped-call]
    return result
