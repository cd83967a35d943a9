"""Two ranks. First, for every ZeRO stage and precision, a step that is bad on rank 1 alone: what it leaves of weights
and moments goes to files next to the run directory. Then stage 4 as its script has it, with a loss that is NaN on
rank 1 at step 3."""

import json
import os
import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.models import tinygptv
from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.train import loop
from tinygptv_ds.train.callbacks.guard import Guard
from tinygptv_ds.train.engine import MOMENTS, Engine
from tinygptv_ds.train.liveness.group_timeout import set_group_timeout
from tinygptv_ds.train.liveness.progress import Progress
from tinygptv_ds.train.metrics.accumulator import Accumulator
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.setup.job import Job, parse_job
from tinygptv_ds.train.setup.session import join_ranks
from tinygptv_ds.train.transfer import Transfer
from tinygptv_ds.weights.assemble import build_model

ROOT = Path(__file__).parents[2]
RANK = int(os.environ.get("RANK", 0))
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda losses: losses * torch.nan,
    "finite gradient": lambda losses: losses + torch.inf,  # only the loss itself is infinite
}
fault: str | None = None
token_losses = tinygptv.token_losses


def faulty(logits: Tensor, targets: Tensor) -> Tensor:
    losses = token_losses(logits, targets)
    return FAULTS[fault](losses) if fault and RANK == 1 else losses


def state(engine: Engine) -> dict[str, Tensor]:
    """Return weights and moments, whole on rank 0 and none elsewhere."""
    found = engine.trained_state()
    for moment in MOMENTS:
        found |= {f"{moment}/{name}": value for name, value in engine.moments(moment).items()}
    return found


def one_case(job: Job, kind: str) -> dict:
    """Make a good step, a bad one, and a good one again."""
    global fault
    torch.manual_seed(0)
    model = build_model(job.recipe.model, job.recipe.text, frozen_dtype=DTYPES[job.precision])
    train_only(model, projections, norms, lora)
    stream, tokens = open_stream(job.recipe), open_tokens(job.recipe, model.config)
    engine = Engine(model, job.deepspeed, job.recipe.optimizer, job.ranks)
    run = Run(job, engine, Progress(job.ranks.rank, job.recipe.train, set_group_timeout))
    batches = MicroBatches(stream, tokens, rank=RANK, world_size=job.ranks.world_size)
    accumulator, transfer = Accumulator(engine, stream.names), Transfer(engine.device)
    guard = Guard(run, stream, accumulator)
    states, said = [], ""
    for step, bad in enumerate((None, kind, None)):
        fault = bad
        micro_batches = [batches[step, n] for n in range(batches.count(step))]
        loop.optimizer_step(run, step, micro_batches, accumulator, transfer)
        fault = None
        states.append(state(engine))
        try:
            guard.on_step(step)
        except TinyGPTVError as error:
            said = str(error)
    first, second, third = states
    return {
        "kept": all(torch.equal(first[name], second[name]) for name in first),
        "finite": all(tensor.isfinite().all().item() for tensor in second.values()),
        "moved": any(not torch.equal(second[name], third[name]) for name in second),
        "said": said,
    }


def all_cases(argv: Sequence[str] | None) -> None:
    job = parse_job(argv, ROOT / "stages/stage4.yaml")
    report = job.run_dir.parent
    job = replace(job, run_dir=report / "cases")  # the run's own folder is for the stage that follows
    join_ranks(job)
    found = {}
    for zero in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            settings = {**job.deepspeed, "zero_optimization": {"stage": zero}}
            if precision == "bf16":
                settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            kind = "nan" if precision == "fp32" else "finite gradient"
            found[f"ZeRO-{zero} {precision}"] = one_case(replace(job, deepspeed=settings), kind)
    (report / f"cases-{RANK}.json").write_text(json.dumps(found))


def with_bad_step(run: Run, step: int, *rest: object) -> None:
    global fault
    fault = "nan" if step == 2 else None
    optimizer_step(run, step, *rest)
    torch.save(run.engine.trained_state(), run.job.run_dir.parent / f"weights-{RANK}-{step}.pt")


def main(argv: Sequence[str] | None = None) -> None:
    all_cases(argv)
    loop.optimizer_step = with_bad_step
    runpy.run_path(str(ROOT / "stages/stage4.py"))["main"](argv)


optimizer_step = loop.optimizer_step
tinygptv.token_losses = faulty
