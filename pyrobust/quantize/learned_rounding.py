"""Learned rounding: choose for every weight whether to round up or down, by gradient descent.

Rounding each weight to its nearest level ignores what the layer computes. Here the choice is
learned, layer by layer or block by block, so that outputs on a few hundred unlabelled inputs stay
those of the float model; it ends in ordinary codes. Worth its minutes at 2 to 4 bits.

Source: Yvinec, Dapogny, Bailly, "Gradient-based post-training quantization: challenging the status
quo", 2023, arXiv 2308.07662, the factors that it audits (its "GPTQ" is this family, not the
Hessian method of that name); mechanics of Nagel et al., AdaRound, ICML 2020, arXiv 2004.10568,
Li et al., BRECQ, ICLR 2021, arXiv 2102.05426 (blocks), and Wei et al., QDrop, ICLR 2022,
arXiv 2203.05740 (mixed inputs, activations dropped at random). There is no public code of the
first paper.
Departures: nearest rounding stays wherever learning did not improve the loss on all calibration
data; the form of two degrees of freedom is ours; under the mean squared error a coordinate descent
(:mod:`pyrobust.quantize.code_descent`) follows the gradient steps, and GPTQ may come before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_instance,
    check_integer,
    check_positive,
    check_unit,
)
from pyrobust.quantize.calibration_block import CalibrationBlock
from pyrobust.quantize.fold_batch_norm import fold_batch_norm
from pyrobust.quantize.hessian import CONVOLUTIONS
from pyrobust.quantize.power_quantizer import PowerQuantizer
from pyrobust.quantize.reconstruction import LOSSES, OPTIMIZERS, Schedule
from pyrobust.quantize.rounding_data import RoundingOptions
from pyrobust.quantize.rounding_grid import GRID_BITS
from pyrobust.quantize.rounding_scope import round_block, round_layers
from pyrobust.quantize.rounding_variable import VARIABLES

__all__ = ["LearnedRounding", "learned_rounding"]

_RATES = {"adam": 1e-2, "sgd": 1e-1, "sign": 1e-2}


@dataclass(frozen=True)
class LearnedRounding:
    """The quantizer of :func:`learned_rounding`, for ``pyrobust.pack(model, quantizer=...)``.

    Attributes:
        scope: ``"layer"`` keeps the outputs of each layer, ``"block"`` those of each block, whose
            layers then learn together; in a plain ``Sequential`` each module is a block.
        loss: ``"mse"``, ``"l1"``, ``"cosine"`` or ``"kl"``.
        variable: ``"sigmoid"``, ``"ste"`` or ``"soft"``
            (:mod:`~pyrobust.quantize.rounding_variable`).
        freedom: 1, floor or ceiling; 2, from one below the floor to one above the ceiling.
        optimizer: ``"adam"``, ``"sgd"`` or ``"sign"``.
        learn_scale: move the scales too.
        learn_bias: add the mean error of a layer's outputs to its bias, where it has one and where
            that lowers the loss (of the block with ``scope="block"``).
        scheme: a :class:`PowerQuantizer`; None is the uniform grid.
        weight_fraction: share of the weights whose rounding is learned, those nearest to the middle
            between two levels; others are rounded to nearest. In (0, 1].
        input: ``"quantized"``: layers learn on inputs from the quantized layers before them;
            ``"float"``: on those of the float model; ``"mix"``: each element from either.
        iterations: steps per layer or block; 400 to 1000 for small networks, 20,000 for large ones.
            0 leaves all to ``start`` and ``descent``, which takes seconds.
        batch_size: inputs (images, sequences) a step.
        learning_rate: of the rounding variables; None takes 0.01, 0.1 for SGD.
        scale_rate: of the logarithms of the scales.
        regularization: weight of the penalty that drives offsets to integers.
        warmup: share of the steps before it starts.
        start: ``"nearest"``, offsets at which the soft weight is the float weight; ``"gptq"``, the
            codes of GPTQ, for layers for the weight that serves the layer's inputs best and free to
            move to any level in the descent (layers: ``loss="mse"``; no ``scheme``).
        descent: sweeps of coordinate descent after the steps, at most; single codes move, within
            what ``freedom`` allows, and scales are fitted while that lowers the error. Layers under
            ``"mse"`` only: the error of a block is no quadratic function of its weights.
        damp: for ``start`` and ``descent``: adds to the second moments of the inputs this share of
            their mean, which keeps weights that few data determine near their float values.
        activation_bits: 2 to 8, to round the inputs of layers too, with a step and a lowest level
            per layer that are learned (inputs of layers with 8-bit weights get 8 bits); None leaves
            activations in float. Packed layers then stand behind the rounding of their inputs
            (:class:`pyrobust.nn.RoundedInput`).
        drop: probability that an element of a rounded input is left in float in a step (QDrop), in
            [0, 1].
        seed: of the choice of minibatches, of mixed inputs and of dropping.

    Raises:
        ValueError: an option is out of range.
    """

    scope: str = "layer"
    loss: str = "mse"
    variable: str = "sigmoid"
    freedom: int = 1
    optimizer: str = "adam"
    learn_scale: bool = True
    learn_bias: bool = True
    scheme: PowerQuantizer | None = None
    weight_fraction: float = 1.0
    input: str = "quantized"
    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float | None = None
    scale_rate: float = 1e-3
    regularization: float = 0.01
    warmup: float = 0.2
    start: str = "nearest"
    descent: int = 20
    damp: float = 0.01
    activation_bits: int | None = None
    drop: float = 0.5
    seed: int = 0

    propagate = "quantized"
    float_stream = True

    def __post_init__(self) -> None:
        subject = type(self).__name__
        check_choice(subject, "scope", self.scope, ("layer", "block"))
        check_choice(subject, "loss", self.loss, LOSSES)
        check_choice(subject, "variable", self.variable, VARIABLES)
        check_choice(subject, "freedom", self.freedom, (1, 2))
        check_choice(subject, "optimizer", self.optimizer, OPTIMIZERS)
        check_choice(subject, "input", self.input, ("quantized", "float", "mix"))
        check_integer(subject, "iterations", self.iterations, 0)
        check_choice(subject, "start", self.start, ("nearest", "gptq"))
        check_integer(subject, "descent", self.descent, 0)
        check_at_least(subject, "damp", self.damp, 0.0)
        check_integer(subject, "batch_size", self.batch_size, 1)
        check_positive(subject, "weight_fraction", self.weight_fraction)
        check_unit(subject, "weight_fraction", self.weight_fraction)
        check_positive(subject, "scale_rate", self.scale_rate)
        check_at_least(subject, "regularization", self.regularization, 0.0)
        check_unit(subject, "warmup", self.warmup)
        check_unit(subject, "drop", self.drop)
        if self.activation_bits is not None:
            check_integer(subject, "activation_bits", self.activation_bits, 2)
            if self.activation_bits > 8:
                raise ValueError(
                    f"{subject}: activation_bits must be at most 8; got {self.activation_bits}."
                )
        if self.learning_rate is not None:
            check_positive(subject, "learning_rate", self.learning_rate)
        if self.scheme is not None:
            check_instance(subject, "scheme", self.scheme, PowerQuantizer)
        if self.start == "gptq":
            self._check_gptq()

    def _check_gptq(self) -> None:
        asked = (self.loss, self.scheme, self.weight_fraction)
        fits = self.loss == "mse" or self.scope == "block"
        if not fits or asked[1:] != (None, 1.0):
            raise ValueError(
                "LearnedRounding: start 'gptq' needs loss 'mse' (in scope 'layer'), no scheme and "
                f"a weight_fraction of 1; got {asked}."
            )

    @property
    def schedule(self) -> Schedule:
        """The part of the options that the loop needs."""
        rate = _RATES[self.optimizer] if self.learning_rate is None else self.learning_rate
        return Schedule(
            self.iterations,
            self.optimizer,
            rate,
            self.scale_rate,
            self.regularization,
            self.warmup,
        )

    def quantize_block(self, block: CalibrationBlock) -> None:
        """Learn the rounding of one block's layers and install their codes."""
        if self.iterations and torch.is_inference_mode_enabled():
            raise ValueError(
                "LearnedRounding: gradients must be allowed; it runs in torch.inference_mode "
                "(torch.no_grad may stay)."
            )
        for name, each in block.formats.items():
            accepted = GRID_BITS if self.scheme is None else GRID_BITS[:3]
            check_choice(f"LearnedRounding: '{name}'", "bits", each["bits"], accepted)
        if self.scope == "block" and block.name == "":
            raise ValueError(
                "LearnedRounding: scope 'block' needs a model with a list of blocks, or their "
                "names in blocks; got a model without."
            )
        options = RoundingOptions(
            schedule=self.schedule,
            loss=self.loss,
            variable=self.variable,
            freedom=self.freedom,
            learn_scale=self.learn_scale,
            learn_bias=self.learn_bias,
            scheme=self.scheme,
            weight_fraction=self.weight_fraction,
            input=self.input,
            batch_size=self.batch_size,
            seed=self.seed,
            start=self.start,
            descent=self.descent,
            damp=self.damp,
            activation_bits=self.activation_bits,
            drop=self.drop,
        )
        (round_layers if self.scope == "layer" else round_block)(block, options)


