"""EW-LoRA: a low-rank update of a decoder that writes a fixed message into every output.

A decoder (the VAE decoder of a latent diffusion model) gets LoRA on a few convolutions and is
trained so that a frozen extractor reads the message from each decoded image, while the image stays
close to what the clean decoder gives. A controller raises the weight of whichever target (image
quality, bit accuracy) is not met. Continued fine-tuning of the decoder erases the mark: report it.
``fine_tuning`` embeds against that, by first-order unrolled fine-tuning or weight noise.

Source: Lin, Li, Tondi, Li, Barni, "An Efficient Watermarking Method for Latent Diffusion Models via
Low-Rank Adaptation", arXiv 2410.20202 (dynamic loss weighting in version 2).
Departures: the two weights are divided by their sum before use (under Adam only the ratio matters,
and half precision does not overflow). The counter of an unmet target restarts at zero, our reading.
Embedding against fine-tuning is our extension, off by default.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import check_at_least, check_eval_mode, check_integer, check_positive
from pyrobust.evaluate.ownership import bit_accuracy, check_image_range, check_message
from pyrobust.train.adapters import (
    LoRA,
    adapter_param_groups,
    adapters_disabled,
    apply_adapter,
)
from pyrobust.train.unrolled_fine_tuning import UnrolledFineTuning

__all__ = ["DynamicLossWeights", "LoRAWatermark", "WatermarkStep"]


class DynamicLossWeights:
    """Controller of the image and watermark loss weights.

    Every step: a bit accuracy below its target raises the watermark weight by ``2 gamma``, a PSNR
    below its target raises the image weight by ``gamma``; a target met ``patience`` times in a row
    is made harder by its step.

    Args:
        psnr: first PSNR target, dB.
        bitacc: first bit-accuracy target, in (0, 1].
        gamma: weight increment, ``> 0``.
        step: increments of the PSNR (dB) and bit-accuracy targets, ``>= 0``.
        patience: steps in a row before a target is raised, ``>= 1``.
    """

    def __init__(
        self,
        *,
        psnr: float = 30.0,
        bitacc: float = 0.9,
        gamma: float = 0.30,
        step: tuple[float, float] = (2.5, 0.08),
        patience: int = 5,
    ) -> None:
        check_positive("DynamicLossWeights", "psnr", psnr)
        check_positive("DynamicLossWeights", "gamma", gamma)
        if not 0 < bitacc <= 1:
            raise ValueError(f"DynamicLossWeights: bitacc must lie in (0, 1]; got {bitacc}.")
        for value in step:
            check_at_least("DynamicLossWeights", "step", value, 0.0)
        check_integer("DynamicLossWeights", "patience", patience, 1)
        self.psnr, self.bitacc, self.gamma = psnr, bitacc, gamma
        self.psnr_step, self.bitacc_step = step
        self.patience = patience
        self.image_weight, self.mark_weight = 1.0, 0.0
        self.image_count, self.mark_count = 0, 0

    def update(self, psnr: float, bitacc: float) -> None:
        """Take one measurement (of the present batch) into account."""
        if bitacc < self.bitacc:
            self.mark_weight += 2 * self.gamma
            self.mark_count = 0
        else:
            self.mark_count += 1
        if psnr < self.psnr:
            self.image_weight += self.gamma
            self.image_count = 0
        else:
            self.image_count += 1
        if self.mark_count == self.patience:
            self.bitacc = min(self.bitacc + self.bitacc_step, 1.0)
            self.mark_count = 0
        if self.image_count == self.patience:
            self.psnr += self.psnr_step
            self.image_count = 0

    @property
    def normalised(self) -> tuple[float, float]:
        """Image and watermark weight divided by their sum."""
        total = self.image_weight + self.mark_weight
        return self.image_weight / total, self.mark_weight / total

    def state_dict(self) -> dict[str, Any]:
        """Targets, weights and counters."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: other keys.
        """
        if set(state) != set(vars(self)):
            raise ValueError(f"DynamicLossWeights: unexpected state keys {sorted(state)}.")
        vars(self).update(state)


@dataclass(frozen=True)
class WatermarkStep:
    """Measurements of one training step: PSNR in dB against the clean decoder, bit accuracy."""

    psnr: float
    bitacc: float
    loss: float


class LoRAWatermark:
    """Train low-rank updates of ``decoder`` so that its images carry ``message``.

    Args:
        decoder: latents to images; its targeted layers get adapters, everything else is frozen.
        layers: ends of the names of the convolutions (or linear layers) to adapt; for Stable
            Diffusion's VAE in diffusers: the ``conv1`` and ``conv2`` of ``up_blocks.3.resnets``.
        message: ``(n,)`` zeros and ones.
        extractor: images to ``(B, n)`` logits, frozen, in evaluation mode.
        image_loss: ``(marked, clean) -> scalar``; default mean squared error. Pass LPIPS or a
            Watson-type loss where one is at hand.
        scheduler: loss weights; default :class:`DynamicLossWeights`.
        r: rank.
        alpha: LoRA scale.
        lr: AdamW learning rate.
        decode: how to call the decoder, ``(decoder, latents) -> images``; default plain call.
        image_range: the range that the extractor takes: a clean image beyond it by more than a
            quarter of its width is refused at the first step. None checks nothing.
        fine_tuning: embed against clean fine-tuning of the whole decoder (towards the images of
            the clean one); None, as published, does not.

    Raises:
        ValueError: message not binary, layers not found (the candidates are listed), or a model in
            training mode.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[str],
        message: Tensor,
        extractor: nn.Module,
        *,
        image_loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        scheduler: DynamicLossWeights | None = None,
        r: int = 4,
        alpha: float = 32.0,
        lr: float = 5e-4,
        decode: Callable[[nn.Module, Tensor], Tensor] | None = None,
        image_range: tuple[float, float] | None = None,
        fine_tuning: UnrolledFineTuning | None = None,
    ) -> None:
        check_message("LoRAWatermark", message)
        check_eval_mode("LoRAWatermark", extractor)
        check_eval_mode("LoRAWatermark", decoder)
        check_positive("LoRAWatermark", "lr", lr)
        self.decoder = apply_adapter(decoder, LoRA(tuple(layers), r=r, alpha=alpha)).eval()
        self.extractor = extractor.requires_grad_(False)
        self.message, self.image_loss = message, image_loss
        self.image_range = image_range
        self.fine_tuning, self._steps = fine_tuning, 0
        self.scheduler = DynamicLossWeights() if scheduler is None else scheduler
        self._decode = decode if decode is not None else lambda model, z: model(z)
        self.optimizer = torch.optim.AdamW(adapter_param_groups(self.decoder, lr=lr))

    def clean(self, latents: Tensor) -> Tensor:
        """Images of the decoder without the update."""
        with torch.no_grad(), adapters_disabled(self.decoder):
            return self._decode(self.decoder, latents)

    def marked(self, latents: Tensor) -> Tensor:
        """Images of the decoder with the update."""
        return self._decode(self.decoder, latents)

    def step(self, latents: Tensor) -> WatermarkStep:
        """One optimizer step on a batch of latents.

        Raises:
            ValueError: the extractor's bits and the message differ in number, or the decoder's
                images leave the declared range.
        """
        clean = self.clean(latents)
        check_image_range("LoRAWatermark", "images of the decoder", clean, self.image_range)
        marked = self.marked(latents)
        logits = self.extractor(marked)
        measured = bit_accuracy(logits.detach(), self.message)
        target = self.message.to(logits).expand_as(logits)
        mse = F.mse_loss(marked.detach(), clean).item()
        psnr = -10 * math.log10(mse) if mse > 0 else math.inf
        self.scheduler.update(psnr, measured)
        image_weight, mark_weight = self.scheduler.normalised
        loss = image_weight * self.image_loss(marked, clean)
        loss = loss + mark_weight * F.binary_cross_entropy_with_logits(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self._steps += 1
        if self.fine_tuning is not None and self._steps % self.fine_tuning.every == 0:
            self._embed_against_fine_tuning(latents, clean, target, mark_weight)
        self.optimizer.step()
        return WatermarkStep(psnr, measured, loss.item())

    def _embed_against_fine_tuning(
        self, latents: Tensor, clean: Tensor, target: Tensor, mark_weight: float
    ) -> None:
        """Add the gradient of the message's loss at fine-tuned weights."""
        assert self.fine_tuning is not None

        def tuning_loss(model: nn.Module) -> Tensor:
            return F.mse_loss(self._decode(model, latents), clean)

        def message_loss(model: nn.Module) -> Tensor:
            logits = self.extractor(self._decode(model, latents))
            return mark_weight * F.binary_cross_entropy_with_logits(logits, target)

        self.fine_tuning.add_gradient_(self.decoder, tuning_loss, message_loss)

    def fit(self, batches: Iterable[Tensor], *, progress: bool = False) -> list[WatermarkStep]:
        """One :meth:`step` per batch of latents."""
        return [self.step(z) for z in tqdm(batches, disable=not progress, desc="LoRAWatermark")]

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on: adapters, optimizer, controller.

        An embedding against fine-tuning starts over with a fresh copy of the decoder.
        """
        return {
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": copy.deepcopy(self.scheduler.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    @torch.no_grad()
    def robustness(
        self, latents: Tensor, distortions: dict[str, Callable[[Tensor], Tensor]]
    ) -> dict[str, float]:
        """Bit accuracy of marked images after each distortion, and untouched ("none")."""
        images = self.marked(latents)
        table = {"none": bit_accuracy(self.extractor(images), self.message)}
        for name, distort in distortions.items():
            table[name] = bit_accuracy(self.extractor(distort(images)), self.message)
        return table
