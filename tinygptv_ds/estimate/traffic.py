"""What the ranks of a run send each other in an optimizer step, collective by collective. No torch.

Counted are the collectives that DeepSpeed 0.19 calls under ZeRO-1, 2 and 3, and this package's own; a test holds the
bytes of each to those that two real ranks call it with. The payload of a collective is its whole tensor, padding
included: what is reduced, or what is there once all have been gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from tinygptv_ds.data.shards.reader import REASONS
from tinygptv_ds.estimate.gathers import Limits, gathers
from tinygptv_ds.estimate.layers import Layer, Weight, weights_of, without_vision
from tinygptv_ds.models.parameters import always_fp32, decays

GRADIENTS, UPDATED, GATHERED, SMALL = "gradients", "updated weights", "gathered weights", "small"
_VOTES = 4  # of train/saver.py: two signals, the clock, a writer that has failed
_SUB_GROUP = 1_000_000_000  # elements of an optimizer group that ZeRO-3 steps at a time


@dataclass(frozen=True)
class Collective:
    """One kind of collective, all calls of a step together.

    Attributes:
        what: `GRADIENTS`, `UPDATED`, `GATHERED` or `SMALL`.
        kind: all_reduce, reduce_scatter or all_gather.
        payload: bytes.
        ranks: that take part.
    """

    what: str
    kind: str
    payload: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives, in a ring: payload x (ranks - 1) / ranks, all-reduces twice that.

        It is also what passes between two neighbouring nodes, however many ranks each of them has.
        """
        return self.payload * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed JSON decides about traffic; the defaults are those of `ds_configs/` in bf16 and fp16.

    Attributes:
        stage: 1, 2 or 3.
        frozen_bytes: of an element that is not trained (unless it always lies in fp32).
        trained_bytes: of one that is, and of its gradient.
        limits: of ZeRO-3.
        node: `zero_hpz_partition_size`: ranks that keep a copy of all weights among them; 1: without.
        offloaded: the optimizer works in CPU memory.
    """

    stage: int
    frozen_bytes: int = 2
    trained_bytes: int = 4
    limits: Limits = field(default_factory=Limits)
    node: int = 1
    offloaded: bool = False

    def bytes_of(self, weight: Weight, learns: Collection[str]) -> int:
        """Of one element."""
        if weight.part in learns or always_fp32(weight.name):
            return self.trained_bytes
        return self.frozen_bytes


@dataclass(frozen=True)
class Step:
    """What of a run decides about the traffic of a step.

    Attributes:
        root: the model.
        learns: parts that are trained.
        ranks: over all nodes.
        micro_batches: of each rank.
        checkpoint_every: `model.gradient_checkpointing` as a number.
        from_features: ViT and Q-Former do not run.
        datasets: of the recipe.
        log_every: steps between log lines.
        step_mean: the loss divides by the target tokens of all ranks.
        lr_scale: `optimizer.lr_scale`, which parts the optimizer's groups.
    """

    root: Layer
    learns: Collection[str]
    ranks: int
    micro_batches: int = 1
    checkpoint_every: int = 0
    from_features: bool = False
    datasets: int = 1
    log_every: int = 10
    step_mean: bool = True
    lr_scale: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> list[Weight]:
        """What learns."""
        return [weight for weight in weights_of(self.root) if weight.part in self.learns]

    def groups(self) -> list[int]:
        """Elements of each of the optimizer's groups."""
        sizes: dict[tuple[float, bool], int] = {}
        for weight in self.trained:
            key = (self.lr_scale.get(weight.part, 1.0), decays(weight.name, weight.dimensions))
            sizes[key] = sizes.get(key, 0) + weight.numel
        return list(sizes.values())


def step_traffic(step: Step, zero: Zero) -> list[Collective]:
    """The collectives of one optimizer step. One rank alone calls none of them, and `sent` is 0."""
    engine = _zero_3(step, zero) if zero.stage == 3 else _zero_1_or_2(step, zero)
    return [*engine, *_own(step)]


