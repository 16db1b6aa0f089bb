"""rRCM: contrastive pre-training that maps a whole diffusion trajectory to one representation.

The encoder sees a noisy image and its noise level. Neighbouring points of the same trajectory are
drawn together and told apart from other images; two augmentations at the clean end are contrasted
as usual. Fine-tuned at one noise level (:func:`fit_smoothed_classifier`) it is the base classifier
of randomized smoothing, with a single forward pass per noisy copy.

Source: J. Lei, J. Berner, J. Wang, Z. Chen, Z. Ba, K. Ren, J. Zhu, A. Anandkumar, "Robust
Representation Consistency Model via Contrastive Denoising", ICLR 2025, arXiv 2501.13094.
Departures: the noise level's index is drawn on the first process and sent to all, instead of
relying on equal seeds.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from pyrobust._checks import (
    check_at_least,
    check_float_tensor,
    check_integer,
    check_positive,
    check_shape,
)
from pyrobust.train.noise_levels import (
    KarrasSchedule,
    improved_consistency_scales,
    sigmoid_ema,
)

__all__ = ["RRCMLosses", "RRCMPretrainer", "info_nce"]


def info_nce(f: Tensor, target: Tensor, tau: float = 0.2, gather: bool = True) -> Tensor:
    """Mean of ``logsumexp_j(<f_i, g_j> / tau) - <f_i, g_i> / tau`` over unit vectors.

    Args:
        f: ``(B, ...)`` float, flattened per row; receives the gradient.
        target: ``(B, ...)``, row ``i`` belongs to row ``i`` of ``f``; its gradient is stopped.
        tau: temperature, ``> 0``.
        gather: in a process group, take the targets of all processes as negatives.

    Returns:
        Scalar, ``>= 0``, in float32 or wider.

    Raises:
        ValueError: shapes that disagree, a single row without others to tell it from, or
            processes with different batch sizes.

    Example:
        >>> float(info_nce(torch.eye(4), torch.eye(4), tau=0.1)) < 0.001
        True
    """
    check_positive("info_nce", "tau", tau)
    check_shape("info_nce", "target", target, tuple(f.shape))
    others = target.detach().flatten(1)
    if gather and _world() > 1:
        others = _gathered(others)
    if len(others) < 2:
        raise ValueError(f"info_nce: the batch must hold at least 2 rows; got {len(f)}.")
    wide = torch.promote_types(f.dtype, torch.float32)
    rows = F.normalize(f.flatten(1).to(wide), dim=1)
    similarity = rows @ F.normalize(others.to(wide), dim=1).T / tau
    return F.cross_entropy(similarity, torch.arange(len(f), device=f.device))


@dataclass(frozen=True)
class RRCMLosses:
    """What one step did.

    Attributes:
        loss: sum of the two, detached.
        contrast: symmetric contrast of two views at the clean end.
        consistency: contrast of neighbouring points of a trajectory.
        sigma: noise level of the step.
        levels: noise levels in use.
        decay: decay of the target.
    """

    loss: float
    contrast: float
    consistency: float
    sigma: float
    levels: int
    decay: float


class RRCMPretrainer:
    """One training step after the other; data, optimizer and schedule of the rate are yours.

    Args:
        encoder: called as ``encoder(x, sigma)``, returns projection and feature, as
            :class:`pyrobust.nn.NoiseConditionedEncoder`; may be wrapped in
            ``DistributedDataParallel(..., broadcast_buffers=False)``.
        optimizer: of the encoder's parameters (the paper: AdamW, rate 1e-4).
        total_steps: length of training, ``>= 1``; the schedules depend on it.
        tau: temperature of both losses, ``> 0``.
        schedule: noise levels; None takes the defaults.
        levels: first and last number of intervals between levels.
        ema: first and last decay of the target, and sharpness.
        clip: largest norm of the gradient, ``> 0``; None for any.
        clip_after: steps before clipping begins (the paper: the warm-up).
        gather: take negatives from all processes.
        seed: of noise and noise levels.

    Attributes:
        target: the moving average of the encoder; never receives a gradient.
        steps: steps done.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        tau: float = 0.2,
        schedule: KarrasSchedule | None = None,
        levels: tuple[int, int] = (20, 80),
        ema: tuple[float, float, float] = (0.99, 0.9999, 15.0),
        clip: float | None = 2.0,
        clip_after: int = 0,
        gather: bool = True,
        seed: int = 0,
    ) -> None:
        subject = type(self).__name__
        check_integer(subject, "total_steps", total_steps, 1)
        check_positive(subject, "tau", tau)
        check_at_least(subject, "clip_after", clip_after, 0)
        if clip is not None:
            check_positive(subject, "clip", clip)
        improved_consistency_scales(0, total_steps, *levels)
        sigmoid_ema(0, total_steps, *ema)
        self.encoder, self.optimizer = encoder, optimizer
        self.target = copy.deepcopy(_unwrapped(encoder)).requires_grad_(False)
        self.total_steps, self.tau = total_steps, tau
        self.schedule = schedule or KarrasSchedule()
        self.levels, self.ema = levels, ema
        self.clip, self.clip_after, self.gather = clip, clip_after, gather
        self.steps = 0
        self._index_draws = torch.Generator().manual_seed(seed)
        self._noise_draws = torch.Generator().manual_seed(seed + 1 + _rank())

    def step(self, x: Tensor, view1: Tensor, view2: Tensor) -> RRCMLosses:
        """One step of the optimizer and of the target.

        Args:
            x: ``(B, ...)`` images in [-1, 1], ``B >= 2``; one batch per process, all of one size.
            view1: an augmentation of each, same shape.
            view2: another.

        Raises:
            TypeError: ``x`` is not floating-point.
            ValueError: shapes that disagree or a single image.
            FloatingPointError: the loss is not finite.
        """
        levels = improved_consistency_scales(self.steps, self.total_steps, *self.levels)
        index = self._draw_index(levels - 1)
        noise = torch.randn(x.shape, generator=self._noise_draws, dtype=x.dtype).to(x.device)
        contrast, consistency = self.losses(x, view1, view2, index, levels, noise)
        loss = contrast + consistency
        if not torch.isfinite(loss):
            raise FloatingPointError(f"RRCMPretrainer: the loss became {loss.item()}.")
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None and self.steps >= self.clip_after:
            nn.utils.clip_grad_norm_(self.encoder.parameters(), self.clip)
        self.optimizer.step()
        decay = sigmoid_ema(self.steps, self.total_steps, *self.ema)
        self._follow(decay)
        self.steps += 1
        return RRCMLosses(
            loss.item(),
            contrast.item(),
            consistency.item(),
            float(self.schedule.sigmas(levels)[index]),
            levels,
            decay,
        )

    def losses(
        self, x: Tensor, view1: Tensor, view2: Tensor, index: int, levels: int, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Contrast and consistency at the noise level ``index`` of ``levels``.

        Args:
            x: ``(B, ...)`` images in [-1, 1].
            view1: an augmentation of each.
            view2: another.
            index: in ``[0, levels - 2]``; the same on all processes.
            levels: number of noise levels.
            noise: ``(B, ...)`` standard normal, one draw per image.

        Returns:
            The two losses, scalars with gradients for the encoder alone.

        Raises:
            TypeError: ``x`` is not floating-point.
            ValueError: shapes that disagree, a single image, an index out of range, or processes
                with different indices: images at other noise levels are trivial negatives.
        """
        self._check(x, view1, view2)
        if not 0 <= index < levels - 1:
            raise ValueError(
                f"RRCMPretrainer: index must lie in [0, {levels - 2}]; got {index} of {levels} "
                "levels."
            )
        if self.gather and _world() > 1:
            _check_one_level(index, levels, x.device)
        sigmas = self.schedule.sigmas(levels).tolist()
        low, here, after = sigmas[-1], sigmas[index], sigmas[index + 1]
        first, second = view1 + low * noise, view2 + low * noise
        with torch.no_grad():
            fixed_first, fixed_second = (self.target(v, low)[0] for v in (first, second))
        contrast = info_nce(
            self.encoder(first, low)[0], fixed_second, self.tau, self.gather
        ) + info_nce(self.encoder(second, low)[0], fixed_first, self.tau, self.gather)
        feature = self.encoder(x + here * noise, here)[1]
        with torch.no_grad():  # the same weights, one point further along the trajectory
            aim = self.encoder(x + after * noise, after)[1]
        return contrast, info_nce(feature, aim, self.tau, self.gather)

    def state_dict(self) -> dict[str, Any]:
        """Target, step and random state; the encoder and the optimizer save themselves."""
        return {
            "target": self.target.state_dict(),
            "steps": self.steps,
            "index_draws": self._index_draws.get_state(),
            "noise_draws": self._noise_draws.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of the same process."""
        self.target.load_state_dict(state["target"])
        self.steps = int(state["steps"])
        self._index_draws.set_state(state["index_draws"])
        self._noise_draws.set_state(state["noise_draws"])

    def _check(self, x: Tensor, view1: Tensor, view2: Tensor) -> None:
        check_float_tensor("RRCMPretrainer", "x", x)
        for name, view in (("view1", view1), ("view2", view2)):
            check_shape("RRCMPretrainer", name, view, tuple(x.shape))
        if len(x) < 2:
            raise ValueError(
                f"RRCMPretrainer: the batch must hold at least 2 images, as the others are the "
                f"negatives; got {len(x)}."
            )
        if bool((x.abs() > 1 + 1e-6).any()):
            warnings.warn(
                "RRCMPretrainer: x should lie in [-1, 1]: noise levels count in those units; got "
                f"values up to {float(x.abs().max()):.3g}.",
                stacklevel=4,
            )

    def _draw_index(self, intervals: int) -> int:
        """Uniform in ``[0, intervals)``, the draw of the first process everywhere."""
        index = torch.randint(intervals, (1,), generator=self._index_draws)
        if _world() > 1:
            device = next(self.encoder.parameters()).device
            index = index.to(device)
            distributed.broadcast(index, 0)
        return int(index)

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        """Move the target towards the encoder."""
        online = dict(_unwrapped(self.encoder).named_parameters())
        for name, value in self.target.named_parameters():
            value.lerp_(online[name], 1 - decay)


def _unwrapped(encoder: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, or the module itself."""
    inside = getattr(encoder, "module", encoder)
    return inside if isinstance(encoder, nn.parallel.DistributedDataParallel) else encoder


def _world() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if ready else 1


def _rank() -> int:
    return int(distributed.get_rank()) if _world() > 1 else 0


def _check_one_level(index: int, levels: int, device: torch.device) -> None:
    mine = torch.tensor([index, levels], device=device)
    every = [torch.empty_like(mine) for _ in range(_world())]
    distributed.all_gather(every, mine)
    if any(not torch.equal(one, mine) for one in every):
        raise ValueError(
            "RRCMPretrainer: all processes must use one noise level; got index and levels "
            f"{[tuple(one.tolist()) for one in every]}."
        )


def _gathered(local: Tensor) -> Tensor:
    """The rows of all processes, this one's first."""
    sizes = [torch.zeros(2, dtype=torch.int64, device=local.device) for _ in range(_world())]
    distributed.all_gather(sizes, torch.tensor(local.shape, device=local.device))
    if any(not torch.equal(size, sizes[0]) for size in sizes):
        shapes = [tuple(size.tolist()) for size in sizes]
        raise ValueError(f"info_nce: all processes must hold batches of one shape; got {shapes}.")
    parts = [torch.empty_like(local) for _ in sizes]
    distributed.all_gather(parts, local.contiguous())
    parts.insert(0, parts.pop(_rank()))
    return torch.cat(parts)
