"""Certification into an append-only log that survives being killed.

The first line describes the job; then comes one line per image, in order, flushed as it is made.
A run that was killed goes on after the last whole line, and since bounds and noise depend on the
image's position only, the finished log is the same as that of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_integer,
    check_open_unit,
    check_positive,
)
from pyrobust.data.image_set import ImageSet

__all__ = ["CertificationJob", "certify_to_log"]

_VERSION = 1


@dataclass(frozen=True)
class CertificationJob:
    """What to certify and how; all of it stands in the log's first line.

    Attributes:
        model: path of a file of :func:`pyrobust.save`.
        architecture: ``module:function``; the function makes the float network from the image
            shape ``(C, H, W)`` and the number of classes.
        method: ``"ibp"`` (l-infinity, deterministic) or ``"smoothing"`` (l2, statistical).
        eps: l-infinity radius of ``ibp``, ``>= 0``.
        sigma: standard deviation of the noise, ``> 0``.
        samples: noisy copies that bound the probability of the class, ``>= 1``.
        selection: noisy copies that choose it, ``>= 1``.
        alpha: probability of error per image, in (0, 1).
        seed: of the noise, ``>= 0``.
        limit: number of images, ``>= 1``; None for all.
    """

    model: str
    architecture: str = "pyrobust.demo:convolutional_network"
    method: str = "ibp"
    eps: float = 0.1
    sigma: float = 0.25
    samples: int = 1000
    selection: int = 100
    alpha: float = 1e-3
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        check_choice("certify", "method", self.method, ("ibp", "smoothing"))
        check_at_least("certify", "eps", self.eps, 0.0)
        check_positive("certify", "sigma", self.sigma)
        for name in ("samples", "selection"):
            check_integer("certify", name, getattr(self, name), 1)
        check_open_unit("certify", "alpha", self.alpha)
        check_integer("certify", "seed", self.seed, 0)
        if self.limit is not None:
            check_integer("certify", "limit", self.limit, 1)

    def header(self, data: ImageSet) -> dict[str, Any]:
        """The first line of the log: the job, with checksums in place of paths."""
        used = {
            "ibp": ("eps",),
            "smoothing": ("sigma", "samples", "selection", "alpha", "seed"),
        }[self.method]
        fields = asdict(self)
        return {
            "pyrobust_certification": _VERSION,
            "model_sha256": hashlib.sha256(Path(self.model).read_bytes()).hexdigest(),
            "data": data.name,
            "data_sha256": _digest(data.test_images, data.test_labels),
            "architecture": self.architecture,
            "method": self.method,
            **{name: fields[name] for name in used},
        }


def certify_to_log(
    job: CertificationJob,
    data: ImageSet,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Certify the test images of ``data`` one by one, writing a line for each.

    Args:
        job: model, method and parameters.
        data: the images.
        out: the log.
        resume: go on with a log of the same job; without it an existing file is an error.
        progress: show a progress bar.

    Returns:
        ``images``, ``correct``, ``certified``, ``certified_accuracy`` (certified and correct) and
        ``log``.

    Raises:
        FileNotFoundError: the model does not exist.
        FileExistsError: the log exists and ``resume`` is False.
        ValueError: the log belongs to another job, or the model or architecture does not fit.
    """
    out = Path(out)
    if not Path(job.model).is_file():
        raise FileNotFoundError(f"certify: model must be an existing file; got {job.model!r}.")
    if out.exists() and not resume:
        raise FileExistsError(f"certify: {out} exists; use --resume to go on with it.")
    header = job.header(data)
    rows = _read_log(out, header) if out.exists() else []
    total = min(len(data.test_images), job.limit or len(data.test_images))
    certify_image = _certifier(job, _load_model(job, data), data.num_classes)
    with out.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            _write_line(file, header)
        images = range(len(rows), total)
        for index in tqdm(images, initial=len(rows), total=total, disable=not progress):
            label = int(data.test_labels[index])
            row = {"index": index, "label": label} | certify_image(data.test_images, index)
            _write_line(file, row)
            rows.append(row)
    return _summary(rows[:total], out)


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of the bytes of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_line(file: TextIO, row: dict[str, Any]) -> None:
    """One line, handed to the operating system at once."""
    file.write(json.dumps(row) + "\n")
    file.flush()


def _read_log(out: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same job; a half-written last line is cut off."""
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ValueError(f"certify: {out} is not a certification log ({error}).") from error
    if lines and lines[0] != header:
        found = lines[0] if isinstance(lines[0], dict) else {}
        differing = [k for k in header if found.get(k) != header[k]]
        raise ValueError(
            f"certify: {out} belongs to another job; {', '.join(differing) or 'its head'} differ."
        )
    rows = lines[1:]
    if [row.get("index") if isinstance(row, dict) else None for row in rows] != [*range(len(rows))]:
        raise ValueError(f"certify: {out} is damaged; its images are not in order.")
    if len(whole) < len(raw):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return rows


def _load_model(job: CertificationJob, data: ImageSet) -> nn.Module:
    """The saved model, built from the float network of the architecture."""
    from pyrobust.io import load

    module_name, _, function_name = job.architecture.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"certify: architecture must be module:function; got {job.architecture!r} ({error})."
        ) from error
    network = make(tuple(data.test_images.shape[1:]), data.num_classes)
    return load(job.model, network).eval()


def _certifier(
    job: CertificationJob, model: nn.Module, num_classes: int
) -> Callable[[Tensor, int], dict[str, Any]]:
    """The function that certifies image ``index`` of a batch."""
    if job.method == "ibp":
        return lambda images, index: _bounded(model, images[index : index + 1], job.eps)
    from pyrobust.nn import SmoothedClassifier

    smoothed = SmoothedClassifier(model, job.sigma, num_classes).eval()

    def certify_image(images: Tensor, index: int) -> dict[str, Any]:
        certificate = smoothed.certify(
            images[index : index + 1],
            n0=job.selection,
            n=job.samples,
            alpha=job.alpha,
            seed=job.seed,
            first_index=index,
        )
        prediction, radius = int(certificate.prediction), float(certificate.radius)
        return {"prediction": prediction, "certified": radius > 0, "radius": radius}

    return certify_image


def _bounded(model: nn.Module, x: Tensor, eps: float) -> dict[str, Any]:
    """Class of ``x``, and whether intervals show that no valid image within ``eps`` changes it."""
    from pyrobust.interval import Interval

    with torch.no_grad():
        prediction = int(model(x).argmax())
        box = model(Interval.ball(x, eps, clamp=(0.0, 1.0)))
    others = box.upper[0].index_fill(0, torch.tensor([prediction]), -torch.inf)
    certified = bool(box.lower[0, prediction] > others.max())
    return {"prediction": prediction, "certified": certified, "radius": eps if certified else 0.0}


def _summary(rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    correct = sum(row["prediction"] == row["label"] for row in rows)
    certified = sum(row["certified"] for row in rows)
    both = sum(row["certified"] and row["prediction"] == row["label"] for row in rows)
    return {
        "images": len(rows),
        "correct": correct,
        "certified": certified,
        "certified_accuracy": both / len(rows),
        "log": str(out),
    }
