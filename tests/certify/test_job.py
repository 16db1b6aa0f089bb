"""Long jobs: killed, split and whole runs end with the same bytes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pyrobust
from pyrobust.certify import (
    CertificationJob,
    IntervalJob,
    SmoothingJob,
    certify_to_log,
    verified,
)
from pyrobust.certify.job import certificate_of_log
from pyrobust.certify.job_methods import METHODS, method_of
from pyrobust.certify.log import job_path, read_log
from pyrobust.data import load_digits
from pyrobust.demo import convolutional_network
from pyrobust_cli import certify_options

DATA = load_digits().head(10, 40)
FIXED = SmoothingJob(samples=50, selection=10)
TABLE = SmoothingJob(samples=300, selection=20, radii=(0.0, 0.1, 0.2), block=8)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(3)
    packed = pyrobust.pack(convolutional_network((1, 8, 8), 10), bits=4)
    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    return str(path), packed.eval()


def without_seconds(result):
    return {name: value for name, value in result.items() if name not in ("seconds", "log")}


@pytest.mark.parametrize("method", [IntervalJob(eps=0.001), FIXED, TABLE], ids=lambda m: type(m))
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.93])
def test_a_cut_log_is_completed_to_the_same_bytes(model, tmp_path, method, kept):
    job = CertificationJob(model[0], method=method, limit=20)
    whole, cut = tmp_path / "whole.tsv", tmp_path / "cut.tsv"
    result = certify_to_log(job, DATA, whole)
    text = whole.read_bytes()
    cut.write_bytes(text[: int(kept * len(text))])
    job_path(cut).write_bytes(job_path(whole).read_bytes())
    again = certify_to_log(job, DATA, cut, resume=True)
    assert cut.read_bytes() == text
    assert without_seconds(again) == without_seconds(result)
    assert len(text.splitlines()) == 1 + 20


KILLED = Path(__file__).with_name("killed_job.py")
CASES = ["ibp", "smoothing", "table", "dual", "adaptive", "mixture", "great"]
CASES += ["ranking", "multimodal", "tightness"]


def run_killed(kills, *cases):
    # In a process of its own: it forks, which is safe only before any team of threads exists.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(KILLED), str(kills), *cases]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_process_two_processes_and_killed_ones_write_the_same_bytes():
    run_killed(2, *CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_twelve_kills_at_random_moments_leave_the_same_bytes(case):
    run_killed(12, case)


def test_every_method_is_killed():
    assert {*CASES} - {"table"} == {*METHODS}


def descendants(process):
    """Ids of all processes below ``process``, which torchrun puts into sessions of their own."""
    found, open_ids = [], [process]
    while open_ids:
        for children in Path(f"/proc/{open_ids.pop()}/task").glob("*/children"):
            ids = [int(word) for word in children.read_text().split()]
            found += ids
            open_ids += ids
    return found


def lines_of(log):
    return sum(path.read_bytes().count(b"\n") for path in log.parent.glob(f"{log.name}.part*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("case", ["smoothing", "dual", "ranking"])
def test_torchrun_that_is_killed_makes_the_log_of_one_process(case, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(KILLED.parent))
    import killed_job

    data, job = killed_job.prepared(case, tmp_path)
    options = dict(killed_job.CASES[case].options)
    if case == "ranking":
        options["synonyms"] = str(tmp_path / "synonyms.txt")
    else:
        options["samples"] = 4000  # so that there is time to kill
        job = dataclasses.replace(job, method=dataclasses.replace(job.method, samples=4000))
    one, two = tmp_path / "one.tsv", tmp_path / "two.tsv"
    result = certify_to_log(job, data, one)
    words = ["certify", job.model, "--method", case, "--json", "--out", str(two), "--resume"]
    words += [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words += ["--architecture", job.architecture]
    if case == "ranking":
        words += ["--data", "killed_job:small_texts"]
    else:
        words += ["--limit", str(len(data.labels))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["-m", "pyrobust_cli", *words]
    environment = os.environ | {"PYTHONPATH": str(KILLED.parent), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(torchrun, env=environment, stderr=subprocess.DEVNULL)
    while lines_of(two) < 2 + 5 and running.poll() is None:
        time.sleep(0.001)
    for process in [running.pid, *descendants(running.pid)]:
        os.kill(process, signal.SIGKILL)
    running.wait()
    assert 0 < lines_of(two) < 2 + len(one.read_bytes().splitlines()) - 1  # cut in the middle
    done = subprocess.run(torchrun, env=environment, check=True, capture_output=True, text=True)
    assert two.read_bytes() == one.read_bytes()
    assert json.loads(done.stdout)["images"] == result["images"]


@pytest.mark.parametrize("bound", ["ibp", "crown"])
def test_lines_of_bounds_agree_with_the_batch(model, tmp_path, bound):
    out = tmp_path / "log.tsv"
    job = CertificationJob(model[0], method=IntervalJob(eps=0.0002, bound=bound))
    certify_to_log(job, DATA, out)
    rows = read_log(out, IntervalJob.columns)
    with torch.no_grad():
        classes = model[1](DATA.test_images).argmax(1)
    batch = verified(model[1], DATA.test_images, classes, 0.0002, method=bound)
    assert [row.predict for row in rows] == classes.tolist()
    assert [row.extra == ("1",) for row in rows] == (~batch.abstained).tolist()
    assert not bool(batch.abstained.all())


def test_smoothing_lines_agree_with_the_certificates(model, tmp_path):
    smoothed = pyrobust.nn.SmoothedClassifier(model[1], 0.25, 10).eval()
    x = DATA.test_images[:12]
    fixed = smoothed.certify(x, n0=10, n=50, alpha=1e-3, seed=0)
    table = smoothed.certify_at(x, TABLE.radii, budget=300, n0=20)
    for method, certificate in ((FIXED, fixed), (TABLE, table)):
        out = tmp_path / f"{len(method.radii)}.tsv"
        result = certify_to_log(CertificationJob(model[0], method=method, limit=12), DATA, out)
        read, labels = certificate_of_log(out)
        assert torch.equal(read.prediction, certificate.prediction)
        assert torch.equal(read.radius, certificate.radius)
        assert torch.equal(labels, DATA.test_labels[:12])
        rows = read_log(out, method.columns)
        assert [row.time for row in rows] == certificate.samples.tolist()
        assert result["passes"] == certificate.samples.double().mean()
    counts = [[int(n) for n in row.extra[1].split(",")] for row in rows]
    assert [c[0] for c in counts] == table.successes.tolist()
    assert [sum(c) for c in counts] == table.trials.tolist()


def test_options_of_the_noise_reach_the_certificates(model, tmp_path):
    x = DATA.test_images[:3]
    plain, grid = {"samples": 60, "selection": 10}, (x * 16).round().to(torch.uint8)
    smoothed = pyrobust.nn.SmoothedClassifier
    cases = {
        "l1": (SmoothingJob(**plain, norm="l1", noise="laplace"), x, {}),
        "l0": (SmoothingJob(**plain, norm="l0", sigma=0.5), x, {}),
        "grid": (SmoothingJob(**plain, grid=16), grid, {}),
        "planned": (SmoothingJob(**plain, planned=True), x, {"planned": True}),
        "price": (
            SmoothingJob(**plain, planned=True, price=1e-3),
            x,
            {"planned": True, "price": 1e-3},
        ),
        "randomised": (SmoothingJob(**plain, randomised=True), x, {"randomised": True}),
    }
    for name, (method, images, options) in cases.items():
        out = tmp_path / f"{name}.tsv"
        result = certify_to_log(CertificationJob(model[0], method=method, limit=3), DATA, out)
        direct = smoothed(
            model[1], method.sigma, 10, norm=method.norm, noise=method.noise, grid=method.grid
        ).certify(images, n0=10, n=60, **options)
        read, _ = certificate_of_log(out)
        assert torch.equal(read.prediction, direct.prediction)
        assert torch.equal(read.radius, direct.radius)
        assert read.norm == direct.norm
        assert result["certified"] == int((direct.prediction >= 0).sum())


def test_images_off_the_grid_are_refused(model, tmp_path):
    job = CertificationJob(model[0], method=SmoothingJob(grid=255), limit=3)
    with pytest.raises(ValueError, match="images must be multiples of 1 / grid"):
        certify_to_log(job, DATA, tmp_path / "log")
    with pytest.raises(ValueError, match="planned must be False with radii"):
        SmoothingJob(planned=True, radii=(0.5,))
    with pytest.raises(ValueError, match="randomised must be False with radii"):
        SmoothingJob(randomised=True, radii=(0.5,))
    with pytest.raises(ValueError, match="norm must be one of l2, l1, l0"):
        SmoothingJob(norm="linf")


def test_an_existing_log_needs_resume_and_the_same_job(model, tmp_path):
    out = tmp_path / "log.tsv"
    job = CertificationJob(model[0], limit=2)
    certify_to_log(job, DATA, out)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="use --resume"):
        certify_to_log(job, DATA, out)
    other = CertificationJob(model[0], method=IntervalJob(eps=0.2), limit=2)
    with pytest.raises(ValueError, match="belongs to another job; eps differ"):
        certify_to_log(other, DATA, out, resume=True)
    with pytest.raises(ValueError, match="belongs to another job; images differ"):
        certify_to_log(CertificationJob(model[0], limit=3), DATA, out, resume=True)
    assert out.read_bytes() == before
    job_path(out).unlink()
    with pytest.raises(ValueError, match="stands without"):
        certify_to_log(job, DATA, out, resume=True)
    assert out.read_bytes() == before


def test_a_line_that_the_model_does_not_confirm_is_reported(model, tmp_path):
    out = tmp_path / "log.tsv"
    job = CertificationJob(model[0], method=TABLE, limit=8)
    certify_to_log(job, DATA, out)
    lines = out.read_text().splitlines(keepends=True)[:4]
    fields = lines[1].split("\t")
    lines[1] = "\t".join([*fields[:5], str(int(fields[5]) + 1), *fields[6:]])
    out.write_text("".join(lines))
    with pytest.raises(RuntimeError, match="image 0 gives another result than its line"):
        certify_to_log(job, DATA, out, resume=True)


def test_a_repeated_image_is_damage(model, tmp_path):
    out = tmp_path / "log.tsv"
    job = CertificationJob(model[0], limit=3)
    certify_to_log(job, DATA, out)
    row = read_log(out, job.method.columns)[0]
    out.write_bytes(out.read_bytes() + dataclasses.replace(row, label=row.label + 1).line())
    with pytest.raises(ValueError, match="is damaged; image 0 is out of place"):
        certify_to_log(job, DATA, out, resume=True)


def test_missing_models_folders_and_architectures_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="model must be an existing file; got 'nowhere'"):
        certify_to_log(CertificationJob("nowhere"), DATA, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"the folder of .* must exist"):
        certify_to_log(CertificationJob(model[0]), DATA, tmp_path / "no" / "a")
    for name in ("nowhere:net", "pyrobust.demo:nothing", "pyrobust.demo", ":"):
        with pytest.raises(ValueError, match="architecture must be module:function"):
            certify_to_log(CertificationJob(model[0], architecture=name), DATA, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smoothing", {"sigma": 0.0}),
        ("smoothing", {"alpha": 1.0}),
        ("smoothing", {"samples": 0}),
        ("smoothing", {"block": 0}),
        ("ibp", {"eps": -1.0}),
    ],
)
def test_bad_parameters_are_refused(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=f"certify: {option} must"):
        method_of(name, options)


def test_unknown_methods_and_options_of_others_are_refused():
    with pytest.raises(ValueError, match="method must be one of ibp, smoothing"):
        method_of("magic", {})
    with pytest.raises(ValueError, match=r"sigma must be an option of method ibp \(eps, bound\)"):
        method_of("ibp", {"sigma": 1.0})
    with pytest.raises(ValueError, match="limit must be at least 1"):
        CertificationJob("m", limit=0)


def test_the_command_line_offers_every_method_and_option():
    assert {
        name: {field.name for field in dataclasses.fields(kind)} for name, kind in METHODS.items()
    } == {name: set(options) for name, options in certify_options.METHODS.items()}
