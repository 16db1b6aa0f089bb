"""One process, two processes and runs killed ten times write the same log, byte for byte.

    python killed_job.py MODEL.safetensors

The parts are forks of this process, which has imported torch and started no thread.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from pyrobust.certify import CertificationJob, SmoothingJob, certify_to_log
from pyrobust.data import load_digits

DATA = load_digits().head(10, 40)
METHODS = {
    "fixed": SmoothingJob(samples=50, selection=10),
    "table": SmoothingJob(samples=300, selection=20, radii=(0.0, 0.1, 0.2), block=8),
}
FORK = multiprocessing.get_context("fork")
KILLS = 10


def run_shard(job, out, rank, world, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    certify_to_log(job, DATA, out, resume=True)


def start(job, out, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shards = [
        FORK.Process(target=run_shard, args=(job, out, rank, world, port)) for rank in range(world)
    ]
    for shard in shards:
        shard.start()
    return shards


def finish(shards):
    for shard in shards:
        shard.join(300)
        assert shard.exitcode == 0, shard.exitcode


def kill_until_done(job, out, whole, generator):
    """Start, wait a random moment, kill; by turns one process and two, so that parts are taken
    over by another number of processes.
    """
    stopped = 0
    for attempt in range(KILLS):
        shards = start(job, out, 1 + attempt % 2)
        time.sleep(generator.uniform(0.05, 0.3) * whole)
        for shard in shards:
            shard.kill()
            shard.join()
            stopped += shard.exitcode == -signal.SIGKILL
    finish(start(job, out, 1))
    assert stopped >= KILLS // 2, stopped


def check(name, model, folder):
    job = CertificationJob(model, method=METHODS[name])
    one, two, killed = (folder / f"{name}-{kind}.tsv" for kind in ("one", "two", "killed"))
    began = time.monotonic()
    finish(start(job, one, 1))
    whole = time.monotonic() - began
    finish(start(job, two, 2))
    kill_until_done(job, killed, whole, random.Random(0))
    assert len(one.read_bytes().splitlines()) == 41
    assert two.read_bytes() == one.read_bytes()
    assert killed.read_bytes() == one.read_bytes()
    assert not list(folder.glob("*.part*"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for method in METHODS:
            check(method, sys.argv[1], Path(temporary))
