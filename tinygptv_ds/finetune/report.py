"""What a fine-tuning prints: the plan, and at the end the scores and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.finetune.job import Job, example, read_scores
from tinygptv_ds.finetune.phases import Phase, Progress
from tinygptv_ds.finetune.recipe import Data

_COUNTS = ("questions", "empty_answers", "unparsable_answers", "step")  # numbers of a result that are no scores


def print_plan(recipe: Recipe, data: Data, phases: Sequence[Phase]) -> None:
    """Print the plan and the commands that carry it out."""
    train, optimizer = recipe.train, recipe.optimizer
    print(
        f"\n=== Plan\n{data.samples} samples to train on, {data.held_out_samples} held out\n"
        f"{train.epochs} epochs of {train.steps_per_epoch} steps: {train.total_steps} steps of {train.batch_size} "
        f"samples in micro-batches of {train.micro_batch_size or f'{train.max_tokens} tokens'}\n"
        f"learning rate {optimizer.lr:g} after {optimizer.warmup_steps} steps of warm-up, falling to "
        f"{optimizer.min_lr:g}\n"
        "the commands that follow, each of which may be run by hand:"
    )
    for phase in phases:
        print(f"  $ {phase.command}")


def print_end(job: Job, data: Data, progress: Progress) -> None:
    """Print the scores before and after training, and what to do with the model."""
    before, after = (read_scores(job.scores(when)) for when in ("before", "after"))
    print(f"\n=== {job.out}\n{'held-out score':<24}{'before':>10}{'after':>10}")
    for name in scores_of(after):
        print(f"{name:<24}{before.get(name, float('nan')):>10.2f}{after[name]:>10.2f}")
    count = after.get("questions", data.held_out_samples)
    few = "; with so few the score is uncertain, so read the answers, too" if count < 50 else ""
    print(f"of {count} questions{few}: {job.scores('after').with_suffix('')}")
    print(f"trained in {progress.seconds('train'):.0f} s; curves: tensorboard --logdir {shlex.quote(str(job.run_dir))}")
    shown = example(data, job.work)
    image = f" --image {shlex.quote(str(shown[0]))}" if shown is not None else ""
    print(f"\nAsk it{f', for instance: {shown[1]}' if shown is not None else ''}")
    print(f"  $ tinygptv-ds chat {shlex.quote(str(job.out))}{image}")


def scores_of(result: dict[str, Any]) -> list[str]:
    """Return the names of a result's scores."""
    return [
        name
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _COUNTS
    ]
