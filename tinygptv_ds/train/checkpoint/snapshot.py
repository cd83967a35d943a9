"""The state of a run, gathered from all ranks."""

from __future__ import annotations

from typing import Any

from tinygptv_ds.train.checkpoint.storage import Snapshot
from tinygptv_ds.train.engine import MOMENTS, Engine


def take_snapshot(
    engine: Engine, step: int, *, batch_size: int, fingerprint: dict[str, Any], began_from: str | None = None
) -> Snapshot:
    """Return the state after `step` optimizer steps, with the tensors on rank 0 only. Call on all ranks.

    Args:
        engine: holds weights and optimizer.
        step: optimizer steps done.
        batch_size: samples of a step, over all ranks.
        fingerprint: what a resumed run must share (`run_fingerprint`).
        began_from: the checkpoint of another run that this one began from.
    """
    tensors = {f"weight/{name}": weight for name, weight in engine.trained_state().items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": value for name, value in engine.moments(moment).items()}
    state = {
        "step": step,
        "samples": step * batch_size,
        "optimizer_steps": engine.optimizer_steps,
        "image_steps": engine.image_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": None if engine.scale is None else [engine.scale.value, engine.scale.good_steps],
        "world_size": engine.ranks.world_size,
        "zero_stage": engine.zero_stage,
        "began_from": began_from,
        "must_match": fingerprint,
    }
    return Snapshot(tensors, state)
