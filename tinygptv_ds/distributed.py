"""Ranks and world size as the launcher sets them, and what ranks exchange: barriers, gathered and broadcast values.

torch is imported only by the functions in which ranks meet.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tinygptv_ds import errors
from tinygptv_ds.processes import number_in_env, usable_cores

_BARRIER_TIMEOUT = timedelta(days=30)  # a rank that has finished its share may wait long for the others
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a launcher.

    Attributes:
        rank: from 0 to `world_size` - 1, over all nodes.
        local_rank: from 0 to `local_world_size` - 1, on this node.
        world_size: number of ranks on all nodes.
        local_world_size: number of ranks on this node.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def ranks_from_env() -> Ranks:
    """Read what `deepspeed`, torchrun or this program's SLURM script has set; without RANK, a single rank.

    Raises:
        ConfigError: a variable is no number, or they contradict each other.
    """
    if not os.environ.get("RANK"):
        return Ranks(0, 0, 1, 1)
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    world = _number("WORLD_SIZE", 1)
    local_world = _number("LOCAL_WORLD_SIZE", 0) or _number("LOCAL_SIZE", 0) or world
    if not (rank < world and local_rank < local_world <= world):
        raise errors.ConfigError(
            f"RANK {rank} of WORLD_SIZE {world}, LOCAL_RANK {local_rank} of {local_world} of this node: these "
            "variables, which a launcher sets, contradict each other; unset them"
        )
    return Ranks(rank, local_rank, world, local_world)


def _number(name: str, default: int) -> int:
    if not (text := os.environ.get(name)):
        return default
    if (number := number_in_env(name)) is None:
        raise errors.ConfigError(
            f"the environment variable {name} is {errors.shown(text)}, no number; a launcher sets it: unset it"
        )
    return number


def free_port() -> int:
    """Return a port of this machine that is free at the moment, on all its addresses."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def complete_env() -> None:
    """Set the environment of a single rank in a process that no launcher started.

    Raises:
        ConfigError: RANK is set, and where ranks meet is not.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if os.environ.get("RANK") and missing:
        raise errors.ConfigError(
            f"RANK is set, but not {' and '.join(missing)}: start ranks with a launcher, or unset RANK for one rank"
        )
    if not os.environ.get("RANK"):
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in {**single, "MASTER_PORT": free_port()}.items()})


def cores_per_rank(ranks: Ranks) -> int:
    """Return the number of CPU cores that one rank may use on this node."""
    return max(1, usable_cores() // ranks.local_world_size)


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Connect the ranks of a launcher within a block, through gloo on the CPU: no GPU is waited on or held."""
    if ranks.world_size == 1:
        yield
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_BARRIER_TIMEOUT)
    yield
    distributed.destroy_process_group()


def barrier(ranks: Ranks) -> None:
    """Wait until all ranks have called this."""
    if ranks.world_size > 1:
        from torch import distributed

        distributed.barrier()


def gather(ranks: Ranks, value: _Value) -> list[_Value]:
    """Return the values of all ranks, in their order; all ranks must call it. Values are pickled on the way."""
    if ranks.world_size == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(values, value)
    return values


def broadcast_from_rank0(ranks: Ranks, find: Callable[[], Any]) -> Any:
    """Return on every rank what `find` returns on rank 0, where alone it is called; all ranks must call this.

    Args:
        ranks: this process among the others; of several, a process group must be connected.
        find: returns a plain value, as JSON holds them.

    Raises:
        TinyGPTVError: the one that `find` raised on rank 0, raised on every rank, so that all of them end alike.
    """
    result: dict[str, Any] = {}
    if ranks.is_main:
        try:
            result = {"value": find()}
        except errors.TinyGPTVError as error:
            result = {"error": _error_name(error), "message": str(error)}
    if ranks.world_size > 1:
        result = json.loads(_broadcast_text(json.dumps(result)))
    if "error" in result:
        raise getattr(errors, result["error"], errors.TinyGPTVError)(result["message"])
    return result["value"]


def _error_name(error: errors.TinyGPTVError) -> str:
    """Return the name of the error's nearest class in `tinygptv_ds.errors`: the other ranks look it up there."""
    return next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))


def _broadcast_text(text: str) -> str:
    """Return rank 0's text, broadcast as bytes on the device of the process group."""
    import torch
    from torch import distributed

    on_gpu = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    distributed.broadcast(size, 0)
    if distributed.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    distributed.broadcast(data, 0)
    return bytes(data.tolist()).decode()
