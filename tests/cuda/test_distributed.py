"""Training and verification by a process group of nccl."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("one_process_of_nccl.py")


def test_a_group_of_nccl_gives_the_results_of_one_process():
    count = str(torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", count, str(SCRIPT)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"nccl: {count} processes equal one" in done.stdout
