"""Forward and backward pass of a micro-batch as one CUDA graph, for batches too small to fill the card.

At the published batches of 2 to 6 samples a step launches thousands of kernels, each of which takes the GPU less time
than the host. A graph launches all of them at once. It is captured for one set of shapes (`token_buckets.py`) and
addresses: inputs are copied into buffers, gradients are added to the flat ones of `FlatOptimizer`, losses are read from
a buffer. All graphs share one memory pool: none runs while another does, and what has to outlive one is outside.

A graph is captured when its bucket comes for the second time, right after the same micro-batch has run without it, and
its first replay must give the same losses and gradients. Where it does not, or cannot be captured, the run goes on
without graphs, and the log says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.loss import PackedOutput
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.flat_optimizer import FlatOptimizer
from tinygptv_ds.train.micro_batch_loss import micro_batch_loss
from tinygptv_ds.train.token_buckets import Bucket, StaticInputs, bucket_of

MOST_GRAPHS = 24  # thousands of kernels each, whose descriptions take memory, too
# Relative difference of gradients between a graph and the same operations without it: in bf16, atomic additions of
# attention's backward pass come in any order. A graph that reads a wrong buffer is off by far more.
TOLERANCE = 0.02


class Graph(Protocol):
    """What can be captured once and replayed any number of times."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record what `work` launches, without running it."""

    def replay(self) -> None:
        """Run it."""


class CudaGraphs:
    """A maker of CUDA graphs that share a memory pool and a stream; the only place that calls torch's API for them.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run the block in the stream of the captures: libraries keep their workspaces by stream."""
        computing = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            yield
        computing.wait_stream(self._stream)

    def new(self) -> Graph:
        """Return a graph that nothing is captured in."""
        return _CudaGraph(self._stream, self._pool)