def checkpoint_traffic(step: Step, zero: Zero) -> Collective:
    """What a checkpoint brings together: weights and two moments of what learns, in fp32."""
    if zero.stage == 3:
        return Collective("checkpoint", "all_gather", 3 * 4 * _padded(step.trained, step.ranks), step.ranks)
    return Collective("checkpoint", "all_reduce", 3 * 4 * sum(step.groups()), step.ranks)


def moved_over_pcie(collectives: list[Collective]) -> float:
    """Bytes between a rank's GPU and CPU memory in a step where both hold its shares: weights in, gradients out."""
    return sum(each.payload / each.ranks for each in collectives if each.what != SMALL)


def _zero_1_or_2(step: Step, zero: Zero) -> Iterator[Collective]:
    """Both all-reduce whole gradients (ZeRO-2 keeps a share of the sum) and gather the updated weights."""
    size = zero.trained_bytes
    reductions = step.micro_batches if zero.stage == 2 else 1
    groups = step.groups()
    yield Collective(GRADIENTS, "all_reduce", reductions * sum(groups) * size, step.ranks)
    aligned = 2 * step.ranks
    updated = sum(-(-elements // aligned) * aligned for elements in groups)
    yield Collective(UPDATED, "all_gather", updated * size, step.ranks)
    yield Collective(SMALL, "all_reduce", 4 * len(groups), step.ranks)  # their norms


def _zero_3(step: Step, zero: Zero) -> Iterator[Collective]:
    """Gradients are reduced and scattered after each micro-batch, weights gathered where they are used."""
    reduced = step.micro_batches * _padded(step.trained, step.ranks) * zero.trained_bytes
    yield Collective(GRADIENTS, "reduce_scatter", reduced, step.ranks)
    everything = weights_of(step.root)
    kept = [weight for weight in everything if weight.numel <= zero.limits.persistence]
    kept_bytes = sum(_gathered_bytes(step, zero, weight) for weight in kept)
    yield Collective(UPDATED, "all_gather", kept_bytes, step.ranks)  # those that stay whole, frozen or not
    root = without_vision(step.root) if step.from_features else step.root
    times = gathers(root, step.learns, zero.limits, step.checkpoint_every)
    by_ranks = {step.ranks: 0, zero.node: 0}
    for weight in everything:
        often, size = step.micro_batches * times[weight.name], _gathered_bytes(step, zero, weight)
        # With copies in each node, a weight crosses once after it has changed, and a frozen one never again.
        across = often if zero.node == 1 else min(often, int(weight.part in step.learns))
        by_ranks[step.ranks] += across * size
        by_ranks[zero.node] += (often - across) * size
    for ranks, payload in by_ranks.items():
        if payload:
            yield Collective(GATHERED, "all_gather", payload, ranks)
    sub_groups = sum(-(-elements // _SUB_GROUP) for elements in step.groups())
    yield Collective(SMALL, "all_reduce", (4 if zero.offloaded else 8) * sub_groups, step.ranks)  # their norms


def _own(step: Step) -> Iterator[Collective]:
    """Votes to stop or save, the loss's divisor, and the sums of a log line, spread over its steps."""
    line = 2 * step.datasets + 2 * step.log_every + step.datasets + len(REASONS) + 4 + 2 * step.ranks
    payload = 4 * _VOTES + 4 * step.step_mean + 8 * line // step.log_every
    yield Collective(SMALL, "all_reduce", payload, step.ranks)


def _padded(weights: list[Weight], ranks: int) -> int:
    return sum(-(-weight.numel // ranks) * ranks for weight in weights)


def _gathered_bytes(step: Step, zero: Zero, weight: Weight) -> int:
    return _padded([weight], step.ranks) * zero.bytes_of(weight, step.learns)
