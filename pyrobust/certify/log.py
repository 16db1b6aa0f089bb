"""The log of a certification: append-only, tab-separated, the same bytes after any interruption.

The columns are those of published certification logs, ``idx label predict radius correct time``,
followed by the method's own (exact counts). ``time`` holds forward passes, not seconds: it is the
cost on any machine, and a clock would make two runs of one job differ. The job stands beside the
log in ``LOG.job.json``. A line is written at once; a half-written last line is cut off on opening.

Source of the columns: J. Cohen, E. Rosenfeld, Z. Kolter, "Certified adversarial robustness via
randomized smoothing", ICML 2019, arXiv 1902.02918, published code.
Departures: passes for seconds; radii in full precision instead of three digits.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrobust._files import write_text

__all__ = ["COLUMNS", "LogRow", "LogWriter", "check_job", "job_path", "read_log"]

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


@dataclass(frozen=True)
class LogRow:
    """One image of a log.

    Attributes:
        idx: position of the image in the data set.
        label: its true class.
        predict: the certified class, -1 for an abstention.
        radius: ``>= 0``, in the units of the images and the norm of the job.
        time: forward passes spent.
        extra: the method's own columns, as text without tabs.
    """

    idx: int
    label: int
    predict: int
    radius: float
    time: int
    extra: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.predict == self.label

    def line(self) -> bytes:
        """The row as a line of the log; the radius is written so that it reads back exactly."""
        first = (self.idx, self.label, self.predict, repr(float(self.radius)), int(self.correct))
        return "\t".join(map(str, (*first, self.time, *self.extra))).encode() + b"\n"


def job_path(log: Path) -> Path:
    """Where the description of the job that a log belongs to stands."""
    return log.with_name(f"{log.name}.job.json")


def check_job(log: Path, job: dict[str, Any]) -> None:
    """Raise unless the description beside ``log`` is ``job``; write it where there is none yet.

    Raises:
        ValueError: the log belongs to another job, or stands without a description.
    """
    place = job_path(log)
    if not place.exists():
        if log.exists():
            raise ValueError(f"certify: {log} stands without {place.name}; it is left as it is.")
        write_text(place, json.dumps(job, indent=1) + "\n")
        return
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"certify: {place} does not describe a job ({error}).") from error
    wanted = json.loads(json.dumps(job))  # tuples become lists
    if found != wanted:
        found = found if isinstance(found, dict) else {}
        differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        raise ValueError(
            f"certify: {log} belongs to another job; {', '.join(differing) or 'its head'} differ."
        )


def read_log(path: Path, columns: tuple[str, ...]) -> list[LogRow]:
    """The whole lines of a log, in the order of the file; a missing file has none.

    Raises:
        ValueError: the head is not that of ``columns``, or a line is damaged.
    """
    raw = path.read_bytes() if path.exists() else b""
    lines = raw[: raw.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines()
    if not lines:
        return []
    head = "\t".join((*COLUMNS, *columns))
    if lines[0] != head:
        raise ValueError(
            f"certify: {path} is not a log of this job; its first line is not {head!r}."
        )
    return [_parse(path, number, line, len(columns)) for number, line in enumerate(lines[1:], 2)]


def _parse(path: Path, number: int, line: str, extras: int) -> LogRow:
    fields = line.split("\t")
    try:
        idx, label, predict, correct, time = (int(fields[i]) for i in (0, 1, 2, 4, 5))
        row = LogRow(idx, label, predict, float(fields[3]), time, tuple(fields[6:]))
        if (
            row.line() != (line + "\n").encode()
            or len(row.extra) != extras
            or correct not in (0, 1)
        ):
            raise ValueError("it does not read back")
        if math.isnan(row.radius):
            raise ValueError("its radius is not a number")
    except (ValueError, IndexError) as error:
        raise ValueError(f"certify: line {number} of {path} is damaged ({error}).") from error
    return row


class LogWriter:
    """Appends rows; what a failed write left behind is taken back.

    Args:
        path: the log; it is made with its head where it does not exist, and a half-written last
            line is cut off.
        columns: the method's own columns.

    Raises:
        OSError: the file cannot be written; the message names it.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        raw = path.read_bytes()
        self._size = raw.rfind(b"\n") + 1
        os.ftruncate(self._file, self._size)
        if self._size == 0:
            self._append(("\t".join((*COLUMNS, *columns)) + "\n").encode())

    def append(self, row: LogRow) -> None:
        """Hand one line to the operating system."""
        self._append(row.line())

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                error.errno,
                f"certify: cannot write the log ({error.strerror}); what is in it is whole, so "
                "make room and go on with --resume",
                str(self.path),
            ) from error
        self._size += len(line)