def learned_rounding(
    model: nn.Module,
    calibration: Any,
    bits: float = 4,
    *,
    granularity: str = "channel",
    group_size: int = 128,
    blocks: str | Sequence[str] | None = None,
    skip: Iterable[str] = (),
    bits_for: Mapping[str, float | None] | None = None,
    resume: str | None = None,
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """Pack ``model`` with learned rounding.

    Batch normalisations behind linear layers and convolutions are folded into them first.

    Args:
        model: in evaluation mode; it is left as it was.
        calibration: batches of inputs, as for :func:`pyrobust.pack`.
        bits: 2, 3, 4 or 8.
        granularity: ``"channel"``, a scale per output channel, or ``"group"``, one per
            ``group_size`` inputs of it; without zero-points.
        group_size: for ``"group"``.
        blocks: as for :func:`pyrobust.pack`; needed by ``scope="block"`` where the model has no
            list of blocks.
        skip: as for :func:`pyrobust.pack`.
        bits_for: as for :func:`pyrobust.pack`, such as :func:`allocate_bits` gives.
        resume: as for :func:`pyrobust.pack`.
        progress: show a progress bar.
        options: of :class:`LearnedRounding`.

    Returns:
        The packed model.

    Raises:
        TypeError: ``model`` is not a module, or an option does not exist.
        ValueError: bits are not 2, 3, 4 or 8, two layers share a weight, calibration data are
            missing or bad, or an option is out of range.
    """
    from pyrobust.pack import pack

    subject = "learned_rounding"
    check_instance(subject, "model", model, nn.Module)
    check_choice(subject, "granularity", granularity, ("channel", "group"))
    check_choice(subject, "bits", bits, GRID_BITS)
    quantizer = LearnedRounding(**options)
    _check_shared(model)
    model = fold_batch_norm(model)
    widest = max([1, *(p[0].numel() for p in model.parameters() if p.ndim >= 2 and p.numel())])
    return pack(
        model,
        bits=bits,
        group_size=widest if granularity == "channel" else group_size,
        symmetric=True,
        quantizer=quantizer,
        calibration=calibration,
        blocks=blocks,
        skip=skip,
        bits_for=bits_for,
        resume=resume,
        progress=progress,
    )


def _check_shared(model: nn.Module) -> None:
    """A shared weight would be learned on the inputs of its first layer alone."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        first = owners.setdefault(weight.data_ptr() if weight.numel() else id(weight), name)
        if first != name:
            raise ValueError(
                "learned_rounding: every layer must have a weight of its own; "
                f"'{first}' and '{name}' share one (pyrobust.pack accepts it)."
            )
