"""The log's format: reads back exactly, never loses a whole line, refuses what it did not write."""

import errno
import multiprocessing
import os
import resource
import signal

import pytest

from pyrobust.certify.log import LogRow, LogWriter, check_job, job_path, read_log

ROWS = [
    LogRow(0, 7, 7, 0.1 + 0.2, 1100, ("3,97", "1000,0")),
    LogRow(1, 2, -1, 0.0, 1100, ("50,50", "500,500")),
    LogRow(2, 1, 3, 1e-300, 20, ("0,10", "9,1")),
]
COLUMNS = ("selection", "counts")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.tsv"
    with LogWriter(path, COLUMNS) as writer:
        for row in ROWS:
            writer.append(row)
    return path


def test_rows_read_back_exactly_under_the_common_head(log):
    first = log.read_text().splitlines()[0].split("\t")
    assert first[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert read_log(log, COLUMNS) == ROWS
    assert [row.correct for row in ROWS] == [True, False, False]


def test_a_published_script_reads_it(log):
    # What analysis scripts do: columns by name, correct and radius as numbers.
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    accuracy = sum(int(r["correct"]) and float(r["radius"]) >= 0.25 for r in table) / len(table)
    assert accuracy == pytest.approx(1 / 3)


def test_any_cut_loses_the_last_line_only(log, tmp_path):
    whole = log.read_bytes()
    for length in range(len(whole)):
        cut = tmp_path / "cut.tsv"
        cut.write_bytes(whole[:length])
        kept = read_log(cut, COLUMNS)
        assert kept == ROWS[: len(kept)]
        with LogWriter(cut, COLUMNS) as writer:
            for row in ROWS[len(kept) :]:
                writer.append(row)
        assert cut.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    ["idx\tlabel\n", "not a log\n"],
)
def test_a_foreign_head_is_refused(tmp_path, text):
    path = tmp_path / "log.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a log of this job"):
        read_log(path, COLUMNS)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0\t7\t7", "0\t7"),
        ("\t1100", "\tfew"),
        ("0.30000000000000004", "nan"),
        ("\t1\t1", "\t3\t1"),
    ],
)
def test_a_damaged_line_is_named(log, old, new):
    log.write_text(log.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        read_log(log, COLUMNS)


def test_a_job_is_written_once_and_another_is_refused(tmp_path):
    path = tmp_path / "log.tsv"
    check_job(path, {"sigma": 0.25, "radii": (0.5,)})
    check_job(path, {"sigma": 0.25, "radii": (0.5,)})
    before = job_path(path).read_bytes()
    with pytest.raises(ValueError, match="belongs to another job; sigma differ"):
        check_job(path, {"sigma": 0.5, "radii": (0.5,)})
    assert job_path(path).read_bytes() == before
    job_path(path).write_text("{")
    with pytest.raises(ValueError, match="does not describe a job"):
        check_job(path, {})
    job_path(path).unlink()
    path.write_text("something else")
    with pytest.raises(ValueError, match="stands without"):
        check_job(path, {})
    assert path.read_text() == "something else"


def test_a_full_disk_leaves_whole_lines(log, monkeypatch):
    whole = log.read_bytes()
    real, calls = os.write, []

    def full(descriptor, data):
        calls.append(len(data))
        if len(calls) == 2:  # a part of the line still found room
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:5])

    with LogWriter(log, COLUMNS) as writer:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="make room and go on with --resume") as error:
            writer.append(LogRow(3, 0, 0, 1.0, 1, ("1", "1")))
        monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert str(log) in str(error.value)
    assert log.read_bytes() == whole


def append_beyond_the_limit(path, seen):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = path.stat().st_size + 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with LogWriter(path, COLUMNS) as log:
        try:
            log.append(LogRow(3, 0, 0, 1.0, 1, ("1,2,3,4,5", "1,2,3,4,5")))
        except OSError as error:
            seen.send(str(error))


def test_a_real_limit_of_the_system_is_met_the_same_way(log):
    whole = log.read_bytes()
    here, there = FORK.Pipe()
    process = FORK.Process(target=append_beyond_the_limit, args=(log, there))
    process.start()
    process.join(60)
    assert "certify: cannot write the log (File too large)" in here.recv()
    assert log.read_bytes() == whole
