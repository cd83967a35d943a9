"""Description of this machine, and its ceilings for comparison: matrix products, copies, transfers."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from tinygptv_ds.models.attention import available_backends
from tinygptv_ds.models.flops import peak_flops
from tinygptv_ds.train.setup.run_dir import versions


def this_device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Return the median time of a call after two warm-up calls, by the clock of the device if it is a GPU."""
    call(), call()
    if device.type == "cpu":
        return statistics.median(_host_seconds(call) for _ in range(times))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(times)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    wait(device)
    return statistics.median(begin.elapsed_time(end) / 1000 for begin, end in events)


def _host_seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def describe_machine(device: torch.device) -> dict[str, object]:
    """Return names, versions and sizes."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: dict[str, object] = {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": pages / 2**30,
        **versions(),
        "attention": available_backends(device, torch.bfloat16),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "peak_tflops": (peak_flops(properties.name, "bf16") or 0.0) / 1e12 or None,
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def ceilings(device: torch.device) -> dict[str, float]:
    """Return TFLOP/s of a large bf16 product, and GB/s of a copy on the device and from pinned memory to it."""
    on_gpu = device.type == "cuda"
    width, megabytes = (8192, 1024) if on_gpu else (256, 8)
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds(lambda: a @ b, device, 20)
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device, 20)
    host = torch.ones(megabytes * 2**18, pin_memory=on_gpu)
    transfer = seconds(lambda: target.copy_(host, non_blocking=True), device, 5)
    size = megabytes * 2**20 / 1e9
    return {
        "matmul_tflops": 2 * width**3 / product / 1e12,
        "copy_gb_s": 2 * size / copy,  # read and written
        "transfer_gb_s": size / transfer,
    }
