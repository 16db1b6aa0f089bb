"""One process, two processes and runs killed many times write the same log, byte for byte.

    python killed_job.py KILLS METHOD...

The parts are forks of this process, which has imported torch and started no thread. The networks
are named ``killed_job:...``, since a job builds them anew in every process.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

import pyrobust
from pyrobust.certify import CertificationJob, certify_to_log
from pyrobust.certify.job_data import ImageData, ModalityData, load_job_data
from pyrobust.certify.job_methods import method_of
from pyrobust.certify.log import LogWriter
from pyrobust.data import load_digits
from pyrobust.demo import convolutional_network
from pyrobust.nn import LateFusion, OrthogonalFusion

# tqdm's own lock is shared by forks: one killed while it holds the lock would stop all that follow.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread of its own
PATIENCE = timedelta(seconds=120)
FORK = multiprocessing.get_context("fork")
SAMPLED = {"samples": 100, "selection": 10}


def small_network(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))


def deep_network(shape, classes):
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, classes))


def two_halves(shape, classes):
    return nn.ModuleDict({name: small_network(shape, classes) for name in ("left", "right")})


def standard_and_base(shape, classes):
    return nn.ModuleDict({name: small_network(shape, classes) for name in ("standard", "base")})


def standard_and_robust(shape, classes):
    return nn.ModuleDict({name: deep_network(shape, classes) for name in ("standard", "robust")})


def late_fusion(shapes, classes):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    encoders = [nn.Sequential(nn.Flatten(), nn.Linear(d, 16), nn.ReLU()) for d in sizes]
    return LateFusion(encoders, OrthogonalFusion([16] * len(shapes), classes))


def shared_words(texts):
    """A scorer without a network: the share of the query's words that a document holds."""

    def score(query, documents):
        wanted = set(query.split())
        return torch.tensor([len(wanted & set(d)) / len(wanted) for d in documents])

    return score


def small_texts():
    topics = [f"wing{i} lift{i} drag{i}" for i in range(30)]
    documents = [f"a big note on {t} and large flows" for t in topics]
    return topics, documents, [[i] for i in range(30)]


class Case(NamedTuple):
    """A job in its smallest form."""

    method: str
    options: dict[str, Any]
    network: Any = small_network
    architecture: str = "killed_job:small_network"


CASES = {
    "ibp": Case("ibp", {"eps": 0.001}, deep_network, "killed_job:deep_network"),
    "smoothing": Case(
        "smoothing", SAMPLED, convolutional_network, "pyrobust.demo:convolutional_network"
    ),
    "table": Case(
        "smoothing",
        {"samples": 300, "selection": 20, "radii": (0.0, 0.1, 0.2), "block": 8},
        convolutional_network,
        "pyrobust.demo:convolutional_network",
    ),
    "dual": Case("dual", {"sigma": 0.2, **SAMPLED}, two_halves, "killed_job:two_halves"),
    "adaptive": Case(
        "adaptive",
        {"sigma": 0.2, "weight": 0.9, **SAMPLED},
        standard_and_base,
        "killed_job:standard_and_base",
    ),
    "mixture": Case(
        "mixture",
        {"eps": 0.001, "weight": 0.8, "robust_scale": 30.0},
        standard_and_robust,
        "killed_job:standard_and_robust",
    ),
    "great": Case("great", {"sigma": 0.05, "samples": 200}),
    "ranking": Case("ranking", {"top": 1, "held_out": 2, "samples": 200}, None),
    "multimodal": Case("multimodal", {}, late_fusion, "killed_job:late_fusion"),
    "tightness": Case("tightness", {"eps": 0.01}, deep_network, "killed_job:deep_network"),
}


def data_of(method):
    if method == "ranking":
        return load_job_data("ranking", "killed_job:small_texts")
    images = load_digits().head(10, 40)
    return ModalityData.of_halves(images) if method == "multimodal" else ImageData(images)


def prepared(name, folder):
    """The data and the job of a case; its model and other files are written to ``folder``."""
    case = CASES[name]
    data, options = data_of(case.method), dict(case.options)
    if case.method == "ranking":
        (folder / "synonyms.txt").write_text("big large\nnote words\n")
        options["synonyms"] = str(folder / "synonyms.txt")
        model = "killed_job:shared_words"
    else:
        torch.manual_seed(3)
        network = case.network(*data.made_from())
        model = str(folder / "model.safetensors")
        pyrobust.save(pyrobust.pack(network, bits=4, group_size=2).eval(), model)
    method = method_of(case.method, options)
    return data, CertificationJob(model, architecture=case.architecture, method=method)


def run_shard(job, data, out, rank, world, meeting):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if world > 1:  # they meet at a file: a free port may be taken before it is used
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE
        )
    append = LogWriter.append

    def append_slowly(log, row):  # these networks are so small that no kill would come in time
        append(log, row)
        time.sleep(0.004)

    LogWriter.append = append_slowly
    certify_to_log(job, data, out, resume=True)


def start(job, data, out, world):
    meeting = out.with_name(f"meeting-{uuid.uuid4().hex}")
    shards = [
        FORK.Process(target=run_shard, args=(job, data, out, rank, world, meeting))
        for rank in range(world)
    ]
    for shard in shards:
        shard.start()
    return shards


def finish(shards):
    for shard in shards:
        shard.join(300)
        assert shard.exitcode == 0, shard.exitcode


def rows_in(out):
    """Whole lines of the log and its parts, without their heads."""
    found = 0
    for path in (out, *(Path(f"{out}.part{rank}") for rank in (0, 1))):
        with contextlib.suppress(FileNotFoundError):
            found += max(0, path.read_bytes().count(b"\n") - 1)
    return found


def kill_until_done(job, data, out, kills, generator):
    """Start, wait a random moment, kill; by turns one process and two, so that parts are taken
    over by another number of processes. A moment is drawn as a number of new lines.
    """
    total, stopped = job.images(data), 0
    for attempt in range(kills):
        goal = min(rows_in(out) + generator.randint(0, total // kills), total - 1)
        shards = start(job, data, out, 1 + attempt % 2)
        latest = time.monotonic() + PATIENCE.seconds
        while rows_in(out) < goal and any(shard.is_alive() for shard in shards):
            assert time.monotonic() < latest, f"{rows_in(out)} of {goal} rows in attempt {attempt}"
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.006))
        for shard in shards:
            shard.kill()
            shard.join()
            stopped += shard.exitcode == -signal.SIGKILL
    finish(start(job, data, out, 1))
    assert stopped >= kills // 2, stopped


def check(name, kills, folder):
    data, job = prepared(name, folder)
    one, two, killed = (folder / f"{kind}.tsv" for kind in ("one", "two", "killed"))
    finish(start(job, data, one, 1))
    finish(start(job, data, two, 2))
    kill_until_done(job, data, killed, kills, random.Random(0))
    assert len(one.read_bytes().splitlines()) == job.images(data) + 1
    assert two.read_bytes() == one.read_bytes()
    assert killed.read_bytes() == one.read_bytes()
    assert not list(folder.glob("*.part*"))


if __name__ == "__main__":
    for case in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as temporary:
            check(case, int(sys.argv[1]), Path(temporary))
