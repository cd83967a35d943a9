"""One optimizer step: its micro-batches forward and backward, then the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.train.liveness.progress import BACKWARD, FORWARD
from tinygptv_ds.train.metrics.accumulator import Accumulator
from tinygptv_ds.train.micro_batch_loss import micro_batch_loss
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.schedule import begins_cycle, learning_rate_of_step
from tinygptv_ds.train.transfer import Transfer, model_inputs


def optimizer_step(
    run: Run, step: int, micro_batches: Sequence[MicroBatch], accumulator: Accumulator, transfer: Transfer
) -> None:
    """Train on this rank's micro-batches of a step. Call on all ranks.

    The host waits for the device once, where the optimizer checks whether a gradient is not finite.

    Args:
        run: the run on this rank.
        step: counted from 0 over the whole run.
        micro_batches: from the dataloader; as many on every rank.
        accumulator: collects losses and counts for the log.
        transfer: copies batches to the device.
    """
    engine, recipe = run.engine, run.recipe
    batches = [transfer(micro_batch.batch) for micro_batch in micro_batches]
    targets = engine.begin_step(
        targets=sum(len(batch.targets) for batch in batches), images=sum(batch.images for batch in batches)
    )
    divisor = targets.clamp(min=1) if recipe.train.loss_reduction == "step_mean" else None
    if begins_cycle(step, recipe):
        engine.reset_optimizer()
    engine.set_learning_rate(learning_rate_of_step(step, recipe))
    # Only a trained Q-Former draws its dropout: by step and rank, so that a resumed run draws what an unbroken one has.
    torch.manual_seed(dropout_seed(recipe.seed, step, run.ranks.rank))
    for number, (micro_batch, batch) in enumerate(zip(micro_batches, batches, strict=True)):
        token_losses = micro_step(run, model_inputs(batch), divisor, number=number, count=len(batches))
        accumulator.add(step, micro_batch, batch, token_losses)


def micro_step(run: Run, inputs: Mapping[str, Any], divisor: Tensor | None, *, number: int, count: int) -> Tensor:
    """Run forward and backward passes and, after the last micro-batch, move the weights, on all ranks or on none.

    Returns the token losses, fp32 `[K]`.

    Args:
        run: the run on this rank.
        inputs: keyword arguments of the model's packed forward.
        divisor: see `micro_batch_loss`.
        number: the micro-batch's place in its step, from 0.
        count: micro-batches of the step.
    """
    engine = run.engine
    engine.set_boundary(number + 1 == count)
    run.progress.enter(FORWARD)
    token_losses = None
    if run.graphs is not None:
        of_mean = float(max(len(inputs["targets"]), 1) * count)
        token_losses = run.graphs(inputs, torch.full((), of_mean, device=engine.device) if divisor is None else divisor)
    if token_losses is None:
        output = engine.forward(inputs)
        token_losses = output.token_losses
        loss = micro_batch_loss(output, divisor, count=count, world_size=engine.ranks.world_size)
        run.progress.enter(BACKWARD)
        engine.backward(loss)
    engine.step()
    return token_losses


def dropout_seed(*parts: int) -> int:
    """Return a seed for torch that depends on all parts: the recipe's seed, the step and the rank."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
