"""Exact counts of the bytes that ranks send each other in an optimizer step, collective by collective.

Counted are the collectives that DeepSpeed 0.19 calls under ZeRO-1, 2 and 3, and the package's own; a test compares the
bytes of each with those that two real ranks call it with. The payload of a collective is its whole tensor, padding
included: the one that is reduced, or the one that results from a gather. The closed formulas that these counts confirm
are in `tinygptv_ds/estimate/communication.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.model_layers import Layer, Weight, model_layers, weights_of, without_vision
from benchmarks.zero3_gathers import Limits, count_gathers
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.shards.records import REASONS
from tinygptv_ds.estimate.model_size import trained_parts
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import always_fp32, decays, needs_images

GRADIENTS, UPDATED, GATHERED, SMALL = "gradients", "updated weights", "gathered weights", "small"
_VOTES = 5  # of train/callbacks/checkpoints.py: three signals, the clock, a writer that has failed
_SUB_GROUP = 1_000_000_000  # elements of an optimizer group that ZeRO-3 steps at a time


@dataclass(frozen=True)
class Collective:
    """All calls of one kind of collective in a step.

    Attributes:
        what: `GRADIENTS`, `UPDATED`, `GATHERED` or `SMALL`.
        kind: all_reduce, reduce_scatter or all_gather.
        payload: bytes of the whole tensors.
        ranks: number of ranks that take part.
    """

    what: str
    kind: str
    payload: int
    ranks: int

    @property
    def sent(self) -> float:
        """Return the bytes that each rank sends in a ring: payload x (ranks - 1) / ranks, twice that in an all-reduce.

        It is also what passes between two neighbouring nodes, however many ranks each of them has.
        """
        return self.payload * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed JSON that decide about traffic; the defaults are those of `ds_configs/`.

    Attributes:
        stage: 1, 2 or 3.
        frozen_bytes: bytes of a frozen element (unless it is always in fp32).
        trained_bytes: bytes of a trained element, and of its gradient.
        limits: ZeRO-3's limits.
        node: `zero_hpz_partition_size`: ranks that keep a copy of all weights among them; 1: without.
        offloaded: whether the optimizer works in CPU memory.
    """

    stage: int
    frozen_bytes: int = 2
    trained_bytes: int = 4
    limits: Limits = field(default_factory=Limits)
    node: int = 1
    offloaded: bool = False

    def bytes_of(self, weight: Weight, trained: Collection[str]) -> int:
        """Return the bytes of one element."""
        if weight.part in trained or always_fp32(weight.name):
            return self.trained_bytes
        return self.frozen_bytes


@dataclass(frozen=True)
class Step:
    """The settings of a run that decide about the traffic of a step.

    Attributes:
        root: the model.
        parts: trained parts.
        ranks: number of all ranks.
        micro_batches: micro-batches of each rank.
        checkpoint_every: `model.gradient_checkpointing` as a number.
        from_features: ViT and Q-Former do not run.
        datasets: number of datasets in the recipe.
        log_every: steps between log lines.
        lr_scale: `optimizer.lr_scale`, which divides the optimizer's groups.
    """

    root: Layer
    parts: Collection[str]
    ranks: int
    micro_batches: int = 1
    checkpoint_every: int = 0
    from_features: bool = False
    datasets: int = 1
    log_every: int = 10
    lr_scale: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> list[Weight]:
        """Return the trained weights."""
        return [weight for weight in weights_of(self.root) if weight.part in self.parts]

    def groups(self) -> list[int]:
        """Return the number of elements of each of the optimizer's groups."""
        sizes: dict[tuple[bool, float, bool], int] = {}
        for weight in self.trained:
            scale = self.lr_scale.get(weight.part, 1.0)
            key = (needs_images(weight.name), scale, decays(weight.name, weight.dimensions))
            sizes[key] = sizes.get(key, 0) + weight.numel
        return list(sizes.values())


# ds_configs/zero3_offload.json leaves these two limits to DeepSpeed's defaults.
OFFLOAD = Zero(3, limits=Limits(reuse=10**9, live=10**9), offloaded=True)


def step_of(recipe: Recipe, config: TinyGPTVConfig, ranks: int) -> Step:
    """Return the settings of a recipe that decide about the traffic of a step.

    Raises:
        ConfigError: the batch does not divide among the ranks.
    """
    return Step(
        model_layers(config),
        trained_parts(recipe),
        ranks,
        recipe.train.accumulation(ranks),
        int(recipe.model.gradient_checkpointing),
        recipe.data.features is not None,
        len(recipe.data.used),
        recipe.train.log_every,
        recipe.optimizer.lr_scale,
    )


