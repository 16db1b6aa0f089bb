"""OFQ, oscillation-free quantization: train weights of 1 to 7 bits without their endless flipping.

Latent weights near a border between two levels flip back and forth for ever, worst with learned
scales and in the product of queries and keys. Three remedies: scales from statistics
(:class:`~pyrobust.quantize.StatsQuantizer`), one matrix per head for queries and keys
(:class:`~pyrobust.quantize.QKReparamAttention`), and, here, confidence-guided annealing: after
training, freeze every weight that lies safely inside its level and train those near a border.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv 2302.02210; sections 4.1 to 4.3 and the authors' code (MIT).
Departures: in the query-key matrices the mask really stops the gradient (in the code the
straight-through path is added behind it, which makes it inert); the factors themselves are not
frozen there, since every entry of the matrix depends on a whole row and column of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_at_least, check_instance, check_integer, check_positive
from pyrobust.quantize.oscillation import OscillationTracker
from pyrobust.quantize.qk_reparam import QKReparamAttention
from pyrobust.quantize.quant_layers import QuantConv2d, QuantLinear
from pyrobust.quantize.quantized_weights import quantized_layers
from pyrobust.quantize.stats_quantizer import StatsQuantizer

__all__ = ["ConfidenceGuidedAnnealing", "train_ofq"]


class ConfidenceGuidedAnnealing:
    """Lets only weights within ``boundary`` steps of a border between two levels move.

    Call :meth:`pre_step` between ``backward`` and the optimizer's step and :meth:`post_step` after
    it, or :meth:`attach` the optimizer once. Weights away from borders get no gradient and are
    written back after the step (weight decay and momentum would move them). Scales follow the
    weights, so borders are found anew at each step. Everything else trains on.

    Query-key matrices get no gradient away from borders while annealing is on: until
    :meth:`close`, or the end of a ``with`` block.

    Args:
        model: with layers whose weights StatsQ rounds.
        boundary: half width of the strip that stays free, in steps between levels: 0 to 0.5. The
            paper finds 0.005 or 0.007 best.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``boundary`` lies outside [0, 0.5], or the model has no StatsQ weight.
    """

    def __init__(self, model: nn.Module, boundary: float = 0.005) -> None:
        subject = type(self).__name__
        check_instance(subject, "model", model, nn.Module)
        check_at_least(subject, "boundary", boundary, 0.0)
        if boundary > 0.5:
            raise ValueError(f"{subject}: boundary must be at most 0.5; got {boundary}.")
        self.boundary = boundary
        self.layers = {
            name: layer
            for name, layer in quantized_layers(model)
            if isinstance(layer.weight_quantizer, StatsQuantizer)
        }
        self._attentions = [m for m in model.modules() if isinstance(m, QKReparamAttention)]
        if not self.layers:
            raise ValueError(
                f"{subject}: model must have weights rounded by StatsQ; got "
                f"{type(model).__name__} without."
            )
        self._kept: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._hooks: list[Any] = []
        for attention in self._attentions:
            attention.boundary = boundary

    def free(self, layer: QuantLinear | QuantConv2d) -> Tensor:
        """Where the weight of ``layer`` may move now: boolean, of its shape."""
        quantizer, weight = layer.weight_quantizer, layer.weight
        assert isinstance(quantizer, StatsQuantizer)
        scale = quantizer.scale(weight, storable=True)
        return quantizer.near_boundary(weight, self.boundary, scale=scale)

    @torch.no_grad()
    def pre_step(self) -> None:
        """Stop the gradient of every weight away from borders and remember its value."""
        self._kept = {}
        for layer in self.layers.values():
            free = self.free(layer)
            self._kept[layer.weight] = (free, layer.weight.detach().clone())
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(~free, 0)

    @torch.no_grad()
    def post_step(self) -> None:
        """Write the remembered values back."""
        for weight, (free, old) in self._kept.items():
            weight.copy_(torch.where(free, weight, old))
        self._kept = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Let every ``optimizer.step()`` do both; ends at :meth:`close`."""
        self._hooks += [
            optimizer.register_step_pre_hook(lambda *_: self.pre_step()),
            optimizer.register_step_post_hook(lambda *_: self.post_step()),
        ]
        return self

    def close(self) -> None:
        """Annealing is over: leave the optimizer and the query-key matrices alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for attention in self._attentions:
            attention.boundary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def train_ofq(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    annealing_epochs: int = 0,
    teacher: nn.Module | None = None,
    boundary: float | None = 0.005,
    batch_size: int = 64,
    learning_rate: float = 5.47e-4,
    final_rate: float = 1e-5,
    warmup: float = 1 / 60,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    tracker: OscillationTracker | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Train simulated low-bit weights, then anneal them; in place.

    AdamW (no decay of biases, scales and norms), a linear warm-up and a cosine down to
    ``final_rate``, at which annealing goes on with the same optimizer. Defaults are the paper's,
    which trains 300 epochs (5 of warm-up) and anneals for 30 at most.

    Args:
        model: with simulated low-bit weights; its activation scales must be set (see the
            ``example`` of :func:`~pyrobust.quantize.quantize_vit`).
        images: ``(N, ...)`` inputs.
        labels: ``(N,)`` int64 classes.
        epochs: of training, ``>= 1``.
        annealing_epochs: of confidence-guided annealing, ``>= 0``.
        teacher: the float network, in evaluation mode: its soft labels are added to the loss.
        boundary: as for :class:`ConfidenceGuidedAnnealing`; None freezes nothing (a control of
            equal length).
        batch_size: images a step.
        learning_rate: highest rate.
        final_rate: last rate, and that of annealing.
        warmup: share of the training steps that the rate takes to rise.
        weight_decay: of matrices.
        label_smoothing: of the hard labels, in [0, 1).
        tracker: updated after every step.
        seed: of the order of the batches and of all dropout.
        progress: show progress bars.

    Returns:
        ``model``, in evaluation mode.

    Raises:
        ValueError: an argument is out of range, an activation scale is not set, or annealing is
            asked of a model without StatsQ weights.
        FloatingPointError: the loss is no longer finite.
    """
    from pyrobust.train.distillation import Distillation
    from pyrobust.train.loop import fit
    from pyrobust.train.schedules import cosine_decay

    check_instance("train_ofq", "model", model, nn.Module)
    check_integer("train_ofq", "epochs", epochs, 1)
    check_integer("train_ofq", "annealing_epochs", annealing_epochs, 0)
    check_positive("train_ofq", "learning_rate", learning_rate)
    check_positive("train_ofq", "final_rate", final_rate)
    _check_scales(model)
    objective = Distillation(teacher, label_smoothing=label_smoothing)
    optimizer = torch.optim.AdamW(_groups(model, weight_decay), lr=learning_rate)
    common: dict[str, Any] = {
        "objective": objective,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "generator": torch.Generator().manual_seed(seed),
        "after_step": None if tracker is None else lambda: tracker.update(model),
        "progress": progress,
    }
    low = final_rate / learning_rate

    def rate(done: float) -> float:
        return cosine_decay(done, warmup=warmup, end=low)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if annealing_epochs and boundary is not None:
            ConfidenceGuidedAnnealing(model, boundary).close()  # refused before any work
        fit(model, images, labels, epochs=epochs, schedule=rate, **common)
        if annealing_epochs:
            common |= {"schedule": lambda _: low, "description": "anneal"}
            with _annealing(model, boundary, optimizer):
                fit(model, images, labels, epochs=annealing_epochs, **common)
    return model


def _annealing(
    model: nn.Module, boundary: float | None, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[Any]:
    if boundary is None:
        return nullcontext()
    return ConfidenceGuidedAnnealing(model, boundary).attach(optimizer)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _check_scales(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"train_ofq: model must have its activation scales set, but '{name}' is not; run "
                "it on one batch first."
            )
