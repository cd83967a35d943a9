"""An estimate as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinygptv_ds.config.schema import Recipe
from tinygptv_ds.train.cards import Card
from tinygptv_ds.train.memory import GIB, fits

if TYPE_CHECKING:
    from tinygptv_ds.train.estimate import Estimate

_COLUMNS = ("weights", "optimizer", "gradients", "activations", "logits", "context_and_margin", "total")


def report(found: Estimate, recipe: Recipe, cards: list[Card]) -> str:
    """Parameters, memory, time and disk, each in a few lines."""
    return "\n".join(
        [
            f"stage {recipe.stage} on {found.gpus} GPU(s), in bf16",
            f"  {found.sizes_source}",
            "",
            *_parameters(found),
            "",
            *_memory(found, cards),
            "",
            *_time(found, recipe, cards),
            "",
            *_disk(found, recipe),
        ]
    )


def _parameters(found: Estimate) -> list[str]:
    lines = [
        f"  {part:<12} {count:>15,}{'  learns' if part in found.trained else ''}"
        for part, count in found.parameters.items()
    ]
    learning = sum(found.parameters[part] for part in found.trained)
    return ["parameters", *lines, f"  {'all':<12} {sum(found.parameters.values()):>15,}  of which {learning:,} learn"]


def _memory(found: Estimate, cards: list[Card]) -> list[str]:
    sample = found.data.sample
    head = (
        f"GiB on one GPU, micro-batch {found.micro_batch:.3g} samples of {sample.pictures:.3g} picture(s), "
        f"{sample.tokens:.0f} tokens, {sample.targets:.0f} of them learnt ({found.data.source})"
    )
    names = [column.replace("context_and_margin", "context") for column in _COLUMNS]
    lines = ["  " + f"{'':<21}" + "".join(f"{name:>12}" for name in names) + "  fits"]
    for setting, memory in found.memory.items():
        cells = "".join(f"{getattr(memory, column) / GIB:>12.2f}" for column in _COLUMNS)
        fitting = [card.name for card in cards if fits(memory, card.gib)]
        told = "all" if len(fitting) == len(cards) else ", ".join(fitting) or "none"
        lines.append(f"  {setting:<21}{cells}  {told}")
    return [head, *lines]


def _time(found: Estimate, recipe: Recipe, cards: list[Card]) -> list[str]:
    train = recipe.train
    parts = ", ".join(f"{part} {ops.total / 1e9:.0f}" for part, ops in found.operations.items() if ops.total)
    again = f", {found.recomputed:.0%} of Phi's blocks computed twice" if found.recomputed else ""
    head = f"{found.sample_operations / 1e12:.2f} TFLOP a sample{again}: {parts} GFLOP"
    lines = [
        f"  {card.name:<12} {found.speed[card.name].samples_per_second:>9.0f} samples/s "
        f"{_duration(found.speed[card.name].hours):>15}"
        for card in cards
    ]
    steps = f"at {found.mfu:.0%} of the peak, {train.total_steps:,} steps of {train.batch_size} samples:"
    return [head, steps, *lines]


def _disk(found: Estimate, recipe: Recipe) -> list[str]:
    disk = found.disk
    shards = "" if disk.shards_measured else " at most, were every sample of the run another one of 60 kB"
    return [
        "disk",
        f"  shards       {_size(disk.shards)}{shards}",
        f"  features     {_size(disk.features)}, where they are made (python -m tinygptv_ds features)",
        f"  checkpoints  {_size(disk.checkpoint)} each, {_size(disk.checkpoints)} with {recipe.train.keep_checkpoints} "
        "kept and one being written",
        f"  model/       {_size(disk.model)}",
    ]


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _size(count: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
