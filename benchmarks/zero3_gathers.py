"""Simulation of ZeRO-3's gathers: which weights a forward and a backward pass gather, and how often.

This follows DeepSpeed 0.19 (`runtime/zero/partitioned_param_coordinator.py`), which gathers a module's weights before
the module runs, forward and backward, and releases them after it unless they are used again soon; small ones are never
released. A test compares the outcome with the bytes that two real ranks gather.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from benchmarks.model_layers import Layer, Weight

_ORDER = {"vit": 0, "qformer": 1, "projections": 2, "llm": 3, "norms": 3, "lora": 3}


@dataclass(frozen=True)
class Limits:
    """ZeRO-3's limits in numbers of elements; the defaults are those of `ds_configs/zero3_bf16.json`.

    Attributes:
        persistence: weights of up to so many elements stay whole on every rank (`stage3_param_persistence_threshold`).
        reuse: a weight that is used again within so many elements is not released (`stage3_max_reuse_distance`).
        prefetch: elements gathered ahead (`stage3_prefetch_bucket_size`).
        live: elements that prefetching makes whole at a time at most (`stage3_max_live_parameters`).
    """

    persistence: int = 100_000
    reuse: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 500_000_000


def count_gathers(root: Layer, trained: Collection[str], limits: Limits, checkpoint_every: int = 0) -> Counter[str]:
    """Return how often each weight is gathered in a micro-batch, by name; weights that stay whole are left out.

    Args:
        root: the modules that run.
        trained: trained parts.
        limits: ZeRO-3's limits.
        checkpoint_every: `model.gradient_checkpointing`: one in so many blocks of Phi is recomputed; 0: none.
    """
    visits = list(_visits(root, frozenset(trained), checkpoint_every))
    return _Coordinator(visits, frozenset(trained), limits).run()


@dataclass(frozen=True)
class _Visit:
    """A module's turn. The last `leaves` of the turns that have not ended end after it, the latest first."""

    weights: tuple[Weight, ...]
    leaves: int = 1
    recomputed: bool = False
    ends_recomputation: bool = False  # the frozen weights that a checkpoint used are released


def _visits(root: Layer, trained: frozenset[str], every: int) -> Iterator[_Visit]:
    yield from _forward(root)
    first = min(_ORDER[part] for part in trained)
    yield _Visit(root.weights, 0)  # for each of its two outputs
    yield _Visit(root.weights, 0)
    for layer in reversed(root.inner):
        if not _has_gradient(layer, trained, first):
            continue
        if every and layer.block is not None and layer.block % every == 0:
            again = [visit for inner in layer.inner for visit in _forward(inner, recomputed=True)]
            yield from again[:-1]
            yield _Visit(again[-1].weights, again[-1].leaves, recomputed=True, ends_recomputation=True)
        yield from _backward(layer)


def _has_gradient(layer: Layer, trained: frozenset[str], first: int) -> bool:
    """Return whether a trained weight is in or before a layer, so that its backward pass runs."""
    if layer.name == "language_model.model.embed_tokens":  # its input are token ids
        return "llm" in trained
    return any(_ORDER[weight.part] >= first for weight in layer.every_weight())


def _forward(layer: Layer, leaves: int = 1, *, recomputed: bool = False) -> Iterator[_Visit]:
    yield _Visit(layer.weights, 0 if layer.inner else leaves, recomputed)
    for number, inner in enumerate(layer.inner, start=1):
        yield from _forward(inner, 1 + (leaves if number == len(layer.inner) else 0), recomputed=recomputed)


def _backward(layer: Layer, leaves: int = 1) -> Iterator[_Visit]:
    yield _Visit(layer.weights, 0 if layer.inner else leaves)
    for number, inner in enumerate(reversed(layer.inner), start=1):
        yield from _backward(inner, 1 + (leaves if number == len(layer.inner) else 0))


class _Coordinator:
    """The state of DeepSpeed's coordinator in one micro-batch; names are those of its class."""

    def __init__(self, visits: list[_Visit], trained: frozenset[str], limits: Limits) -> None:
        self._visits, self._trained, self._limits = visits, trained, limits
        self._queue = deque((w, step) for step, visit in enumerate(visits) for w in visit.weights)
        self._fetched_for: dict[str, int] = {}
        self._whole: set[str] = set()
        self._users: Counter[str] = Counter()
        self._whole_elements = 0
        self.count: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        """Go through all visits and return the number of gathers by weight."""
        turns: list[_Visit] = []
        held: list[Weight] = []
        for step, visit in enumerate(self._visits):
            self._fetch(visit, step)
            turns.append(visit)
            if visit.recomputed:
                held += [weight for weight in visit.weights if weight.part not in self._trained]
                self._users.update(weight.name for weight in visit.weights if weight.part not in self._trained)
            for _ in range(visit.leaves):
                self._leave(turns.pop(), step + 1)
            if visit.ends_recomputation:
                self._users.subtract(weight.name for weight in held)
                self._release(held)
                held = []
        return self.count

    def _persists(self, weight: Weight) -> bool:
        return weight.numel <= self._limits.persistence

    def _gather(self, weights: list[Weight]) -> None:
        for weight in weights:
            self._whole.add(weight.name)
            self._whole_elements += weight.numel
            self.count[weight.name] += 1

    def _missing(self, weight: Weight) -> bool:
        return weight.name not in self._whole and not self._persists(weight)

    def _fetch(self, visit: _Visit, step: int) -> None:
        self._gather([weight for weight in visit.weights if self._missing(weight)])
        self._users.update(weight.name for weight in visit.weights)
        waiting = {weight.name for weight in visit.weights if self._fetched_for.get(weight.name, -1) < step}
        popped: set[str] = set()
        while self._queue and len(popped) < len(waiting):
            weight, used_at = self._queue.popleft()
            self._fetched_for[weight.name] = used_at
            popped.add(weight.name)
        self._prefetch()

    def _prefetch(self) -> None:
        most = min(self._limits.live - self._whole_elements, self._limits.prefetch)
        ahead: dict[str, Weight] = {}
        elements = 0
        while self._queue and elements < most:
            weight, used_at = self._queue.popleft()
            self._fetched_for[weight.name] = max(self._fetched_for.get(weight.name, -1), used_at)
            if self._missing(weight) and weight.name not in ahead:
                ahead[weight.name] = weight
                elements += weight.numel
        self._gather(list(ahead.values()))

    def _leave(self, visit: _Visit, step: int) -> None:
        self._users.subtract(weight.name for weight in visit.weights)
        leaving = {w.name: w for w in visit.weights if self._fetched_for.get(w.name, -1) <= step}
        passed = 0
        for later in self._visits[step:]:
            if passed >= self._limits.reuse or not leaving:
                break
            for weight in later.weights:
                leaving.pop(weight.name, None)
                passed += weight.numel
        self._release(list(leaving.values()))

    def _release(self, weights: list[Weight]) -> None:
        for weight in weights:
            if weight.name in self._whole and self._users[weight.name] <= 0:
                self._whole.remove(weight.name)
                self._whole_elements -= weight.numel
