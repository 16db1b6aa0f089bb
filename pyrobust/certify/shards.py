"""Several processes on one job: who does what, and how their parts become one log.

Under ``torchrun`` every process takes the images whose block has its turn, and writes a log of its
own, ``LOG.part0`` and so on. The first process joins the parts, in order, when all are done. Parts
of an interrupted run, also of another number of processes, count as done work.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Shard", "part_paths", "this_shard"]


@dataclass(frozen=True)
class Shard:
    """This process among those that share a job.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        grouped: whether a process group stands behind them; it may be of one process.
    """

    rank: int = 0
    world: int = 1
    grouped: bool = False

    def meet(self) -> None:
        """Wait for the other processes."""
        if self.grouped:
            import torch.distributed as dist

            dist.barrier()

    def first(self, value: Tensor) -> Tensor:
        """The first process's ``value``, a CPU tensor, in all of them."""
        if not self.grouped:
            return value
        import torch.distributed as dist

        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def any(self, flags: Tensor) -> Tensor:
        """Where any process has True, for a bool tensor of equal shape in all of them."""
        if not self.grouped:
            return flags
        import torch
        import torch.distributed as dist

        # nccl moves tensors of its GPU only, gloo those of the CPU
        place = "cuda" if dist.get_backend() == "nccl" else "cpu"
        counts = flags.to(place, torch.int32)
        dist.all_reduce(counts)
        return (counts > 0).to(flags.device)


def this_shard() -> Shard:
    """The place of this process as ``torchrun`` describes it; joins the process group.

    A group that already exists (gloo or nccl) is used as it is; otherwise one is made with gloo,
    since only turns and flags are exchanged.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 or "RANK" not in os.environ:
            return Shard()
        dist.init_process_group("gloo")
    return Shard(dist.get_rank(), dist.get_world_size(), grouped=True)


def part_paths(log: Path) -> list[Path]:
    """The parts that stand beside ``log``, in order."""
    pattern = re.compile(re.escape(log.name) + r"\.part(\d+)")
    found = [
        (int(m[1]), path) for path in log.parent.iterdir() if (m := pattern.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]
