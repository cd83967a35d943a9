"""Time of a training step by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu.machine import wait
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.metrics.stopwatch import Stopwatch


def parts_of(engine: Engine, run: Callable[[], object], steps: int) -> dict[str, float]:
    """Return the seconds of a step by part, from additional steps; on a GPU between events, without waiting in between.

    `head` is the rest of the forward pass: embeddings, the language-model head, the loss, and under ZeRO-3 its gathers.
    `optimizer` includes reductions among ranks after the backward pass. `rest` is the transfer of batches to the device
    and the work of the host in between.
    """
    with _clocks(engine) as clocks:
        wait(engine.device)
        began = time.perf_counter()
        run()
        wait(engine.device)
        whole = (time.perf_counter() - began) / steps
    found = {name: clock.read() / steps for name, clock in clocks.items()}
    forward = found.pop("forward")
    found["head"] = forward - found["vision"] - found["projections"] - found["phi"]
    found["rest"] = whole - forward - found["backward"] - found["optimizer"]
    return found


@contextmanager
def _clocks(engine: Engine) -> Iterator[dict[str, Stopwatch]]:
    """Attach a stopwatch to every part inside the context."""
    model, deepspeed = engine.module, engine.deepspeed
    calls: dict[str, tuple[Any, str]] = {
        "vision": (model, "encode_vision"),
        "projections": (model, "project"),
        "phi": (model.language_model.model, "forward"),
        "forward": (deepspeed, "forward"),
        "backward": (deepspeed, "backward"),
        "optimizer": (deepspeed, "step"),
    }
    clocks = {name: Stopwatch(engine.device) for name in calls}
    before = {name: vars(owner).get(method) for name, (owner, method) in calls.items()}
    for name, (owner, method) in calls.items():
        setattr(owner, method, _timed(getattr(owner, method), clocks[name]))
    try:
        yield clocks
    finally:
        for name, (owner, method) in calls.items():
            delattr(owner, method)  # the method of the class is visible again
            if before[name] is not None:
                setattr(owner, method, before[name])


def _timed(call: Callable[..., Any], clock: Stopwatch) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.running():
            return call(*args, **kwargs)

    return timed
