"""Warnings about recipes that are valid but cannot be meant: what will happen, and the change that helps. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.train.schedule import learning_rate_of_step

_MANY_PASSES = 100  # over a dataset; the published stages make 17 at most
_HIGH_RATE = 0.01  # a hundred times the highest published one


def recipe_warnings(recipe: Recipe, samples: Mapping[str, int] | None = None) -> list[str]:
    """Return one warning, with its remedy, for each thing that cannot be meant.

    Args:
        recipe: as it will be trained.
        samples: training samples by dataset; None: unknown, and what depends on them is not looked at.
    """
    found = [*_learning_rate(recipe), *_measurements(recipe)]
    if samples is not None and any(samples.values()):
        found += [*_passes(recipe, samples), *_batch(recipe, samples)]
    return found


def _learning_rate(recipe: Recipe) -> Iterator[str]:
    optimizer, train = recipe.optimizer, recipe.train
    lr, warmup, epoch, total = optimizer.lr, optimizer.warmup_steps, train.steps_per_epoch, train.steps_per_cycle
    # Every schedule is monotone between these steps; the published one starts its warm-up again at every epoch.
    turning_points = {0, min(warmup, epoch) - 1, warmup - 1, warmup, total - 1}
    rates = {step: learning_rate_of_step(step, recipe) for step in turning_points if 0 <= step < total}
    highest, last = max(rates.values()), rates[total - 1]
    if lr > _HIGH_RATE:
        yield (
            f"optimizer.lr {lr:g} is far above what AdamW trains with (published: 1e-5 to 1e-4), and the loss will "
            "most likely not fall; --set optimizer.lr=1e-4"
        )
    if optimizer.warmup_lr > lr and warmup and optimizer.schedule != "published":  # which caps it at lr
        yield (
            f"optimizer.warmup_lr {optimizer.warmup_lr:g} is above optimizer.lr {lr:g}, so the run begins with its "
            f"highest learning rate; --set optimizer.warmup_lr={lr / 100:g}"
        )
    fitting = max(1, total // 20)
    if optimizer.schedule == "published" and warmup > epoch:
        reached = f"never exceeds {highest:.3g} ({100 * highest / lr:.2g} % of optimizer.lr {lr:g})"
        yield (
            f"optimizer.warmup_steps ({warmup}) is longer than an epoch of {epoch} steps (train.steps_per_epoch), and "
            "the published schedule starts its warm-up again at every epoch: the learning rate "
            f"{reached if warmup >= total else f'falls back to {optimizer.warmup_lr:g} at each one'}; --set "
            f"optimizer.schedule=cosine --set optimizer.warmup_steps={fitting} warms up once"
        )
    elif last > max(lr, optimizer.warmup_lr) * (1 + 1e-9):
        as_published = ", as in the published stage 4" if recipe.stage == 4 else ""
        yield (
            f"the learning rate rises from {lr:g} towards {optimizer.min_lr:g}: optimizer.min_lr is above "
            f"optimizer.lr{as_published}; --set optimizer.min_lr={lr / 10:g} lets it fall"
        )
    elif warmup > total / 2:
        yield (
            f"the warm-up takes {warmup} of {total} steps (optimizer.warmup_steps), so most of the run has less than "
            f"optimizer.lr; --set optimizer.warmup_steps={fitting}"
        )


def _measurements(recipe: Recipe) -> Iterator[str]:
    train, total = recipe.train, recipe.train.total_steps
    often = max(1, total // 10)
    every = {"train.validate_every": train.validate_every, "evaluation.every": recipe.evaluation.every}
    for key, steps in every.items():
        if steps > total:
            lost = ", so train.keep_best has nothing to choose from" if train.keep_best else ""
            yield f"{key} ({steps}) is more than the {total} steps of the run{lost}; --set {key}={often}"


def _passes(recipe: Recipe, samples: Mapping[str, int]) -> Iterator[str]:
    """Warn of datasets that are repeated far more often than they can teach anything."""
    train = recipe.train
    used = {section.name: section.weight for section in recipe.data.used if samples.get(section.name)}
    whole = sum(used.values())
    drawn = train.total_steps * train.batch_size
    passes = {name: drawn * weight / whole / samples[name] for name, weight in used.items()}
    many = {name: times for name, times in passes.items() if times > _MANY_PASSES}
    if not many:
        return
    each = ", ".join(f"{times:,.0f} times over the {samples[name]:,} samples of {name}" for name, times in many.items())
    if len(used) == 1:
        once = max(1, math.ceil(samples[next(iter(used))] / train.batch_size))
        remedy = f"--set train.steps_per_epoch={once} --set train.epochs=10 --set train.cycles=1 makes 10 passes"
    else:
        remedy = "lower their weight in data.datasets, or train.epochs x train.steps_per_epoch"
    yield f"the run goes {each}, which memorizes them; {remedy}"


def _batch(recipe: Recipe, samples: Mapping[str, int]) -> Iterator[str]:
    count, batch = sum(samples.values()), recipe.train.batch_size
    if batch > count:
        yield (
            f"train.batch_size ({batch}) is more than the {count} training samples, so every step holds some of them "
            f"several times; --set train.batch_size={max(1, count // 4)} with a train.micro_batch_size that divides it"
        )
