"""The report of an estimate, as text."""

from __future__ import annotations

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.estimate.communication import efficiency
from tinygptv_ds.estimate.gpus import Card, Link
from tinygptv_ds.estimate.memory import GIB, fits
from tinygptv_ds.estimate.result import CardSpeed, Estimate
from tinygptv_ds.models.launches import WAITS_FOR_HOST, remedy

_COLUMNS = ("weights", "optimizer", "gradients", "activations", "logits", "context_and_margin", "total")


def report(result: Estimate, recipe: Recipe, cards: list[Card], links: list[Link]) -> str:
    """Return parameters, memory, time, communication and disk, each in a few lines."""
    return "\n".join(
        [
            f"stage {recipe.stage} on {result.gpus} GPU(s), in bf16",
            f"  {result.sizes_source}",
            "",
            *_parameters(result),
            "",
            *_memory(result, cards),
            "",
            *_time(result, recipe, cards),
            "",
            *_communication(result, cards, links),
            "",
            *_disk(result, recipe),
        ]
    )


def _parameters(result: Estimate) -> list[str]:
    lines = [
        f"  {part:<12} {count:>15,}{'  trained' if part in result.trained else ''}"
        for part, count in result.parameters.items()
    ]
    trainable = sum(result.parameters[part] for part in result.trained)
    total = f"  {'all':<12} {sum(result.parameters.values()):>15,}, {trainable:,} trained"
    if (quantized := result.quantized) is not None:
        each = quantized.stored / quantized.count
        total += f", {quantized.count:,} frozen in {' and '.join(quantized.counts)} ({each:.3f} bytes each)"
    return ["parameters", *lines, total]


def _memory(result: Estimate, cards: list[Card]) -> list[str]:
    sample = result.data.sample
    head = (
        f"GiB on one GPU, micro-batch {result.micro_batch:.3g} samples of {sample.images:.3g} image(s), "
        f"{sample.tokens:.0f} tokens, {sample.targets:.0f} of them targets ({result.data.source})"
    )
    names = [column.replace("context_and_margin", "context") for column in _COLUMNS]
    lines = ["  " + f"{'':<21}" + "".join(f"{name:>12}" for name in names) + "  fits"]
    for setting, memory in result.memory.items():
        cells = "".join(f"{getattr(memory, column) / GIB:>12.2f}" for column in _COLUMNS)
        fitting = [card.name for card in cards if fits(memory, card.gib)]
        fitting_names = "all" if len(fitting) == len(cards) else ", ".join(fitting) or "none"
        lines.append(f"  {setting:<21}{cells}  {fitting_names}")
    return [head, *lines]


def _time(result: Estimate, recipe: Recipe, cards: list[Card]) -> list[str]:
    train = recipe.train
    parts = ", ".join(f"{part} {ops.total / 1e9:.0f}" for part, ops in result.operations.items() if ops.total)
    again = f", {result.recomputed:.0%} of Phi's blocks computed twice" if result.recomputed else ""
    launches, fp8 = result.launches, recipe.model.fp8 is not None
    compiled = f" (compiled blocks; {launches.zero_3_kernels:,.0f} under ZeRO-3, without)" if launches.compiled else ""
    head = [
        f"{result.sample_operations / 1e12:.2f} TFLOP a sample{again}: {parts} GFLOP",
        f"{launches.kernels:,.0f} kernels a micro-batch{compiled}, launched in {1e6 * launches.seconds:.3g} us each",
        *(["products in fp8 (model.fp8) are given the time of 16 bit; not counted: up to half of it"] if fp8 else []),
        f"at {result.mfu:.0%} of the peak where the GPU is busy, {train.total_steps:,} steps of {train.batch_size} "
        "samples:",
    ]
    return [
        *head,
        *(_card_line(card, result.speed[card.name]) for card in cards),
        *_launch_bound(result, recipe, cards),
    ]


