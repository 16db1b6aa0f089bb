"""Two gloo processes that each do the same work and hand back a result."""

import gc

import pytest
import torch


def run_two_processes(work, folder):
    """What ``work(rank)``, a function of a module, returns in either process of a group."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    # processes of their own: a forked one inherits locks that threads of this one may hold
    torch.multiprocessing.start_processes(
        _enter, (work, str(folder)), nprocs=2, start_method="spawn"
    )
    return tuple(torch.load(folder / f"result{rank}") for rank in (0, 1))


def _enter(rank, work, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.save(work(rank), f"{folder}/result{rank}")
    gc.collect()  # a parallel model that outlives its group may abort the process
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
