"""The verb `estimate`: the memory, time and disk that a recipe takes, before any GPU is used."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tinygptv_ds.config.load import add_recipe_arguments, load_recipe
from tinygptv_ds.config.paths import check_ending
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.sample_counts import local_sample_counts
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.estimate.communication import sent_in_a_step, step_volume
from tinygptv_ds.estimate.data_summary import ASSUMED_SAMPLE_BYTES, DataSummary, summarize_data
from tinygptv_ds.estimate.gpus import CARDS, LINKS, Card, Link, cards_named, links_named
from tinygptv_ds.estimate.memory import MicroBatchSize, fits, step_memory
from tinygptv_ds.estimate.model_size import (
    model_configuration,
    parameter_counts,
    parameter_shapes,
    phi_sizes,
    quantized_weights,
    trained_names,
    trained_parts,
)
from tinygptv_ds.estimate.plot import SIZES, write_plot
from tinygptv_ds.estimate.report import report
from tinygptv_ds.estimate.result import Disk, Estimate, Launches, Operations
from tinygptv_ds.estimate.speed import StepWork, card_speed
from tinygptv_ds.models.compiler import compile_obstacle
from tinygptv_ds.models.flops import flops_by_part
from tinygptv_ds.models.launches import LAUNCH_SECONDS, optimizer_kernels, pass_kernels
from tinygptv_ds.train.recipe_warnings import recipe_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `estimate`."""
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: %(default)s)")
    parser.add_argument(
        "--gpu",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"kinds of GPU: {', '.join(card.name for card in CARDS)}, or all (default)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of a card's peak that is reached where the GPU is busy (default: %(default)s)",
    )
    parser.add_argument(
        "--launch-us",
        type=float,
        default=1e6 * LAUNCH_SECONDS,
        metavar="N",
        help="microseconds of the host for each kernel that it launches (default: %(default)g)",
    )
    parser.add_argument(
        "--link",
        nargs="+",
        default=["all"],
        metavar="LINK",
        help=f"links between GPUs: {', '.join(link.name for link in LINKS)}, GB/s in each direction, or all (default)",
    )
    parser.add_argument("--node", type=int, default=8, metavar="N", help="GPUs of a node (default: %(default)s)")
    parser.add_argument("--tokens", type=float, metavar="N", help="tokens of a sample, its images' rows included")
    parser.add_argument("--targets", type=float, metavar="N", help="target tokens of a sample")
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.svg",
        help="write the memory by micro-batch size as a chart, next to that of the cards",
    )


def run(args: argparse.Namespace) -> None:
    """Carry out `estimate`."""
    if args.gpus < 1 or args.node < 1 or not 0 < args.mfu <= 1:
        raise ConfigError("--gpus and --node must be at least 1, and --mfu above 0 and at most 1")
    if not 0 <= args.launch_us < 1e6:
        raise ConfigError("--launch-us must be at least 0 and below a second")
    check_ending("--plot", args.plot, ".svg")
    recipe, cards, links = load_recipe(args.recipe, args.set), cards_named(args.gpu), links_named(args.link)
    data = _with_given_lengths(summarize_data(recipe), args)
    rates = {"mfu": args.mfu, "launch_seconds": args.launch_us / 1e6}
    result = estimate(recipe, cards, gpus=args.gpus, data=data, node=args.node, **rates)
    if args.plot is not None:
        write_plot(args.plot, result, cards)
    if args.json:
        print(json.dumps(as_plain(result, cards, links), indent=1))
    else:
        print(report(result, recipe, cards, links))
        for warning in recipe_warnings(recipe, local_sample_counts(recipe)):
            print(f"\nwarning: {warning}")


