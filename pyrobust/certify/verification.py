"""Verification of a data set: for which images does the label win all over an l-infinity ball?

Images are bounded in batches. A long run may leave its results in a file, from which a killed run
goes on, and the processes of ``torchrun`` may share the batches. Batches depend on the arguments
only, so every way of running gives the certificate of one process in one go, bit for bit.

Source: S. Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018, arXiv 1810.12715, section 3 (the margins of the label over the other classes).
Departures: none known.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_eval_mode,
    check_finite,
    check_float_tensor,
    check_integer,
    check_labels,
)
from pyrobust.certify.bound import MEMORY, METHODS, bound, margin_specification
from pyrobust.certify.certificates import ABSTAIN, Certificate
from pyrobust.certify.log import LogRow, read_log
from pyrobust.certify.logged_run import LoggedWork, blocks_of, run_logged
from pyrobust.certify.shards import Shard, this_shard
from pyrobust.interval import Interval

__all__ = ["verified"]

_ASSUMPTION = {
    "real": "real arithmetic on the stored weights",
    "deployed": "any order of float32 evaluation of the stored weights, as listed in the guide",
    "deployed-tf32": "any order of evaluation, operands of products in float32 or TF32",
    "deployed-bfloat16": "any order of evaluation, operands of products in float32 or bfloat16",
    "nearest": "none: bounds in plain floating point are an estimate",
}


@torch.no_grad()
def verified(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    method: str = "ibp",
    rounding: str = "real",
    batch_size: int = 256,
    max_memory: int = MEMORY,
    resume: str | Path | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Certificate:
    """Prove for each image that its label wins everywhere within ``eps`` in l-infinity.

    Args:
        model: classifier in evaluation mode, ``(B, ...)`` to ``(B, K)`` logits.
        images: ``(B, ...)`` float32 or float64.
        labels: ``(B,)`` integers in ``[0, K)``.
        eps: radius in the units of the images, ``>= 0``.
        clamp: lowest and highest value that an input can take; None for any.
        method: as in :func:`~pyrobust.certify.bound`.
        rounding: the promise, as in :class:`~pyrobust.Interval`; ``"nearest"`` proves nothing, and
            its certificate says so.
        batch_size: images bounded at a time; the result does not depend on it in sound modes
            beyond the last bits of a bound.
        max_memory: bytes, as in :func:`~pyrobust.certify.bound`.
        resume: a file that gets one line per image (the columns of published certification logs)
            as batches are done, with the description of the work beside it. A call with equal
            arguments, model and data goes on from it, also with another number of processes.
        distributed: share the batches with the other processes that ``torchrun`` started; all of
            them must call this with equal arguments, and all get the whole certificate. ``resume``
            must then lie where all can read it.
        progress: show a progress bar with rate and remaining time.

    Returns:
        A certificate with norm ``"linf"``: the label and radius ``eps`` where the label is proven
        to win, -1 and 0 elsewhere.

    Raises:
        TypeError: images or labels have a wrong type.
        ValueError: the model is in training mode, an argument is out of range, or the file of
            ``resume`` belongs to other work or is damaged.
        FileNotFoundError: the folder of ``resume`` does not exist.
        OSError: the file cannot be written.
    """
    _check(model, images, labels, eps, method, batch_size)
    targets = labels.long()

    @functools.cache  # not before there is work: a finished file needs no model
    def classes() -> int:
        found = int(model(images[:1]).shape[-1])
        check_labels("verified", "labels", labels, len(images), found)
        return found

    def proven(block: range) -> Tensor:
        part = slice(block.start, block.stop)
        box = Interval.ball(images[part], eps, clamp=clamp, rounding=rounding)
        spec = margin_specification(targets[part], classes())
        margins = bound(model, box, spec, method, max_memory=max_memory, lower_only=True)
        return (margins.lower > 0).all(-1).to(labels.device)

    shard = this_shard() if distributed else Shard()
    if resume is None:
        holds = _in_memory(proven, labels, batch_size, shard, progress)
    else:
        options = {
            "eps": float(eps),
            "clamp": clamp,
            "method": method,
            "rounding": rounding,
            "max_memory": max_memory,
        }
        head = _description(model, images, labels) | options | {"batch_size": batch_size}
        holds = _logged(Path(resume), head, proven, labels, batch_size, shard, progress)
    inputs = "" if clamp is None else f"; inputs in [{clamp[0]:g}, {clamp[1]:g}]"
    return Certificate(
        prediction=torch.where(holds, targets, ABSTAIN),
        radius=holds.double() * eps,
        alpha=0.0,
        assumption=_ASSUMPTION[rounding] + inputs,
        norm="linf",
        certified=rounding != "nearest",
    )


def _check(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, method: str, batch_size: int
) -> None:
    subject = "verified"
    check_choice(subject, "method", method, METHODS)
    check_float_tensor(subject, "images", images)
    check_finite(subject, "images", images)
    check_labels(subject, "labels", labels, images.shape[0])
    check_at_least(subject, "eps", eps, 0.0)
    check_integer(subject, "batch_size", batch_size, 1)
    check_eval_mode(subject, model)


def _in_memory(
    proven: Callable[[range], Tensor],
    labels: Tensor,
    size: int,
    shard: Shard,
    progress: bool,
) -> Tensor:
    """``(B,)`` bool; each process does every ``world``-th batch, then all share what they found."""
    holds = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mine = blocks_of(len(labels), size)[shard.rank :: shard.world]
    with tqdm(
        total=sum(map(len, mine)),
        desc="bound",
        unit="image",
        disable=not progress or shard.rank > 0,
    ) as bar:
        for block in mine:
            holds[block.start : block.stop] = proven(block)
            bar.update(len(block))
    return shard.any(holds)


def _logged(
    out: Path,
    head: dict[str, Any],
    proven: Callable[[range], Tensor],
    labels: Tensor,
    size: int,
    shard: Shard,
    progress: bool,
) -> Tensor:
    """``(B,)`` bool, by way of the log ``out``."""
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"verified: the folder of {out} must exist.")

    def rows(block: range) -> Iterator[LogRow]:
        for i, holds in zip(block, proven(block).tolist(), strict=True):
            label = int(labels[i])
            yield LogRow(i, label, label if holds else ABSTAIN, head["eps"] * holds, 1)

    work = LoggedWork(out, head, (), len(labels), size, rows)
    run_logged(work, shard, resume=True, progress=progress, description="bound")
    found = [row.predict != ABSTAIN for row in read_log(out, ())]
    return torch.tensor(found, dtype=torch.bool, device=labels.device)


def _description(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the results depend on besides the options; of the code only the modules' own text."""
    weights = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        weights.update(name.encode())
        weights.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return {
        "pyrobust_verification": 1,
        "model_sha256": weights.hexdigest(),
        "images_sha256": hashlib.sha256(_bytes(images)).hexdigest(),
        "labels_sha256": hashlib.sha256(_bytes(labels.long())).hexdigest(),
        "images": len(labels),
    }


def _bytes(tensor: Tensor) -> bytes:
    """Of the elements in order, whatever their type."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
