"""Certification of a data set into a log that survives being killed, by one process or several.

Bounds and noise depend on an image's position only, and images meet the network in blocks that
depend on the job only. So an interrupted run, a run split over processes and a run in one piece end
with the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_integer
from pyrobust.certify.certificates import ABSTAIN, Certificate
from pyrobust.certify.job_data import ImageData, JobData
from pyrobust.certify.job_methods import METHODS, IntervalJob, JobMethod
from pyrobust.certify.log import LogRow, job_path, read_log
from pyrobust.certify.logged_run import LoggedWork, run_logged
from pyrobust.certify.ranking_job import RankingJob
from pyrobust.certify.shards import this_shard
from pyrobust.data.image_set import ImageSet

__all__ = ["CertificationJob", "certificate_of_log", "certify_to_log"]

_VERSION = 2
_FOR_IMAGES = "pyrobust.demo:convolutional_network"


@dataclass(frozen=True)
class CertificationJob:
    """What to certify and how; all but paths and device stands beside the log.

    Attributes:
        model: path of a file of :func:`pyrobust.save`; for a ranking also ``module:function``, a
            function that makes the scorer from the text collection.
        architecture: ``module:function``; the function makes the float network from the image
            shape ``(C, H, W)`` and the number of classes, from the shapes of all modalities and
            the number of classes, or from the text collection.
        method: one of :mod:`pyrobust.certify.job_methods`.
        limit: number of images, samples or queries, ``>= 1``; None for all.
        device: where the network runs, as torch names devices.
    """

    model: str
    architecture: str = _FOR_IMAGES
    method: JobMethod = field(default_factory=IntervalJob)
    limit: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_integer("certify", "limit", self.limit, 1)

    def head(self, data: JobData) -> dict[str, Any]:
        """The description of the job, with checksums in place of paths."""
        names = {kind: name for name, kind in METHODS.items()}
        options: dict[str, Any] = asdict(self.method)  # type: ignore[call-overload]
        for name in getattr(self.method, "files", ()):
            options[f"{name}_sha256"] = _file_digest(options.pop(name))
        model = (
            {"scorer": self.model} if self.scorer else {"model_sha256": _file_digest(self.model)}
        )
        return {
            "pyrobust_certification": _VERSION,
            **model,
            "data": data.name,
            "data_sha256": data.digest(),
            "architecture": None if self.scorer else self.architecture,
            "images": self.images(data),
            "method": names[type(self.method)],
            **options,
        }

    @property
    def scorer(self) -> bool:
        """Whether ``model`` names a function in place of a file."""
        named = ":" in self.model and not Path(self.model).is_file()
        return named and isinstance(self.method, RankingJob)

    def images(self, data: JobData) -> int:
        """How many images the finished log holds; queries that calibrate are left out."""
        count = len(data.labels) - getattr(self.method, "held_out", 0)
        return min(count, self.limit or count)


def certify_to_log(
    job: CertificationJob,
    data: ImageSet | JobData,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Certify the test images of ``data`` in order, writing a line for each.

    Under ``torchrun`` the processes share the images; the finished log is that of one process.

    Args:
        job: model, method and parameters.
        data: the images, or what :func:`~pyrobust.certify.job_data.load_job_data` gives.
        out: the log (:mod:`pyrobust.certify.log`).
        resume: go on with a log of the same job; without it an existing file is an error.
        progress: show a progress bar with rate and remaining time.

    Returns:
        ``images``, ``correct``, ``certified``, ``certified_accuracy`` (certified and correct),
        ``mean_radius`` (0 for wrong ones), ``passes`` per image, ``seconds`` of this run and
        ``log``, where the method logs tightness ``mean_tightness``; empty in a process that is not
        the first of several.

    Raises:
        FileNotFoundError: the model does not exist.
        FileExistsError: the log exists and ``resume`` is False.
        ValueError: the log belongs to another job or is damaged, or the model or architecture does
            not fit.
        RuntimeError: an image gives another result than a line already in the log.
        OSError: the log cannot be written, as on a full disk.
    """
    out, began = Path(out), time.monotonic()
    if not Path(job.model).is_file() and not job.scorer:
        raise FileNotFoundError(f"certify: model must be an existing file; got {job.model!r}.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"certify: the folder of {out} must exist.")
    items = ImageData(data) if isinstance(data, ImageSet) else data
    if job.images(items) < 1:
        raise ValueError(
            f"certify: data must hold more than the {getattr(job.method, 'held_out', 0)} held out; "
            f"got {len(items.labels)}."
        )
    model = _load_model(job, items)
    shard = this_shard()

    def rows(block: range) -> Iterator[LogRow]:
        part = slice(block.start, block.stop)
        images, labels = items.block(part, job.device), items.labels[part]
        return job.method.rows(model, images, labels, block.start, items.num_classes)

    work = LoggedWork(
        out, job.head(items), job.method.columns, job.images(items), job.method.block, rows
    )
    run_logged(work, shard, resume=resume, progress=progress)
    if shard.rank > 0:
        return {}
    found = read_log(out, job.method.columns)
    return _summary(job.method, found, out, time.monotonic() - began)


def certificate_of_log(path: str | Path) -> tuple[Certificate, Tensor]:
    """The certificate that a finished log holds, and the labels, as for a plot.

    Args:
        path: a log with its description beside it.

    Returns:
        Certificate of all rows, ``(N,)`` int64 labels. Where the method says that a class is not
        certain and gives it no radius, the certificate abstains.

    Raises:
        ValueError: the log is damaged or has no description.
    """
    import json

    path = Path(path)
    if not job_path(path).is_file():
        raise ValueError(f"certify: {path} stands without {job_path(path).name}.")
    head = json.loads(job_path(path).read_text(encoding="utf-8"))
    kind = METHODS[head["method"]]
    rows = read_log(path, kind.columns)
    certificate = Certificate(
        prediction=torch.tensor([_certain_class(kind, row) for row in rows], dtype=torch.int64),
        radius=torch.tensor([row.radius for row in rows], dtype=torch.float64),
        alpha=float(head.get("alpha", 0.0)),
        assumption=f"log of {path.name}",
        norm=head.get("norm", kind.norm),
    )
    return certificate, torch.tensor([row.label for row in rows], dtype=torch.int64)


def _certain_class(kind: type[Any], row: LogRow) -> int:
    """The class of a row that is certain at radius 0; a ranking's is where it is given at all."""
    if "certified" not in kind.columns or kind is RankingJob or row.radius > 0:
        return row.predict
    certain = row.extra[kind.columns.index("certified")] == "1"
    return row.predict if certain else ABSTAIN


def _file_digest(path: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _load_model(job: CertificationJob, data: JobData) -> Any:
    """The saved model, built from the float network of the architecture, made ready by the method.

    A method may have ``prepare(model, data)``, for what is computed once per job.
    """
    from pyrobust.io import load

    if job.scorer:
        model: Any = _function("model", job.model)(*data.made_from())
    elif job.architecture == _FOR_IMAGES and not isinstance(data, ImageData):
        raise ValueError(
            f"certify: architecture must make a network for this method; got {_FOR_IMAGES}, which "
            "is for images."
        )
    else:
        network: nn.Module = _function("architecture", job.architecture)(*data.made_from())
        model = load(job.model, network).to(job.device).eval()
    prepare = getattr(job.method, "prepare", None)
    return model if prepare is None else prepare(model, data)


def _function(argument: str, source: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module_name, _, function_name = source.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"certify: {argument} must be module:function; got {source!r} ({error})."
        ) from error
    return found


def _summary(method: JobMethod, rows: list[LogRow], out: Path, seconds: float) -> dict[str, Any]:
    count = len(rows)
    if "certified" in method.columns:
        place = method.columns.index("certified")
        certified = [row.extra[place] == "1" for row in rows]
    else:
        certified = [row.predict >= 0 for row in rows]
    right = [row.correct and sure for row, sure in zip(rows, certified, strict=True)]
    mean: dict[str, float] = {}
    if "tightness" in method.columns:
        place = method.columns.index("tightness")
        mean["mean_tightness"] = sum(float(row.extra[place]) for row in rows) / count
    return {
        "images": count,
        "correct": sum(row.correct for row in rows),
        "certified": sum(certified),
        "certified_accuracy": sum(right) / count,
        "mean_radius": sum(row.radius for row in rows if row.correct) / count,
        **mean,
        "passes": sum(row.time for row in rows) / count,
        "seconds": round(seconds, 3),
        "log": str(out),
    }
