"""Kernels and bytes of a step, uncompiled and with compiled blocks.

Uncompiled, every operation is a kernel of its own, apart from those of dropout, which is compiled on every GPU. With
compiled blocks (the model's `_no_split_modules`: blocks of Phi, the ViT and the Q-Former), what a compiler makes of the
forward and of the backward pass of a block is estimated by one rule:

- Matrix products, attention, and writes to indexed places stay kernels of their own.
- Each of the other operations is done as late as its results are needed. Then those become one kernel that take results
  of each other and come after the same number of matrix products and attentions. Constants need no kernel; the weight
  gradient of a norm, which is a sum over rows, needs one more. A tensor is cast once.
- Such a kernel reads each tensor from outside once, and writes each tensor that is read outside once.

The rule is careful in one respect: what the forward pass of a block keeps for its backward pass is written and read,
even where a compiler would rather compute it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.operations.record import Access, Operation

_SCATTERS = {"index_put", "index_add", "index_copy", "masked_scatter", "embedding_dense_backward"}
_CONSTANTS = {"full", "scalar_tensor"}
_SUMS_OVER_ROWS = {"native_layer_norm_backward", "_fused_rms_norm_backward"}

Region = Callable[[Operation], int | None]


@dataclass(frozen=True)
class Kernels:
    """Kernels, with the bytes that they read and write and their floating-point operations."""

    kernels: int = 0
    bytes: int = 0
    flops: float = 0.0

    def __add__(self, other: Kernels) -> Kernels:
        """Return both together."""
        return Kernels(self.kernels + other.kernels, self.bytes + other.bytes, self.flops + other.flops)


def uncompiled(operations: Sequence[Operation]) -> dict[str, Kernels]:
    """Return the kernels of each part; only functions that are compiled on every GPU are fused."""
    return _by_part(operations, lambda operation: operation.inner)


def compiled(operations: Sequence[Operation]) -> dict[str, Kernels]:
    """Return the kernels of each part with compiled blocks."""
    return _by_part(operations, lambda operation: operation.inner if operation.block is None else operation.block)


def _by_part(operations: Sequence[Operation], region: Region) -> dict[str, Kernels]:
    readers: dict[int, set[int]] = defaultdict(set)
    members: dict[int | None, list[int]] = defaultdict(list)
    for number, operation in enumerate(operations):
        members[region(operation)].append(number)
        for access in operation.reads:
            readers[access.memory].add(number)
    found: dict[str, Kernels] = defaultdict(Kernels)
    for number in members.pop(None, []):
        operation = operations[number]
        found[operation.part] += Kernels(1, operation.bytes, operation.flops)
    for numbers in members.values():
        for group in _fused(operations, _without_repeated_casts(operations, numbers)):
            found[operations[group[0]].part] += _kernel(operations, group, readers)
    return dict(found)


def _fused(operations: Sequence[Operation], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of the operations of each kernel of a region, by the rule of this module's docstring."""
    sources = _sources(operations, numbers)
    alone = {number for number in numbers if _stays_alone(operations[number])}
    level: dict[int, int] = {}  # products and attentions before an operation
    for number in numbers:
        level[number] = max((level[each] + (each in alone) for each in sources[number]), default=0)
    needed: dict[int, int] = {}
    for number in reversed(numbers):
        if number not in alone:
            level[number] = needed.get(number, level[number])
        for each in sources[number]:
            needed[each] = min(needed.get(each, level[number]), level[number])
    leader = {number: number for number in numbers}

    def group_of(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    for number in numbers:
        for each in sources[number]:
            if level[each] == level[number] and number not in alone and each not in alone:
                leader[group_of(number)] = group_of(each)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        groups[group_of(number)].append(number)
    yield from groups.values()


def _without_repeated_casts(operations: Sequence[Operation], numbers: Sequence[int]) -> list[int]:
    """Leave out casts of a tensor that has been cast before, e.g., by autocast for queries, keys and values."""
    seen: set[tuple[Access, int]] = set()
    kept = []
    for number in numbers:
        operation = operations[number]
        cast = (operation.reads[0], operation.writes[0].bytes) if operation.name == "_to_copy" else None
        if cast not in seen:
            kept.append(number)
        if cast is not None:
            seen.add(cast)
    return kept


def _sources(operations: Sequence[Operation], numbers: Sequence[int]) -> dict[int, set[int]]:
    """Return, for each operation of a region, those of the region whose results it reads."""
    writer: dict[int, int] = {}
    sources: dict[int, set[int]] = {}
    for number in numbers:
        operation = operations[number]
        sources[number] = {writer[access.memory] for access in operation.reads if access.memory in writer}
        writer |= {access.memory: number for access in operation.writes}
    return sources


def _stays_alone(operation: Operation) -> bool:
    return operation.is_product or operation.is_attention or operation.name in _SCATTERS


def _kernel(operations: Sequence[Operation], group: Sequence[int], readers: Mapping[int, set[int]]) -> Kernels:
    """Return one kernel for a group of operations, with the bytes that cross its border."""
    read: set[Access] = set()
    written: dict[int, int] = {}
    for number in group:
        operation = operations[number]
        read |= {access for access in operation.reads if access.memory not in written}
        written |= {access.memory: access.bytes for access in operation.writes}
    inside = set(group)
    kept = [size for memory, size in written.items() if not readers[memory] or readers[memory] - inside]
    members = [operations[number] for number in group]
    if all(each.name in _CONSTANTS for each in members):
        return Kernels()
    return Kernels(
        1 + sum(each.name in _SUMS_OVER_ROWS for each in members),
        sum(access.bytes for access in read) + sum(kept),
        sum(each.flops for each in members),
    )