class _CudaGraph:
    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph, self._stream, self._pool = torch.cuda.CUDAGraph(), stream, pool

    def capture(self, work: Callable[[], None]) -> None:
        # Threads of the dataloader and of the process group may call CUDA meanwhile: only this one is captured.
        with torch.cuda.graph(self._graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self._graph.replay()


class _Captured:
    """The buffers of a bucket, the work on them, and its graph."""

    def __init__(self, engine: Engine, bucket: Bucket, inputs: Mapping[str, Any], graph: Graph) -> None:
        assert engine.flat is not None
        self._engine, self._flat = engine, engine.flat
        self._static = StaticInputs(bucket, inputs, engine.module.config.num_query_tokens)
        self._divisor = torch.ones((), device=engine.device)
        self._scale = torch.ones((), device=engine.device)
        self._losses = torch.zeros(bucket.targets, device=engine.device)
        self._graph = graph

    def capture(self) -> None:
        self._graph.capture(self.work)

    def replay(self) -> None:
        self._graph.replay()

    def fill(self, inputs: Mapping[str, Any], divisor: Tensor) -> None:
        self._static.fill(inputs)
        self._divisor.copy_(divisor)
        self._scale.fill_(self._flat.loss_scale)

    def losses(self, count: int) -> Tensor:
        """Return a copy of the losses of the first targets, which are the real ones."""
        return self._losses[:count].clone()

    def work(self) -> None:
        """Compute losses and add gradients: reads and writes the buffers, weights and flat gradients alone."""
        with _autocast(self._engine):
            output: PackedOutput = self._engine.module(**self._static.inputs)
        loss = micro_batch_loss(output, self._divisor, count=1, world_size=1) * self._scale
        # Not `backward`, whose gradients would be kept in the parameters, in the stream of their first backward pass.
        self._flat.add(torch.autograd.grad(loss, self._flat.parameters, allow_unused=True))
        self._losses.copy_(output.token_losses.detach())


def _autocast(engine: Engine) -> Any:
    """Return DeepSpeed's autocast, without its cache: a cast that is kept is not part of the graph that uses it."""
    dtype = DTYPES[engine.precision]
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(engine.device.type, dtype, cache_enabled=False)


class MicroBatchGraphs:
    """Graphs by bucket.

    Args:
        engine: of a single rank with a frozen vision path; see `start_graphs`.
        most_tokens: larger micro-batches run without a graph.
        graphs: makes them; tests pass a maker that needs no CUDA.
    """

    def __init__(self, engine: Engine, most_tokens: int, graphs: CudaGraphs) -> None:
        assert engine.flat is not None
        self._engine, self._flat = engine, engine.flat
        self._most_tokens = most_tokens
        self._graphs = graphs
        self._seen: set[Bucket] = set()
        self._captured: dict[Bucket, _Captured] = {}
        self._off = False

    def __call__(self, inputs: Mapping[str, Any], divisor: Tensor) -> Tensor | None:
        """Run a micro-batch and add its gradients; returns its token losses, or None where it has to run without graph.

        Args:
            inputs: keyword arguments of the model's packed forward, on the device.
            divisor: what the sum of the losses is divided by, a scalar on the device.
        """
        if self._off or len(inputs["input_ids"]) > self._most_tokens:
            return None
        bucket = bucket_of(inputs)
        captured = self._captured.get(bucket)
        if captured is None:
            if bucket in self._seen and len(self._captured) < MOST_GRAPHS:
                return self._first_time(bucket, inputs, divisor)
            self._seen.add(bucket)
            return None
        captured.fill(inputs, divisor)
        captured.replay()
        return captured.losses(len(inputs["targets"]))

    def _first_time(self, bucket: Bucket, inputs: Mapping[str, Any], divisor: Tensor) -> Tensor:
        """Run a micro-batch without its graph, then capture the graph, replay it and compare; waits for the device."""
        captured = _Captured(self._engine, bucket, inputs, self._graphs.new())
        captured.fill(inputs, divisor)
        before = [gradient.clone() for gradient in self._flat.gradients]
        with self._graphs.warming_up():
            captured.work()
        losses = captured.losses(len(inputs["targets"]))
        after = [gradient.clone() for gradient in self._flat.gradients]
        if not all(gradient.isfinite().all() for gradient in after):
            return losses  # as where fp16 overflows: nothing to compare with
        try:
            captured.capture()
            _restore(self._flat, before)
            captured.replay()
            reason = _difference(captured.losses(len(losses)), losses, self._flat, before, after)
        except RuntimeError as error:  # CUDA's errors, and running out of memory
            reason = str(error).splitlines()[0]
        _restore(self._flat, after)
        if reason is None:
            self._captured[bucket] = captured
            padding = 1 - len(inputs["input_ids"]) / bucket.tokens
            LOGGER.info(
                "CUDA graph %d: %d tokens (%.0f %% padding here), %d image(s)",
                len(self._captured),
                bucket.tokens,
                100 * padding,
                bucket.images,
            )
        else:
            self._turn_off(reason)
        return losses

    def _turn_off(self, reason: str) -> None:
        self._off = True
        self._captured.clear()
        LOGGER.warning("no CUDA graphs from here on: %s", reason)


def _restore(flat: FlatOptimizer, gradients: list[Tensor]) -> None:
    for gradient, earlier in zip(flat.gradients, gradients, strict=True):
        gradient.copy_(earlier)


def _difference(
    replayed: Tensor, losses: Tensor, flat: FlatOptimizer, before: list[Tensor], after: list[Tensor]
) -> str | None:
    """Return how a first replay differs from the same work without a graph; None: it does not."""
    pairs = [(replayed, losses, torch.zeros_like(losses))]
    pairs += list(zip(flat.gradients, after, before, strict=True))
    for found, wanted, base in pairs:
        error, size = ((found - wanted).norm().item(), (wanted - base).norm().item())
        if not error <= TOLERANCE * size:
            return f"a replay differs from the same operations without a graph by {error:.3g}, of {size:.3g}"
    return None


def start_graphs(engine: Engine, most_tokens: int) -> MicroBatchGraphs | None:
    """Return the graphs that `train.cuda_graph_tokens` asks for, None with 0 or where there can be none."""
    if not most_tokens:
        return None
    reason = _why_not(engine)
    if reason is not None:
        LOGGER.warning("no CUDA graphs (train.cuda_graph_tokens: %d): %s", most_tokens, reason)
        return None
    return MicroBatchGraphs(engine, most_tokens, CudaGraphs(engine.device))


def _why_not(engine: Engine) -> str | None:
    if engine.device.type != "cuda":
        return f"this runs on a {engine.device.type}"
    if engine.flat is None:
        return (
            f"ZeRO-{engine.zero_stage} on {engine.ranks.world_size} rank(s) works in Python hooks, which a graph would "
            "pass over; graphs need one GPU, ZeRO-1 or 2 without offload, and torch_autocast"
        )
    if not engine.module.vision_is_frozen:
        return "ViT or Q-Former are trained, whose dropout is drawn for each shape on its own"
    if engine.attention == "sdpa":
        return "attention runs as SDPA, which would pad every sample to all tokens of the bucket"
    return None
