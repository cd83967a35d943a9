"""A program that times all-reduces among ranks, for any launcher that sets RANK and the related variables:

torchrun --nproc-per-node 8 -m tinygptv_ds.doctor.bandwidth --backend nccl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from tinygptv_ds.distributed import ranks_from_env
from tinygptv_ds.doctor.host_probe import MARK

if TYPE_CHECKING:
    import torch

GRADIENTS_MB = 181  # fp32 gradients of the 45.3 M parameters that stages 2 to 4 train
SIZES_MB = (1, 4, 16, 64, GRADIENTS_MB, 256)
_CONNECT = timedelta(seconds=60)
_SECONDS_OF_SIZE = 1.0  # approximate time spent on each size
_TOO_LONG = 20.0  # seconds for one all-reduce; larger sizes are then left out


class TimingRow(NamedTuple):
    """One tensor size in megabytes (10^6 bytes), and the seconds of an all-reduce of it."""

    size_mb: int
    seconds: float

    def algorithm_bandwidth(self) -> float:
        """Return the bytes per second that were reduced."""
        return self.size_mb * 1e6 / self.seconds

    def bus_bandwidth(self, ranks: int) -> float:
        """Return the bytes per second that each rank sends and receives in a ring, for any number of ranks alike."""
        return self.algorithm_bandwidth() * 2 * (ranks - 1) / ranks


def measure(sizes_mb: Sequence[int], device: torch.device) -> Iterator[TimingRow]:
    """Time all-reduces of growing size; must be called on all ranks."""
    import torch
    from torch import distributed

    for size in sizes_mb:
        tensor = torch.ones(size * 1_000_000 // 4, device=device)
        seconds = _timed(lambda: distributed.all_reduce(tensor), device)  # noqa: B023 - called at once
        times = torch.tensor(max(1.0, min(50.0, _SECONDS_OF_SIZE / seconds)), device=device)
        distributed.broadcast(times, 0)  # all ranks must continue, or stop, together

        def repeat(count: int = int(times), tensor: torch.Tensor = tensor) -> None:
            for _ in range(count):
                distributed.all_reduce(tensor)

        yield TimingRow(size, _timed(repeat, device) / int(times))
        too_long = torch.tensor(float(seconds > _TOO_LONG), device=device)
        distributed.broadcast(too_long, 0)
        if too_long:
            return


def _timed(run: Callable[[], object], device: torch.device) -> float:
    import torch
    from torch import distributed

    distributed.barrier()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print the rows on rank 0 as JSON after `MARK`."""
    parser = argparse.ArgumentParser(description="Time all-reduces among the ranks that a launcher has started.")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo", help="communication backend")
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=SIZES_MB, help="tensor sizes, ascending")
    args = parser.parse_args()
    backend = args.backend

    import torch
    from torch import distributed

    ranks = ranks_from_env()
    device = torch.device("cuda", ranks.local_rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=_CONNECT)
    rows = list(measure(args.sizes_mb, device))
    if ranks.is_main:
        print(f"{MARK}{json.dumps(rows)}", flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
