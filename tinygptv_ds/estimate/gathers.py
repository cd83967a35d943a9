"""Which weights ZeRO-3 gathers in one forward and backward pass, and how often. No torch.

This follows DeepSpeed 0.19 (`runtime/zero/partitioned_param_coordinator.py`), which gathers a module's weights before
the module runs, forward and backward, and lets them go after it, unless they come again soon; small ones it never
lets go. A test holds the outcome to the bytes that two real ranks gather.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tinygptv_ds.estimate.layers import Layer, Weight

_ORDER = {"vit": 0, "qformer": 1, "projections": 2, "llm": 3, "norms": 3, "lora": 3}


@dataclass(frozen=True)
class Limits:
    """Numbers of elements that decide about gathering; the defaults are those of `ds_configs/zero3_bf16.json`.

    Attributes:
        persistence: weights of up to so many stay whole everywhere (`stage3_param_persistence_threshold`).
        reuse: a weight that comes again within so many is not let go (`stage3_max_reuse_distance`).
        prefetch: gathered ahead (`stage3_prefetch_bucket_size`).
        live: whole at a time at most, as far as prefetching goes (`stage3_max_live_parameters`).
    """

    persistence: int = 100_000
    reuse: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 500_000_000


def gathers(root: Layer, learns: Collection[str], limits: Limits, checkpoint_every: int = 0) -> Counter[str]:
    """How often each weight is gathered in a micro-batch, by name; what stays whole is not among them.

    Args:
        root: what runs.
        learns: parts that are trained.
        limits: see `Limits`.
        checkpoint_every: `model.gradient_checkpointing`: every how many blocks of Phi one is recomputed; 0: none.
    """
    visits = list(_visits(root, frozenset(learns), checkpoint_every))
    return _Coordinator(visits, frozenset(learns), limits).run()


@dataclass(frozen=True)
class _Visit:
    """A module's turn. The last `leaves` of the turns not yet over end after it, the latest first."""

    weights: tuple[Weight, ...]
    leaves: int = 1
    recomputed: bool = False
    forgets: bool = False  # a checkpoint's recomputation has ended: its frozen weights go


def _visits(root: Layer, learns: frozenset[str], every: int) -> Iterator[_Visit]:
    yield from _forward(root)
    first = min(_ORDER[part] for part in learns)
    yield _Visit(root.weights, 0)  # for each of its two outputs
    yield _Visit(root.weights, 0)
    for layer in reversed(root.inner):
        if not _has_gradient(layer, learns, first):
            continue
        if every and layer.block is not None and layer.block % every == 0:
            again = [visit for inner in layer.inner for visit in _forward(inner, recomputed=True)]
            yield from again[:-1]
            yield _Visit(again[-1].weights, again[-1].leaves, recomputed=True, forgets=True)
        yield from _backward(layer)


def _has_gradient(layer: Layer, learns: frozenset[str], first: int) -> bool:
    """Whether something that learns lies in or before a layer, so that its backward pass runs."""
    if layer.name == "language_model.model.embed_tokens":  # before it are numbers of tokens
        return "llm" in learns
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
    """The state of one micro-batch; names as in DeepSpeed's class."""

    def __init__(self, visits: list[_Visit], learns: frozenset[str], limits: Limits) -> None:
        self._visits, self._learns, self._limits = visits, learns, limits
        self._queue = deque((w, step) for step, visit in enumerate(visits) for w in visit.weights)
        self._fetched_for: dict[str, int] = {}
        self._whole: set[str] = set()
        self._users: Counter[str] = Counter()
        self._whole_elements = 0
        self.count: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        """Go through all visits."""
        turns: list[_Visit] = []
        held: list[Weight] = []
        for step, visit in enumerate(self._visits):
            self._fetch(visit, step)
            turns.append(visit)
            if visit.recomputed:
                held += [weight for weight in visit.weights if weight.part not in self._learns]
                self._users.update(weight.name for weight in visit.weights if weight.part not in self._learns)
            for _ in range(visit.leaves):
                self._leave(turns.pop(), step + 1)
            if visit.forgets:
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