def estimate(
    recipe: Recipe,
    cards: list[Card],
    *,
    gpus: int,
    mfu: float,
    data: DataSummary,
    node: int = 8,
    launch_seconds: float = LAUNCH_SECONDS,
) -> Estimate:
    """Return the estimate of a recipe on `gpus` of each of these cards, `node` of them in a machine.

    Args:
        recipe: the recipe.
        cards: kinds of GPU.
        gpus: number of GPUs.
        mfu: share of a card's peak that is reached where the GPU is busy.
        data: the mean sample, and the datasets' sizes.
        node: GPUs of one node.
        launch_seconds: time of the host for each kernel.

    Raises:
        ConfigError: the batch does not divide among the GPUs, or Phi's config.json lacks its sizes.
    """
    train, every = recipe.train, int(recipe.model.gradient_checkpointing)
    accumulation = train.accumulation(gpus)
    phi, source = phi_sizes(recipe)
    config = model_configuration(recipe, phi)  # from here on torch is needed, and the recipe has no mistake
    shapes = parameter_shapes(config)
    trained, counts = trained_parts(recipe), parameter_counts(shapes)
    layers, features = config.text_config.num_hidden_layers, recipe.data.features is not None
    recomputed = -(-layers // every) / layers if every else 0.0
    names, sample = trained_names(shapes, trained), data.sample.counts
    flops = flops_by_part(config, names, from_features=features, recomputed=recomputed)
    operations = {part: Operations(of.forward.of(sample), of.backward.of(sample)) for part, of in flops.items()}
    samples = _micro_batch_samples(recipe, data)
    batch = MicroBatchSize(samples, data.sample, recomputed, features)
    flat = gpus == 1 and not train.deepspeed_checkpoints
    optimizer = optimizer_kernels(len(names), flat=flat)
    kernels = partial(pass_kernels, config, trained, from_features=features, recomputed=recomputed)
    launches = _launches(recipe, kernels, optimizer, launch_seconds, flat=flat)
    of_sample = sum(part.total for part in operations.values())
    work = StepWork(of_sample, train.batch_size, samples, gpus, mfu, launches, train.total_steps)
    volume_of = partial(step_volume, config, counts, trained, ranks=gpus, micro_batches=accumulation)
    volume = volume_of(recomputed=recomputed, from_features=features)
    model = recipe.model
    quantized = quantized_weights(shapes, model.frozen_bits, vision=model.quantize_vision, fp8=model.fp8)
    memory_of = partial(step_memory, config, counts, trained, gpus=gpus, quantized=quantized, flat=flat)
    memory = memory_of(batch)

    def has_room(card: Card, micro_batch: float) -> bool:
        return fits(memory_of(replace(batch, samples=micro_batch))["ZeRO-2"], card.gib)

    return Estimate(
        sizes_source=source,
        parameters=counts,
        trained=trained,
        quantized=quantized,
        data=data,
        micro_batch=samples,
        gpus=gpus,
        memory=memory,
        memory_by_size={size: memory_of(replace(batch, samples=size)) for size in SIZES},
        operations=operations,
        recomputed=recomputed,
        mfu=mfu,
        launches=launches,
        speed={card.name: card_speed(card, work, partial(has_room, card)) for card in cards},
        sent={name: sent for name, sent in sent_in_a_step(volume, node).items() if quantized is None or name in memory},
        disk=_disk(
            recipe,
            data,
            feature_bytes=config.num_query_tokens * config.qformer_config.hidden_size * 2,
            trainable=sum(counts[part] for part in trained),
        ),
    )


def _launches(
    recipe: Recipe, kernels: Callable[..., float], optimizer: float, seconds: float, *, flat: bool
) -> Launches:
    """Return the work of the host: `optimizer` kernels of a step, those of its passes, and the seconds of each."""
    compiled = _compiles(recipe, zero_stage=2)
    of_zero_3 = kernels(compiled=_compiles(recipe, zero_stage=3))
    features = recipe.data.features is not None
    return Launches(kernels(compiled=compiled, flat=flat), of_zero_3, optimizer, seconds, compiled, features)


def _compiles(recipe: Recipe, *, zero_stage: int) -> bool:
    """Return whether blocks are compiled on a GPU whose machine has a compiler."""
    return recipe.model.compile is not False and compile_obstacle(zero_stage, recipe.model.frozen_bits) is None


def as_plain(result: Estimate, cards: list[Card], links: list[Link]) -> dict[str, Any]:
    """Return the estimate as plain values, with the cards that it fits on and the seconds of a step's communication."""
    plain = asdict(result)
    for name, sent in result.sent.items():
        plain["sent"][name] |= {"across": sent.across, "seconds": {link.name: sent.seconds(link) for link in links}}
    for name, memory in result.memory.items():
        plain["memory"][name] |= {"total": memory.total, "fits": [c.name for c in cards if fits(memory, c.gib)]}
    return plain | {"sample_operations": result.sample_operations}


def _with_given_lengths(data: DataSummary, args: argparse.Namespace) -> DataSummary:
    """Return the data with the lengths that the command line gives."""
    given = {name: value for name in ("tokens", "targets") if (value := getattr(args, name)) is not None}
    if not given:
        return data
    sample = replace(data.sample, **given)
    if not 0 < sample.targets <= sample.tokens:
        raise ConfigError(
            f"--tokens {sample.tokens:g} and --targets {sample.targets:g}: targets are some of the tokens"
        )
    return replace(data, sample=sample, source=f"{' and '.join(given)} as given")


def _micro_batch_samples(recipe: Recipe, data: DataSummary) -> float:
    train = recipe.train
    if train.micro_batch_size is not None:
        return train.micro_batch_size
    assert train.max_tokens is not None  # a recipe has one of the two
    return train.max_tokens / data.sample.tokens


def _disk(recipe: Recipe, data: DataSummary, *, feature_bytes: int, trainable: int) -> Disk:
    train = recipe.train
    samples = train.total_steps * train.batch_size if data.samples is None else data.samples
    checkpoint = 12 * trainable
    return Disk(
        shards=samples * ASSUMED_SAMPLE_BYTES if data.shard_bytes is None else data.shard_bytes,
        shards_measured=data.shard_bytes is not None,
        features=samples * data.sample.images * feature_bytes,
        checkpoint=checkpoint,
        checkpoints=checkpoint * (train.keep_checkpoints + 1),
        model=4 * trainable * (1 if train.keep_best is None else 2),
    )
