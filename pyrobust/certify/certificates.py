"""What a certification returns: frozen results with the batch first.

``prediction`` is -1 and ``radius`` 0 where the procedure abstains: an abstention is a result.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_shape, require_extra

__all__ = ["ABSTAIN", "Certificate", "SequentialCertificate", "SmoothingCertificate"]

ABSTAIN = -1


@dataclass(frozen=True)
class Certificate:
    """Per input a class and a radius inside which that class does not change.

    Attributes:
        prediction: ``(B,)`` int64 class, -1 where the procedure abstains.
        radius: ``(B,)`` float64, ``>= 0``, in the units of the input and the norm of ``norm``.
        alpha: probability of error per input, in [0, 1); 0 for a deterministic statement.
        assumption: what the statement takes for granted, in one sentence.
        norm: the norm of the radius: ``"l2"``, ``"l1"``, ``"l0"``, ``"linf"`` or ``"words"``.
        certified: False for an estimate that carries no guarantee.
    """

    prediction: Tensor
    radius: Tensor
    alpha: float
    assumption: str
    norm: str = "l2"
    certified: bool = True

    def __len__(self) -> int:
        return int(self.prediction.shape[0])

    @property
    def abstained(self) -> Tensor:
        """``(B,)`` bool, True where no class is certified."""
        return self.prediction == ABSTAIN

    def certified_accuracy(self, labels: Tensor, radii: Any = 0.0) -> Tensor:
        """Share of inputs that are classified right and certified at each radius.

        Args:
            labels: ``(B,)`` int64 true classes; an abstention is never right.
            radii: one radius ``>= 0`` or a sequence of them, in the units of ``radius``.

        Returns:
            float64 tensor of the shape of ``radii``. At radius 0 a right, certified prediction
            counts; at ``r > 0`` its radius must be at least ``r``.

        Raises:
            ValueError: labels of another shape, or a radius that is negative or NaN.
        """
        check_shape(type(self).__name__, "labels", labels, (len(self),))
        correct = ~self.abstained & (self.prediction == labels.to(self.prediction.device))
        wanted = torch.as_tensor(radii, dtype=torch.float64, device=self.radius.device)
        if not bool((wanted >= 0).all()):
            raise ValueError(f"{type(self).__name__}: radii must be at least 0; got {radii}.")
        enough = self.radius >= wanted[..., None]
        return (enough & correct).double().mean(-1)

    def summary(self) -> str:
        """One line for people: how many are certified, how far, at which confidence."""
        certain = ~self.abstained
        share = f"{int(certain.sum())} of {len(self)} certified"
        radius = float(self.radius[certain].mean()) if bool(certain.any()) else 0.0
        word = "guarantee" if self.certified else "estimate, no guarantee"
        return (
            f"{share}, mean {self.norm} radius {radius:.4g} "
            f"({word}; alpha = {self.alpha:g} per input; {self.assumption})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        result: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            result[field.name] = value.tolist() if isinstance(value, Tensor) else value
        return result

    def plot(self, ax: Any = None, *, labels: Tensor | None = None) -> Any:
        """Draw the share of certified inputs against the radius; needs matplotlib.

        Args:
            ax: matplotlib axes; None makes new ones.
            labels: ``(B,)`` int64; given, only right predictions count.

        Returns:
            The axes.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise require_extra(f"{type(self).__name__}.plot", "matplotlib", "plot") from error
        if ax is None:
            ax = pyplot.subplots()[1]
        reference = self.prediction if labels is None else labels
        counted = ~self.abstained & (self.prediction == reference.to(self.prediction.device))
        radii = self.radius[counted].sort().values.tolist()
        shares = [(len(radii) - i) / max(len(self), 1) for i in range(len(radii))]
        ax.step([0.0, *radii], [*shares[:1], *shares] if radii else [0.0], where="pre")
        ax.set_xlabel(f"{self.norm} radius")
        ax.set_ylabel("certified share" if labels is None else "certified accuracy")
        ax.set_ylim(0, 1)
        return ax


@dataclass(frozen=True)
class SmoothingCertificate(Certificate):
    """A certificate of a randomly smoothed classifier, with the votes behind it.

    Attributes:
        p_lower: ``(B,)`` float64 lower confidence bound of the selected class's probability.
        counts: ``(B, K)`` int64 votes that the bound was computed from.
        selection_counts: ``(B, K)`` int64 votes that chose the class; never reused.
        samples: ``(B,)`` int64 forward passes spent, selection included.
        sigma: standard deviation of the noise, in the units of the input.
    """

    p_lower: Tensor | None = None
    counts: Tensor | None = None
    selection_counts: Tensor | None = None
    samples: Tensor | None = None
    sigma: float = 0.0


@dataclass(frozen=True)
class SequentialCertificate(Certificate):
    """Decisions at given radii by sequential tests; ``radius`` is the largest certified one.

    Attributes:
        radii: ``(R,)`` float64 radii asked for, increasing.
        errors: ``(R,)`` float64 exact probability of a false claim at each radius; the claims of
            one input are nested, so all together hold with probability at least ``1 - alpha``.
        successes: ``(B,)`` int64 votes for the selected class among the test samples.
        trials: ``(B,)`` int64 test samples drawn.
        selection_counts: ``(B, K)`` int64 votes that chose the class; never reused.
        samples: ``(B,)`` int64 forward passes spent, selection included.
        sigma: standard deviation of the noise, in the units of the input.
    """

    radii: Tensor | None = None
    errors: Tensor | None = None
    successes: Tensor | None = None
    trials: Tensor | None = None
    selection_counts: Tensor | None = None
    samples: Tensor | None = None
    sigma: float = 0.0
