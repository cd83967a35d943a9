"""The validation loss: on fixed samples, without dropout, the same at any world size."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import SkippedSample, Tokens
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.data.stream.validation import validation_stream
from tinygptv_ds.distributed import cores_per_rank
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.callbacks.periodic import Periodic
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.transfer import Transfer, model_inputs


class ValidationLoss(Periodic):
    """Measures the loss on samples that are not trained on, where the recipe has any.

    Settings: `train.validate_every`, `train.validation_samples`, `data.validation`, `data.validation_share`. Metrics:
    `val/loss` over all target tokens, and `val/loss_DATASET`.

    Args:
        run: the run on this rank; all ranks compute their share in the same number of forward passes.
        tokens: how samples become rows.
        reporter: writes the losses.
        callbacks: get the losses.
    """

    def __init__(self, run: Run, tokens: Tokens, reporter: Reporter, callbacks: Callback) -> None:
        super().__init__(run, reporter, callbacks, every=run.recipe.train.validate_every, phase="validating")
        ranks = run.ranks
        self._stream = validation_stream(run.recipe)
        if self._stream is not None:
            self._batches = MicroBatches(self._stream, tokens, rank=ranks.rank, world_size=ranks.world_size)
        self._warned = False

    def measure(self, done: int) -> dict[str, float]:
        """Return the losses; none where the recipe has no validation samples. Called on all ranks."""
        if self._stream is None:
            return {}
        start = time.perf_counter()
        names = self._stream.names
        sums, tokens = self._run.engine.all_reduce(self._sums(self._stream)).view(2, len(names)).tolist()
        losses = {"val/loss": sum(sums) / max(sum(tokens), 1)}
        losses |= {f"val/loss_{name}": a / b for name, a, b in zip(names, sums, tokens, strict=True) if b}
        each = ", ".join(f"{name} {losses[f'val/loss_{name}']:.4f}" for name in names if f"val/loss_{name}" in losses)
        seconds = time.perf_counter() - start
        LOGGER.info("step %d: validation loss %.4f (%s) in %.1f s", done, losses["val/loss"], each, seconds)
        return losses

    def _sums(self, stream: OpenStream) -> torch.Tensor:
        """Return this rank's float64 `[2 * datasets]`: token losses by dataset, then targets by dataset."""
        engine, recipe, count = self._run.engine, self._run.recipe, len(stream.names)
        sums = torch.zeros(2 * count, dtype=torch.float64, device=engine.device)
        transfer = Transfer(engine.device)
        steps = load_steps(
            self._batches,
            first=0,
            last=stream.order.steps,
            num_workers=min(recipe.data.num_workers, cores_per_rank(self._run.ranks)),
            pin_memory=engine.device.type == "cuda",
            read_seconds=recipe.data.read_timeout_seconds,
            on_hang=self._run.on_hang,
        )
        with engine.inference() as model:
            for loaded in steps:
                for item in loaded:
                    batch = transfer(item.batch)
                    losses = model(**model_inputs(batch)).token_losses.double()
                    sums.index_add_(0, batch.target_dataset, losses)
                    sums.index_add_(0, batch.target_dataset + count, torch.ones_like(losses))
                    self._warn(item.skipped)
        self._warned = True
        return sums

    def _warn(self, skipped: Sequence[SkippedSample]) -> None:
        """Name samples that cannot be used, once per run: they are the same each time."""
        for sample in skipped if not self._warned else ():
            LOGGER.warning("left out of the validation (%s) %s", sample.reason, sample.message)
