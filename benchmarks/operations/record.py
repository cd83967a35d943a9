"""A record of every operation of a step: what it reads and writes, by part of the model, forward and backward.

An operation counts as one kernel, unless it only makes a view or allocates memory. Its bytes are those of the tensors
that it reads and writes, each whole and once; of a table that it takes rows from, only these rows. An operation on a
list of tensors counts as one kernel, too: with CUDA 13, torch launches one for up to 448 pairs, with CUDA 12 for 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "device",
}
_NO_KERNEL |= {"_record_function_enter_new", "_record_function_exit"}  # for profilers
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
_TAKE_ROWS = {"embedding", "index_select", "index", "gather", "nll_loss_forward"}
_OVERWRITE = {"copy_", "_foreach_copy_", "fill_", "zero_"}  # they read nothing of what they write to
_READ = "_local_scalar_dense"  # the host reads a value, and waits for the device


@dataclass(frozen=True)
class Access:
    """A tensor that an operation reads or writes.

    Attributes:
        memory: a key of its memory, which its views share.
        offset: its first element there.
        bytes: its size; of an expanded tensor, that of its memory.
    """

    memory: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class Operation:
    """One operation on the device.

    Attributes:
        name: its name in torch, without a namespace.
        part: the part of the model.
        block: the innermost block (see `Recorder.block`) that it is in, a number, forward and backward apart; or None.
        inner: as `block`, of functions that are compiled wherever a compiler is available.
        reads: tensors that it reads.
        writes: tensors that it writes.
        flops: floating-point operations, of matrix products and attention alone.
        dtypes: dtypes of the floating-point tensors that it reads.
        devices: kinds of devices of all its tensors.
    """

    name: str
    part: str
    block: int | None
    inner: int | None
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: float
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str]

    @property
    def bytes(self) -> int:
        """Return the bytes that are read and written."""
        return sum(access.bytes for access in (*self.reads, *self.writes))

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product."""
        return self.name in _PRODUCTS

    @property
    def is_attention(self) -> bool:
        """Whether it is an attention kernel."""
        return "attention" in self.name or "varlen" in self.name


@dataclass(frozen=True)
class _Place:
    """Where operations belong: a part, and blocks."""

    part: str
    block: int | None = None
    inner: int | None = None


class Recorder(TorchDispatchMode):
    """A recorder of the operations inside its context.

    Args:
        squares: sum of the squared lengths of the packed samples, for the operations of causal attention.
        values: what the host reads from the device gets these values, in order; any further one is an error.
    """

    def __init__(self, squares: float = 0.0, values: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.host_reads = 0
        self._squares, self._values = squares, values
        self._places = [_Place("other")]
        self._spans: list[tuple[int, int, _Place]] = []  # of the forward pass: numbers of its first and last node
        self._kept: list[Any] = []  # all tensors, so that no memory's key is used twice
        self._blocks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name == _READ:
            self.host_reads += 1
            if self.host_reads > len(self._values):
                raise RuntimeError("the host reads a value from the device, and waits for it")
            return self._values[self.host_reads - 1]
        output = func(*args, **(kwargs or {}))
        if name not in _NO_KERNEL and not _is_view(func):
            changed = _changed(func, args) if output is None else output
            self._add(name, args, kwargs, changed)
        return output

    def _add(self, name: str, args: tuple, kwargs: dict | None, output: Any) -> None:
        read = args[1:] if name in _OVERWRITE else args
        inputs = [x for x in tree_leaves((read, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        self._kept += [*inputs, *outputs]
        written = sum(map(_bytes, outputs))
        if outputs and not written:
            return  # torch launches nothing for empty tensors
        most = written if name in _TAKE_ROWS else float("inf")
        place = self._places[-1]
        self.operations.append(
            Operation(
                name,
                place.part,
                place.block,
                place.inner,
                tuple(_access(x, most) for x in inputs),
                tuple(_access(x) for x in outputs),
                _flops(name, inputs, outputs, self._squares),
                frozenset(x.dtype for x in inputs if x.is_floating_point() and x.dim()),
                frozenset(x.device.type for x in (*inputs, *outputs) if x.dim() or x.device.type != "cpu"),
            )
        )

    # ---- places

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record what happens inside, and its backward pass, as a part of the model."""
        with self._at(_Place(name, self._places[-1].block, self._places[-1].inner)):
            yield

    @contextmanager
    def block(self, *, inner: bool = False) -> Iterator[None]:
        """Record what happens inside as one block, and its backward pass as another one."""
        self._blocks += 2
        here, number = self._places[-1], self._blocks
        place = _Place(here.part, here.block, number) if inner else _Place(here.part, number, None)
        with self._at(place):
            yield

    @contextmanager
    def _at(self, place: _Place) -> Iterator[None]:
        first = _next_node()
        self._places.append(place)
        try:
            yield
        finally:
            self._places.pop()
            self._spans.append((first, _next_node(), place))

    def backward_of(self, node: Node) -> None:
        """Record what follows as the backward pass of the part and the block that a node was made in."""
        number = node._sequence_nr()
        spans = [span for span in self._spans if span[0] <= number < span[1]]
        if getattr(node, "variable", None) is not None or not spans:
            self._places = [_Place("other, backward")]
            return
        place = min(spans, key=lambda span: span[1] - span[0])[2]
        blocks = [None if block is None else block + 1 for block in (place.block, place.inner)]
        self._places = [_Place(f"{place.part}, backward", *blocks)]

    def wrap(self, owner: Any, method: str, context: Callable[[], Any]) -> None:
        """Run a method of an object inside a context from now on."""
        call = getattr(owner, method)

        def inside(*args: Any, **kwargs: Any) -> Any:
            with context():
                return call(*args, **kwargs)

        setattr(owner, method, inside)

    def mark_blocks(self, model: nn.Module, names: tuple[str, ...]) -> None:
        """Record each module of these classes as a block."""
        for module in model.modules():
            if type(module).__name__ in names:
                self.wrap(module, "forward", self.block)


def _next_node() -> int:
    """Return the number that the next node of the graph would have; its own node takes one."""
    with _disable_current_modes(), torch.enable_grad():
        node = (torch.ones((), requires_grad=True) * 1.0).grad_fn
    assert node is not None
    return node._sequence_nr()


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return func.is_view or any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _changed(func: Any, args: tuple) -> list[Any]:
    """Return the arguments that an operation without a result writes to, e.g., the lists of a fused optimizer."""
    schema = func._schema.arguments
    return [value for value, each in zip(args, schema, strict=False) if each.alias_info and each.alias_info.is_write]


def _access(tensor: Tensor, most: float = float("inf")) -> Access:
    return Access(tensor.untyped_storage()._cdata, int(tensor.storage_offset()), int(min(_bytes(tensor), most)))


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # less where it is expanded


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor], squares: float) -> float:
    if name in ("mm", "bmm"):
        return 2.0 * inputs[0].numel() * inputs[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2.0 * inputs[1].numel() * inputs[2].shape[-1]
    if name == "convolution":
        return 2.0 * outputs[0].numel() * inputs[1][0].numel()
    if "attention" in name or "varlen" in name:
        is_backward = "backward" in name
        query = inputs[1] if is_backward else inputs[0]
        key = inputs[2] if is_backward else inputs[1]
        pairs = squares / 2 if query.dim() == 3 else query.shape[0] * query.shape[2] * key.shape[2]
        heads = query.shape[1]
        return (10.0 if is_backward else 4.0) * pairs * heads * query.shape[-1]
    return 0.0
