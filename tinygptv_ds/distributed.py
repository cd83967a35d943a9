"""Who this process is among the ranks, read from the launcher's environment. torch is loaded where they meet only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

_PATIENCE = timedelta(days=30)  # of the ranks that have finished their share


@dataclass(frozen=True)
class Ranks:
    """Attributes: rank over all nodes, rank on this node, and how many there are of each."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


def ranks_from_env() -> Ranks:
    """Set by `deepspeed`, torchrun, or this program's SLURM script; without any of them, one single rank."""
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or (world if "RANK" in env else 1))
    return Ranks(int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), world, local_world)


def complete_env() -> None:
    """Give a process that no launcher started the environment of a single rank."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in {**single, "MASTER_PORT": port}.items()})


def cores_per_rank(ranks: Ranks) -> int:
    """CPU cores that one rank may use on this node."""
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Inside, the ranks of a launcher can meet (`wait_for_all`), on the CPU: no GPU is waited on or held."""
    if ranks.world_size == 1:
        yield
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    yield
    torch.distributed.destroy_process_group()


def wait_for_all(ranks: Ranks) -> None:
    """Go on once all ranks have come here."""
    if ranks.world_size > 1:
        import torch.distributed

        torch.distributed.barrier()
