"""The original's training as a baseline: the same random weights and samples, in the way its loop runs.

The procedure of `benchmarks/original.py` under fp16 autocast with a gradient scaler, normalised fp32 pixels copied from
memory that is not pinned, AdamW tensor by tensor, and the loss read on the host after every step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.machine import this_device, wait
from benchmarks.gpu.model import build, make_batches, model_config, overrides
from benchmarks.gpu.plan import SIZES, Case
from benchmarks.gpu.results import MEASURED, OUT_OF_MEMORY, add, add_check
from benchmarks.original import PaddedBatch, as_the_original, mean_loss, padded
from tinygptv_ds.cli import run_command
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.data.loader.batch import Batch
from tinygptv_ds.models.parameters import weight_decay_groups
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.metrics.reporter import memory_gib
from tinygptv_ds.train.transfer import model_inputs

WARM_UP = 3
# The mean losses of both procedures without dropout differ by rounding to 11 and to 8 bits.
SAME_LOSS = 2e-2


class OriginalTraining:
    """The original's loop over batches."""

    def __init__(self, model: TinyGPTVForConditionalGeneration, device: torch.device) -> None:
        self._model, self._device = model, device
        self._scaler = torch.amp.GradScaler(device.type)
        self._adamw = torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=1e-5, foreach=False)

    def step(self, batch: PaddedBatch) -> float:
        """Train on a batch; the host waits for its loss."""
        moved = batch.to(self._device)
        with torch.autocast(self._device.type, torch.float16):
            loss = mean_loss(self._model, moved)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._adamw)
        self._scaler.update()
        self._adamw.zero_grad()
        return loss.item()


def compare_losses(model: TinyGPTVForConditionalGeneration, batch: Batch, name: str, out: Path) -> None:
    """Check the original's mean loss, without dropout, against that of our packed rows on the same weights."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.float16):
        ours = float(model(**model_inputs(batch.to(device))).token_losses.mean())
        with as_the_original(model):
            theirs = float(mean_loss(model, padded(batch, model.normalize).to(device)))
    model.train()
    add_check(out, f"{name}: difference of the loss from ours", abs(theirs - ours) / abs(ours), SAME_LOSS)


def measure(case: Case, size: str, steps: int, out: Path) -> dict[str, object]:
    """Return the figures of the original's procedure in a case."""
    device = this_device()
    recipe = load_recipe(project_root() / f"stages/stage{case.stage}.yaml", overrides(case.stage, size))
    model = build(model_config(recipe, size), torch.float16, device)
    batches = make_batches(model.config, case, 0, pinned=False)
    compare_losses(model, batches.loaded[0].batch, str(case), out)
    model.train()
    on_host = [padded(each.batch, model.normalize) for each in batches.loaded]
    losses = []
    with as_the_original(model):
        training = OriginalTraining(model, device)
        for number in range(WARM_UP):
            losses.append(training.step(on_host[number % len(on_host)]))
        wait(device)
        began = time.perf_counter()
        for number in range(WARM_UP, WARM_UP + steps):
            losses.append(training.step(on_host[number % len(on_host)]))
        wait(device)
        seconds = (time.perf_counter() - began) / steps
    rates = {
        "samples_s": case.batch / seconds,
        "target_tokens_s": case.batch * batches.mean.targets / seconds,
        "step_seconds": seconds,
    }
    return {
        "case": asdict(case),
        "status": MEASURED,
        "losses": losses,
        "rates": rates,
        "memory_gib": {"allocated": memory_gib(device)},
    }


def main() -> None:
    """Measure the original's procedure in one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", required=True, help="a list of one case, as JSON")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, help="not used")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (case,) = (Case(**each) for each in json.loads(args.cases))
    try:
        add(args.out, "steps", measure(case, args.size, args.steps, args.out))
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0]
        add(args.out, "steps", {"case": asdict(case), "status": OUT_OF_MEMORY, "why": reason})
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
