"""The command ``estimate``: what a recipe takes in memory, time and disk, before any GPU is touched. No torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from tinygptv_ds.config.load import add_recipe_arguments, load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.estimate.costs import Operations, sample_operations
from tinygptv_ds.estimate.estimate_report import report
from tinygptv_ds.estimate.gpus import CARDS, LINKS, Card, Link, cards_named, links_named
from tinygptv_ds.estimate.layers import parameters
from tinygptv_ds.estimate.memory import Memory, MicroBatch, fits, step_memory
from tinygptv_ds.estimate.sample_mean import ASSUMED_SAMPLE_BYTES, DataFacts, data_facts
from tinygptv_ds.estimate.scaling import Sent, sent_in_a_step
from tinygptv_ds.estimate.sizes import Sizes, sizes_of, trained_parts


@dataclass(frozen=True)
class Speed:
    """What a card makes of the operations at the stated share of its peak, were nothing sent.

    Attributes:
        samples_per_second: of all GPUs together.
        hours: of the run.
        step_seconds: of one optimizer step.
    """

    samples_per_second: float
    hours: float
    step_seconds: float


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        shards: of all datasets, or of the samples of the run at an assumed size.
        shards_measured: which of the two.
        features: of as many images, in bf16.
        checkpoint: one; weights and two moments in fp32.
        checkpoints: those that are kept, and the one being written.
        model: the result.
    """

    shards: float
    shards_measured: bool
    features: float
    checkpoint: float
    checkpoints: float
    model: float