def step_traffic(step: Step, zero: Zero) -> list[Collective]:
    """Return the collectives of one optimizer step. A single rank calls none of them, and `sent` is 0."""
    engine = _zero_3(step, zero) if zero.stage == 3 else _zero_1_or_2(step, zero)
    return [*engine, *_own(step)]


def checkpoint_traffic(step: Step, zero: Zero) -> Collective:
    """Return the collective of a checkpoint: trained weights and their two moments in fp32."""
    if zero.stage == 3:
        return Collective("checkpoint", "all_gather", 3 * 4 * _padded(step.trained, step.ranks), step.ranks)
    return Collective("checkpoint", "all_reduce", 3 * 4 * sum(step.groups()), step.ranks)


def moved_over_pcie(collectives: list[Collective]) -> float:
    """Return the bytes between a rank's GPU and CPU memory in a step under CPU offload: weights in, gradients out."""
    return sum(each.payload / each.ranks for each in collectives if each.what != SMALL)


def _zero_1_or_2(step: Step, zero: Zero) -> Iterator[Collective]:
    """Yield whole gradients, which both sum (ZeRO-2 keeps a share of the sum), and the updated weights."""
    size = zero.trained_bytes
    reductions = step.micro_batches if zero.stage == 2 else 1
    groups = step.groups()
    yield Collective(GRADIENTS, "all_reduce", reductions * sum(groups) * size, step.ranks)
    aligned = 2 * step.ranks
    updated = sum(-(-elements // aligned) * aligned for elements in groups)
    yield Collective(UPDATED, "all_gather", updated * size, step.ranks)
    yield Collective(SMALL, "all_reduce", 4 * len(groups), step.ranks)  # the gradients' norms


def _zero_3(step: Step, zero: Zero) -> Iterator[Collective]:
    """Yield gradients, reduced and scattered after each micro-batch, and weights, gathered where they are used."""
    reduced = step.micro_batches * _padded(step.trained, step.ranks) * zero.trained_bytes
    yield Collective(GRADIENTS, "reduce_scatter", reduced, step.ranks)
    everything = weights_of(step.root)
    kept = [weight for weight in everything if weight.numel <= zero.limits.persistence]
    kept_bytes = sum(_gathered_bytes(step, zero, weight) for weight in kept)
    yield Collective(UPDATED, "all_gather", kept_bytes, step.ranks)  # weights that stay whole, frozen or not
    root = without_vision(step.root) if step.from_features else step.root
    times = count_gathers(root, step.parts, zero.limits, step.checkpoint_every)
    by_ranks = {step.ranks: 0, zero.node: 0}
    for weight in everything:
        count, size = step.micro_batches * times[weight.name], _gathered_bytes(step, zero, weight)
        # With copies in each node, a weight crosses once after it has changed, and a frozen one never again.
        across = count if zero.node == 1 else min(count, int(weight.part in step.parts))
        by_ranks[step.ranks] += across * size
        by_ranks[zero.node] += (count - across) * size
    for ranks, payload in by_ranks.items():
        if payload:
            yield Collective(GATHERED, "all_gather", payload, ranks)
    sub_groups = sum(-(-elements // _SUB_GROUP) for elements in step.groups())
    yield Collective(SMALL, "all_reduce", (4 if zero.offloaded else 8) * sub_groups, step.ranks)  # the gradients' norms


def _own(step: Step) -> Iterator[Collective]:
    """Yield votes to stop or save, a step's targets and images, and the sums of a log line, spread over its steps."""
    line = 2 * step.datasets + 2 * step.log_every + 2 * step.datasets + len(REASONS) + 4 + 2 * step.ranks
    payload = 4 * _VOTES + 4 * 2 + 8 * line // step.log_every
    yield Collective(SMALL, "all_reduce", payload, step.ranks)


def _padded(weights: list[Weight], ranks: int) -> int:
    return sum(-(-weight.numel // ranks) * ranks for weight in weights)


def _gathered_bytes(step: Step, zero: Zero, weight: Weight) -> int:
    return _padded([weight], step.ranks) * zero.bytes_of(weight, step.parts)
