"""An estimate as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.estimate.gpus import Card, Link
from tinygptv_ds.estimate.memory import GIB, fits
from tinygptv_ds.estimate.scaling import efficiency

if TYPE_CHECKING:
    from tinygptv_ds.estimate.estimate import Estimate

_COLUMNS = ("weights", "optimizer", "gradients", "activations", "logits", "context_and_margin", "total")


def report(found: Estimate, recipe: Recipe, cards: list[Card], links: list[Link]) -> str:
    """Parameters, memory, time, traffic and disk, each in a few lines."""
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
            *_traffic(found, cards, links),
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
        f"GiB on one GPU, micro-batch {found.micro_batch:.3g} samples of {sample.images:.3g} image(s), "
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


def _traffic(found: Estimate, cards: list[Card], links: list[Link]) -> list[str]:
    if found.gpus == 1:
        return ["one GPU sends nothing"]
    columns = ("gradients", "updated", "gathered", "inside", "pcie")
    head = f"  {'MB that each GPU sends in a step':<33}" + "".join(f"{name:>11}" for name in columns)
    lines = [head + "".join(f"{link.name:>11}" for link in links)]
    for setting, sent in found.sent.items():
        cells = "".join(f"{getattr(sent, column) / 1e6:>11,.1f}" for column in columns)
        lines.append(f"  {setting:<33}{cells}" + "".join(f"{sent.seconds(link):>9.3f} s" for link in links))
    names = "/".join(link.name for link in links)
    lines.append(f"scaling efficiency in per cent over {names}, if nothing is sent while something is computed")
    compared = [setting for setting in ("ZeRO-2", "ZeRO-3", "ZeRO-3 + hpZ") if setting in found.sent]
    for card in cards:
        computing = found.speed[card.name].step_seconds
        shares = [_shares(found, setting, computing, links) for setting in compared]
        lines.append(f"  {card.name:<12}{computing:>7.2f} s a step   {'   '.join(shares)}")
    return ["traffic", *lines, *_wrong_choices(found, cards, links)]


def _shares(found: Estimate, setting: str, computing: float, links: list[Link]) -> str:
    waiting = [found.sent[setting].seconds(link) for link in links]
    return f"{setting} " + "/".join(f"{100 * efficiency(computing, seconds):.0f}" for seconds in waiting)


def _wrong_choices(found: Estimate, cards: list[Card], links: list[Link]) -> list[str]:
    """Where ZeRO-3 would wait for longer than it computes; ZeRO-2 may fit, or not."""
    lines = []
    for card in cards:
        slow = [x.name for x in links if found.sent["ZeRO-3"].seconds(x) > found.speed[card.name].step_seconds]
        if slow:
            ready = fits(found.memory["ZeRO-2"], card.gib)
            instead = "ZeRO-2, which fits" if ready else "hpZ, a larger micro-batch, or fewer samples and ZeRO-2"
            lines.append(f"  {card.name}: ZeRO-3 is the wrong choice over {', '.join(slow)}; take {instead}")
    return lines


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
