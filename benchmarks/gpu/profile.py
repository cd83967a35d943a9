"""Kernels of a step by torch's profiler: how many, how much of the time one runs, and which take longest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.machine import wait

_TOP = 20


def profiled(run: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Return the kernels of a step; on a CPU its operations in place of them.

    Args:
        run: makes the steps.
        steps: how many.
        device: where they are made.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        wait(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() or [] if event.device_type == kind and not event.is_user_annotation]
    found: dict[str, list[float]] = {}
    for event in events:
        total = found.setdefault(event.name, [0, 0.0])
        total[0] += 1
        total[1] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    longest = sorted(found.items(), key=lambda item: -item[1][1])[:_TOP]
    return {
        "kernels": len(events) / steps,
        "busy_pct": 100 * busy_share(events),
        "top": [{"name": name, "count": count / steps, "ms": us / 1e3 / steps} for name, (count, us) in longest],
    }


def busy_share(events: list[FunctionEvent]) -> float:
    """Return the share of the time, from the first start to the last end, in which at least one of the events runs."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    if not spans:
        return 0.0
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / max(reached - spans[0][0], 1e-9)
