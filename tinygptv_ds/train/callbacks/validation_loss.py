"""The validation loss: on fixed samples, without dropout, the same whatever the number of ranks."""

from __future__ import annotations

import time

import torch

from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.validation import validation_stream
from tinygptv_ds.distributed import cores_per_rank
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.transfer import Transfer, model_inputs


class Validation:
    """Measures the loss on samples that are not trained on, where the recipe has any.

    Args:
        engine: computes; all ranks take part, each with its share, in the same number of forward passes.
        tokens: how samples become rows.
    """

    def __init__(self, engine: Engine, tokens: Tokens) -> None:
        ranks = engine.job.ranks
        self._engine = engine
        self._stream = validation_stream(engine.job.recipe)
        if self._stream is not None:
            self._batches = MicroBatches(self._stream, tokens, rank=ranks.rank, world_size=ranks.world_size)
        self._told = False

    def measure(self, step: int) -> dict[str, float]:
        """`val/loss` over all target tokens and `val/loss_NAME` of each dataset. To be called on all ranks.

        Args:
            step: steps done, for the log.

        Returns:
            Nothing where the recipe has no validation samples.
        """
        if self._stream is None:
            return {}
        start = time.perf_counter()
        names = self._stream.names
        sums, tokens = self._engine.all_reduce(self._sums()).view(2, len(names)).tolist()
        losses = {"val/loss": sum(sums) / max(sum(tokens), 1)}
        losses |= {f"val/loss_{name}": a / b for name, a, b in zip(names, sums, tokens, strict=True) if b}
        each = ", ".join(f"{name} {losses[f'val/loss_{name}']:.4f}" for name in names if f"val/loss_{name}" in losses)
        seconds = time.perf_counter() - start
        LOGGER.info("step %d: validation loss %.4f (%s) in %.1f s", step, losses["val/loss"], each, seconds)
        return losses

    def _sums(self) -> torch.Tensor:
        """Of this rank, float64 `[2 * datasets]`: token losses by dataset, then targets by dataset."""
        engine, count = self._engine, len(self._stream.names)
        sums = torch.zeros(2 * count, dtype=torch.float64, device=engine.device)
        transfer = Transfer(engine.device)
        steps = load_steps(
            self._batches,
            first=0,
            last=self._stream.order.steps,
            num_workers=min(engine.job.recipe.data.num_workers, cores_per_rank(engine.job.ranks)),
            pin_memory=engine.device.type == "cuda",
            read_seconds=engine.job.recipe.data.read_timeout_seconds,
            on_hang=engine.on_hang,
        )
        with engine.inference() as model:
            for loaded in steps:
                for item in loaded:
                    batch = transfer(item.batch)
                    losses = model(**model_inputs(batch)).token_losses.double()
                    sums.index_add_(0, batch.target_dataset, losses)
                    sums.index_add_(0, batch.target_dataset + count, torch.ones_like(losses))
                    self._tell(item.skipped)
        self._told = True
        return sums

    def _tell(self, skipped: tuple) -> None:
        """Name samples that cannot be used, once a run: they are the same each time."""
        for sample in skipped if not self._told else ():
            LOGGER.warning("left out of the validation (%s) %s", sample.reason, sample.message)