def _card_line(card: Card, speed: CardSpeed) -> str:
    own = speed.own
    line = (
        f"  {card.name:<12} {own.samples_per_second:>9.0f} samples/s {own.mfu:>5.0%} MFU {_duration(speed.hours):>15}"
    )
    if not own.launch_bound:
        return line
    full = speed.full
    room = "" if speed.full_fits else ", which do not fit"
    return (
        f"{line}  launch-bound; with micro-batches of {full.micro_batch:.0f}{room}: "
        f"{full.samples_per_second:.0f} samples/s, {full.mfu:.0%}"
    )


def _launch_bound(result: Estimate, recipe: Recipe, cards: list[Card]) -> list[str]:
    """Return a line with what helps, where a card waits for the host."""
    bound = [card.name for card in cards if result.speed[card.name].own.launch_bound]
    ways = remedy(
        from_features=result.launches.from_features,
        compiled=result.launches.compiled or result.quantized is not None,
        graphs=recipe.train.cuda_graph_tokens > 0 or result.gpus > 1,
    )
    return [f"  {WAITS_FOR_HOST} ({', '.join(bound)}); what helps: {ways}"] if bound else []


def _communication(result: Estimate, cards: list[Card], links: list[Link]) -> list[str]:
    if result.gpus == 1:
        return ["one GPU sends nothing"]
    columns = ("gradients", "updated", "gathered", "inside", "pcie")
    head = f"  {'MB that each GPU sends in a step':<33}" + "".join(f"{name:>11}" for name in columns)
    lines = [head + "".join(f"{link.name:>11}" for link in links)]
    for setting, sent in result.sent.items():
        cells = "".join(f"{getattr(sent, column) / 1e6:>11,.1f}" for column in columns)
        lines.append(f"  {setting:<33}{cells}" + "".join(f"{sent.seconds(link):>9.3f} s" for link in links))
    names = "/".join(link.name for link in links)
    lines.append(f"scaling efficiency in per cent over {names}, without overlap of sending and computing")
    compared = [setting for setting in ("ZeRO-2", "ZeRO-3", "ZeRO-3 + hpZ") if setting in result.sent]
    for card in cards:
        computing = result.speed[card.name].step_seconds
        shares = [_shares(result, setting, computing, links) for setting in compared]
        lines.append(f"  {card.name:<12}{computing:>7.2f} s a step   {'   '.join(shares)}")
    return ["communication", *lines, *_wrong_choices(result, cards, links)]


def _shares(result: Estimate, setting: str, computing: float, links: list[Link]) -> str:
    waiting = [result.sent[setting].seconds(link) for link in links]
    return f"{setting} " + "/".join(f"{100 * efficiency(computing, seconds):.0f}" for seconds in waiting)


def _wrong_choices(result: Estimate, cards: list[Card], links: list[Link]) -> list[str]:
    """Return a line for each card where ZeRO-3 would wait for longer than it computes, with the alternative."""
    lines = []
    for card in cards if "ZeRO-3" in result.sent else ():
        slow = [x.name for x in links if result.sent["ZeRO-3"].seconds(x) > result.speed[card.name].step_seconds]
        if slow:
            zero_2_fits = fits(result.memory["ZeRO-2"], card.gib)
            remedy = "ZeRO-2, which fits" if zero_2_fits else "hpZ, a larger micro-batch, or fewer samples and ZeRO-2"
            lines.append(f"  {card.name}: ZeRO-3 is the wrong choice over {', '.join(slow)}; take {remedy}")
    return lines


def _disk(result: Estimate, recipe: Recipe) -> list[str]:
    disk = result.disk
    shards = "" if disk.shards_measured else " at most, if every sample of the run is a different one of 60 kB"
    return [
        "disk",
        f"  shards       {_size(disk.shards)}{shards}",
        f"  features     {_size(disk.features)}, if they are computed (tinygptv-ds features)",
        f"  checkpoints  {_size(disk.checkpoint)} each, {_size(disk.checkpoints)} with {recipe.train.keep_checkpoints} "
        "kept and one being written",
        f"  model/       {_size(disk.model)}{' with best/' if recipe.train.keep_best else ''}",
    ]


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _size(count: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
