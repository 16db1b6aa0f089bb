"""Work in blocks whose rows go into a log: by one process or several, killed and resumed.

Blocks depend on the work only, never on the number of processes. So where the rows of a block
depend on nothing outside it, an interrupted run, a run split over processes and a run in one piece
end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pyrobust._files import write_text
from pyrobust.certify.log import COLUMNS, LogRow, LogWriter, check_job, job_path, read_log
from pyrobust.certify.shards import Shard, part_paths

__all__ = ["LoggedWork", "blocks_of", "run_logged"]


@dataclass(frozen=True)
class LoggedWork:
    """What to do and where its rows go.

    Attributes:
        out: the log.
        head: what stands beside the log and must agree when it is resumed.
        columns: names of the columns that follow the common ones.
        total: number of items.
        block: items done together, ``>= 1``.
        rows: the rows of a block of positions, in order.
    """

    out: Path
    head: dict[str, Any]
    columns: tuple[str, ...]
    total: int
    block: int
    rows: Callable[[range], Iterable[LogRow]]


def blocks_of(total: int, size: int) -> list[range]:
    """The positions 0 to ``total - 1`` in runs of ``size``, the last one shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def run_logged(
    work: LoggedWork, shard: Shard, *, resume: bool, progress: bool, description: str = "certify"
) -> None:
    """Do what is missing of this process's share; when all are done the log is whole.

    Args:
        work: what to do.
        shard: this process among those that share the work.
        resume: go on with a log of the same work; without it an existing file is an error.
        progress: show a progress bar with rate and remaining time.
        description: words beside the bar.

    Raises:
        FileExistsError: the log exists and ``resume`` is False.
        ValueError: the log belongs to other work or is damaged.
        RuntimeError: an item gives another row than one already in the log.
        OSError: the log cannot be written.
    """
    out = work.out
    done = _begin(work, shard, resume)
    parts = shard.world > 1 or bool(part_paths(out))
    place = out.with_name(f"{out.name}.part{shard.rank}") if parts else out
    with LogWriter(place, work.columns) as log:
        shard.meet()  # all have read what there was before anyone adds to it
        _do_blocks(work, log, done, shard, progress, description)
    shard.meet()
    if shard.rank == 0 and parts:
        _join(work)
    shard.meet()


def _begin(work: LoggedWork, shard: Shard, resume: bool) -> dict[int, LogRow]:
    """Check or write the description; the rows that exist already."""
    out = work.out
    if (out.exists() or job_path(out).exists() or part_paths(out)) and not resume:
        raise FileExistsError(f"certify: {out} exists; use --resume to go on with it.")
    shard.meet()
    if shard.rank == 0:
        check_job(out, work.head)
    shard.meet()
    check_job(out, work.head)
    done: dict[int, LogRow] = {}
    for path in (out, *part_paths(out)):
        for row in read_log(path, work.columns):
            if done.setdefault(row.idx, row) != row or not 0 <= row.idx < work.total:
                raise ValueError(f"certify: {path} is damaged; image {row.idx} is out of place.")
    return done


def _do_blocks(
    work: LoggedWork,
    log: LogWriter,
    done: dict[int, LogRow],
    shard: Shard,
    progress: bool,
    description: str,
) -> None:
    """Do the blocks of this process that have rows missing."""
    missing = [b for b in blocks_of(work.total, work.block) if not all(i in done for i in b)]
    mine = missing[shard.rank :: shard.world]
    with tqdm(
        total=work.total,
        initial=work.total - sum(i not in done for block in mine for i in block),
        desc=description,
        unit="image",
        disable=not progress or shard.rank > 0,
    ) as bar:
        for block in mine:
            for row in work.rows(block):
                if row.idx not in done:
                    log.append(row)
                    bar.update()
                elif done[row.idx] != row:
                    raise RuntimeError(
                        f"certify: image {row.idx} gives another result than its line in the log; "
                        "the model rounds differently here (another machine, number of threads or "
                        "version), so start a new log."
                    )


def _join(work: LoggedWork) -> None:
    """Write the rows of all parts to the log, in order, and remove the parts."""
    parts = part_paths(work.out)
    found = {row.idx: row for path in (work.out, *parts) for row in read_log(path, work.columns)}
    head = "\t".join((*COLUMNS, *work.columns)) + "\n"
    write_text(work.out, head + "".join(found[i].line().decode() for i in sorted(found)))
    for path in parts:
        path.unlink()