@dataclass(frozen=True)
class Estimate:
    """All of it.

    Attributes:
        sizes: of the model.
        sizes_source: where they are from, in words.
        parameters: by part.
        trained: parts that learn.
        data: the mean sample.
        micro_batch: samples of one forward pass on one GPU.
        gpus: how many.
        memory: of one GPU, by ZeRO setting.
        operations: of one sample, by part.
        recomputed: share of Phi's blocks that run forward twice.
        mfu: share of the cards' peak that is reached.
        speed: by card.
        sent: by each GPU in a step, by ZeRO setting.
        disk: what is stored.
    """

    sizes: Sizes
    sizes_source: str
    parameters: dict[str, int]
    trained: tuple[str, ...]
    data: DataFacts
    micro_batch: float
    gpus: int
    memory: dict[str, Memory]
    operations: dict[str, Operations]
    recomputed: float
    mfu: float
    speed: dict[str, Speed]
    sent: dict[str, Sent]
    disk: Disk

    @property
    def sample_operations(self) -> float:
        """Floating-point operations of one sample."""
        return sum(part.total for part in self.operations.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``estimate``."""
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--gpu",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"which: {', '.join(card.name for card in CARDS)}, or all (default)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of a card's peak that is reached (default: %(default)s)",
    )
    parser.add_argument(
        "--link",
        nargs="+",
        default=["all"],
        metavar="LINK",
        help=f"between the GPUs: {', '.join(link.name for link in LINKS)}, GB/s to each side, or all (default)",
    )
    parser.add_argument("--node", type=int, default=8, metavar="N", help="GPUs of a node (default: %(default)s)")
    parser.add_argument("--tokens", type=float, metavar="N", help="tokens of a sample, its images' rows included")
    parser.add_argument("--targets", type=float, metavar="N", help="of them, those that are learnt")
    parser.add_argument("--json", action="store_true", help="print it for machines")


def run(args: argparse.Namespace) -> None:
    """Carry out ``estimate``."""
    if args.gpus < 1 or args.node < 1 or not 0 < args.mfu <= 1:
        raise ConfigError("--gpus and --node must be at least 1, and --mfu lie above 0 and be at most 1")
    recipe, cards, links = load_recipe(args.recipe, args.set), cards_named(args.gpu), links_named(args.link)
    data = _asked(data_facts(recipe), args)
    found = estimate(recipe, cards, gpus=args.gpus, mfu=args.mfu, data=data, node=args.node)
    if args.json:
        print(json.dumps(as_plain(found, cards, links), indent=1))
    else:
        print(report(found, recipe, cards, links))


def estimate(recipe: Recipe, cards: list[Card], *, gpus: int, mfu: float, data: DataFacts, node: int = 8) -> Estimate:
    """Everything about a recipe on `gpus` of each of these cards, `node` of them in a machine.

    Raises:
        ConfigError: the batch does not divide among the GPUs.
    """
    sizes, source = sizes_of(recipe)
    trained, counts = trained_parts(recipe), parameters(sizes)
    train, every = recipe.train, int(recipe.model.gradient_checkpointing)
    train.accumulation(gpus)
    recomputed = -(-sizes.phi.layers // every) / sizes.phi.layers if every else 0.0
    features = recipe.data.features is not None
    samples = train.micro_batch_size or train.max_tokens / data.sample.tokens
    operations = sample_operations(sizes, data.sample, trained, recomputed=recomputed, from_features=features)
    batch = MicroBatch(samples, data.sample, recomputed, features)
    return Estimate(
        sizes=sizes,
        sizes_source=source,
        parameters=counts,
        trained=trained,
        data=data,
        micro_batch=samples,
        gpus=gpus,
        memory=step_memory(sizes, trained, batch, gpus),
        operations=operations,
        recomputed=recomputed,
        mfu=mfu,
        speed={card.name: _speed(card, operations, recipe, gpus * mfu) for card in cards},
        sent=sent_in_a_step(recipe, sizes, gpus, node),
        disk=_disk(recipe, sizes, data, sum(counts[part] for part in trained)),
    )


def as_plain(found: Estimate, cards: list[Card], links: list[Link]) -> dict[str, Any]:
    """The estimate as plain values, with what fits on which card, and the seconds that a step's traffic takes."""
    plain = asdict(found)
    for name, sent in found.sent.items():
        plain["sent"][name] |= {"across": sent.across, "seconds": {link.name: sent.seconds(link) for link in links}}
    for name, memory in found.memory.items():
        plain["memory"][name] |= {"total": memory.total, "fits": [c.name for c in cards if fits(memory, c.gib)]}
    return plain | {"sample_operations": found.sample_operations}


def _asked(data: DataFacts, args: argparse.Namespace) -> DataFacts:
    """The data with the lengths that the command line gives."""
    given = {name: value for name in ("tokens", "targets") if (value := getattr(args, name)) is not None}
    if not given:
        return data
    sample = replace(data.sample, **given)
    if not 0 < sample.targets <= sample.tokens:
        raise ConfigError(
            f"--tokens {sample.tokens:g} and --targets {sample.targets:g}: targets are some of the tokens"
        )
    return replace(data, sample=sample, source=f"{' and '.join(given)} as given")


def _speed(card: Card, operations: dict[str, Operations], recipe: Recipe, effective_gpus: float) -> Speed:
    per_second = card.teraflops * 1e12 * effective_gpus / sum(part.total for part in operations.values())
    step_seconds = recipe.train.batch_size / per_second
    return Speed(per_second, recipe.train.total_steps * step_seconds / 3600, step_seconds)


def _disk(recipe: Recipe, sizes: Sizes, data: DataFacts, learning: int) -> Disk:
    train = recipe.train
    drawn = train.total_steps * train.batch_size
    samples = drawn if data.samples is None else data.samples
    one = 12 * learning
    return Disk(
        shards=samples * ASSUMED_SAMPLE_BYTES if data.shard_bytes is None else data.shard_bytes,
        shards_measured=data.shard_bytes is not None,
        features=samples * data.sample.images * sizes.queries * sizes.qformer.width * 2,
        checkpoint=one,
        checkpoints=one * (train.keep_checkpoints + 1),
        model=4 * learning,
    )
