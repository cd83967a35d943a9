"""Micro-batches in buckets, and their graphs with a stand-in for CUDA's: the same losses, gradients and weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_rank
from helpers.forked import apart
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.made_up import SIZES
from tinygptv_ds.data.loader.batch import collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models import attention
from tinygptv_ds.models.regions import compile_blocks
from tinygptv_ds.processing.sequence import IGNORE, TokenRow
from tinygptv_ds.train import cuda_graphs
from tinygptv_ds.train.cuda_graphs import MicroBatchGraphs, start_graphs
from tinygptv_ds.train.step import micro_step
from tinygptv_ds.train.token_buckets import bucket_of, padded
from tinygptv_ds.train.transfer import model_inputs

CONFIG = SIZES["tiny"]
QUERIES = CONFIG.num_query_tokens
CASES = [[(20, True)], [(9, False)], [(7, True), (30, False), (11, True)], [(12, True), (5, False)]]
FP16 = {"torch_autocast": {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}}
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}


class StandIn:
    """A stand-in for torch's API of CUDA graphs: capturing keeps the work, replaying does it."""

    def __init__(self, replay: Callable[[Callable[[], None]], None] = lambda work: work()) -> None:
        self.replays, self._replay = 0, replay

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        yield

    def new(self) -> Any:
        graph = SimpleNamespace()
        graph.capture = lambda work: setattr(graph, "work", work)
        graph.replay = lambda: self._run(graph.work)
        return graph

    def _run(self, work: Callable[[], None]) -> None:
        self.replays += 1
        self._replay(work)


def micro_batch(samples: list[tuple[int, bool]], features: bool = False, seed: int = 0) -> dict[str, Any]:
    """Return the model's inputs for samples of so many text tokens, with an image or without."""
    made = []
    for place, (text, image) in enumerate(samples):
        start = QUERIES if image else 0
        ids = (np.arange(start + text) * 7 + seed + place) % 40
        ids[:start] = CONFIG.image_token_id
        labels = np.where(np.arange(len(ids)) <= start, IGNORE, ids)
        row = TokenRow(ids, labels, np.arange(len(ids)), np.arange(start), np.arange(start))
        pixels = np.full((int(image and not features), 3, 28, 28), 9 * place + seed + 1, dtype=np.uint8)
        found = torch.full((1, QUERIES, CONFIG.qformer_config.hidden_size), 0.1 * place + 1) if image else None
        made.append(Sample(SampleRef(place + 10 * seed, "vqa", 0, 0, place), row, pixels, found if features else None))
    none = torch.zeros(0, QUERIES, CONFIG.qformer_config.hidden_size) if features else None
    return model_inputs(collate(made, ["vqa"], queries=QUERIES, image_size=28, bos=1, no_features=none))


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("features", [False, True], ids=["pixels", "features"])
@pytest.mark.parametrize("samples", CASES, ids=str)
def test_padding_changes_neither_losses_nor_gradients(
    samples: list[tuple[int, bool]], features: bool, checkpointing: int
) -> None:
    """With the published dropout: its masks are those of the tokens, wherever they are."""
    model = one_rank.tiny_model(layers=2, lora_r=4).train()
    model.language_model.model.gradient_checkpointing = checkpointing
    for block in model.language_model.model.layers:
        torch.nn.init.normal_(block.mlp.fc1.weight, std=0.1)
    inputs = micro_batch(samples, features)
    static = padded(inputs, QUERIES)
    bucket, count = bucket_of(inputs), len(inputs["targets"])
    assert {name: len(static[name]) for name in ("input_ids", "targets")} == {
        "input_ids": bucket.tokens,
        "targets": bucket.targets,
    }
    results = []
    for given in (inputs, static):
        model.zero_grad()
        output = model(**given)
        (output.token_losses.sum() + output.anchor).backward()
        results.append(
            (output.token_losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        )
    (losses, gradients), (padded_losses, padded_gradients) = results
    torch.testing.assert_close(padded_losses[:count], losses, rtol=1e-5, atol=1e-6)
    assert not padded_losses[count:].any()
    for name, gradient in gradients.items():
        # Sums of other lengths are rounded differently, in proportion to the tensor's largest value.
        rounding = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-4, atol=max(rounding, 1e-6), msg=name)
    static["dropout_keys"][: len(inputs["input_ids"])] += 1
    assert not torch.allclose(model(**static).token_losses[:count], losses, rtol=1e-3)


def test_buckets_are_few_and_little_larger() -> None:
    lengths = range(64, 2048)
    sizes = {
        length: bucket_of({**micro_batch([(8, False)]), "input_ids": torch.empty(length)}).tokens for length in lengths
    }
    assert all(size > length for length, size in sizes.items())
    assert len(set(sizes.values())) <= 25
    assert np.mean([size / length for length, size in sizes.items()]) < 1.13


def trained(
    settings: dict[str, Any], graphs: StandIn | None, micro_batches: int = 1, *, compiled: bool = False
) -> tuple[Any, list[Tensor], Any]:
    """Return the engine after ten steps, the token losses of all micro-batches, and the graphs."""
    engine = one_rank.tiny_engine(**settings)
    if compiled:
        compile_blocks(engine.module, backend="eager")  # traced; the backward pass is for tests of compiled blocks
    run: Any = SimpleNamespace(engine=engine, progress=SimpleNamespace(enter=lambda phase: None))
    run.graphs = None if graphs is None else MicroBatchGraphs(engine, 50, graphs)  # the third case is larger
    losses = []
    for step in range(10):
        batches = [micro_batch(CASES[(step + n) % len(CASES)], seed=step) for n in range(micro_batches)]
        targets = sum(len(batch["targets"]) for batch in batches)
        divisor = engine.begin_step(targets=targets, images=sum(len(batch["pixel_values"]) for batch in batches))
        engine.set_learning_rate(1e-3)
        for number, batch in enumerate(batches):
            losses.append(micro_step(run, batch, divisor, number=number, count=len(batches)))
            for value in batch.values():  # its memory is another batch's from here on
                value.fill_(0) if isinstance(value, Tensor) else None
        assert engine.step_taken or "torch_autocast" in settings
    return engine, losses, run.graphs


def compared(
    settings: dict[str, Any], micro_batches: int, compiled: bool = False
) -> tuple[float, float, list[int], int, int]:
    """Return the largest differences of losses and weights with graphs and without, and what was captured."""
    one_rank.join()
    stand_in = StandIn()
    plain, losses, _ = trained(settings, None, micro_batches)
    graphed, found, graphs = trained(settings, stand_in, micro_batches, compiled=compiled)
    assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    differing = max((a - b).abs().max().item() for a, b in zip(losses, found, strict=True))
    one, other = plain.trained_state(), graphed.trained_state()
    assert plain.skipped_steps == graphed.skipped_steps
    moved = max((one[name] - other[name]).abs().max().item() for name in one)
    return (
        differing,
        moved,
        [len(a) - len(b) for a, b in zip(losses, found, strict=True)],
        len(graphs._captured),
        stand_in.replays,
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_training_is_the_same(micro_batches: int) -> None:
    """Gradients of several micro-batches, with graphs and without, add up; losses are those of the real targets."""
    losses, weights, lengths, captured, replays = apart(compared, {}, micro_batches)
    assert losses < 1e-4 and weights < 1e-4
    assert set(lengths) == {0}
    assert captured == 3  # of four kinds of micro-batches; one has too many tokens
    assert replays > captured


@pytest.mark.parametrize("settings", [BF16, FP16], ids=["bf16", "fp16"])
def test_training_under_autocast(settings: dict[str, Any]) -> None:
    losses, weights, _, captured, _ = apart(compared, settings, 1)
    assert losses < 0.1 and weights < 5e-3
    assert captured == 3


def test_compiled_blocks_in_graphs() -> None:
    """Both at once, with LoRA's weights cast together: what a graph replays is what compiled blocks compute."""
    losses, weights, _, captured, replays = apart(compared, BF16, 1, True)
    assert losses < 0.1 and weights < 5e-3
    assert captured == 3 and replays > captured


class Waits(TorchDispatchMode):
    """A recorder of operations whose results the host would wait for, or whose shapes depend on values."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.NAMES:
            self.seen.append(func.overloadpacket.__name__)
        tensors = result if isinstance(result, tuple | list) else [result]
        self.devices |= {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}
        return result


def waits_of_a_replay() -> tuple[list[str], int]:
    one_rank.join()
    seen: list[str] = []

    def watched(work: Callable[[], None]) -> None:
        with Waits() as waits:
            work()
        seen.extend(waits.seen)

    stand_in = StandIn(watched)
    trained({}, stand_in)
    return seen, stand_in.replays


def test_nothing_that_is_captured_waits() -> None:
    seen, replays = apart(waits_of_a_replay)
    assert seen == [] and replays == 5  # of eight micro-batches: three kinds run once without a graph


def test_what_is_captured_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass on fake CUDA tensors: a shape that depends on values, or a value that is read, is an error."""
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "torch_varlen")
    monkeypatch.setattr("tinygptv_ds.models.tinygptv.choose_backend", lambda *_: "torch_varlen")
    monkeypatch.setattr("tinygptv_ds.models.dropout.missing_compiler", lambda device: "none here")
    model = one_rank.tiny_model(layers=2, lora_r=4).train()
    static = padded(micro_batch(CASES[2]), QUERIES)
    with FakeTensorMode(allow_non_fake_inputs=False), Waits() as waits:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    dtype = torch.float32 if parameter.requires_grad else torch.bfloat16
                    empty = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=torch.bfloat16, device="cuda")
        inputs = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value
            for name, value in static.items()
        }
        waits.devices.clear()
        torch.set_autocast_enabled("cuda", True)
        try:
            output = model(**inputs)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert waits.seen == [] and waits.devices == {"cuda"}
    assert len(output.token_losses) == bucket_of(micro_batch(CASES[2])).targets


def broken(kind: str) -> tuple[list[str], float, int]:
    """Return the warnings, the difference to a run without graphs, and the replays of graphs that fail."""
    one_rank.join()
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    LOGGER.addHandler(handler)

    def twice(work: Callable[[], None]) -> None:
        work()
        work()

    def fail(work: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore of it")

    stand_in = StandIn({"wrong": twice, "fails": fail}[kind])
    plain, losses, _ = trained({}, None)
    other, found, graphs = trained({}, stand_in)
    assert graphs._captured == {}
    one, two = plain.trained_state(), other.trained_state()
    differing = max((a - b).abs().max().item() for a, b in zip(losses, found, strict=True))
    return messages, max(differing, *((one[name] - two[name]).abs().max().item() for name in one)), stand_in.replays


@pytest.mark.parametrize(
    ("kind", "said"), [("wrong", "a replay differs from the same operations"), ("fails", "CUDA out of memory")]
)
def test_graphs_that_fail_are_given_up(kind: str, said: str) -> None:
    """At the first one, with the reason in one line, and with the numbers of a run without."""
    messages, difference, replays = apart(broken, kind)
    assert [message for message in messages if "CUDA graphs" in message] == [
        message for message in messages if message.startswith(f"no CUDA graphs from here on: {said}")
    ]
    assert sum("no CUDA graphs" in message for message in messages) == 1
    assert difference < 1e-4 and replays == 1


def limited() -> int:
    one_rank.join()
    cuda_graphs.MOST_GRAPHS = 2
    return len(trained({}, StandIn())[2]._captured)


def test_the_number_of_graphs_is_bounded() -> None:
    assert apart(limited) == 2


def refused() -> list[str]:
    one_rank.join()
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    LOGGER.addHandler(handler)
    engine = one_rank.tiny_engine()
    assert start_graphs(engine, 0) is None and messages == []
    assert start_graphs(engine, 512) is None
    engine.device = torch.device("cuda")
    assert start_graphs(engine, 512) is None
    engine.attention = "torch_varlen"
    engine.module.query_tokens.requires_grad_(True)
    assert start_graphs(engine, 512) is None
    engine.flat = None
    assert start_graphs(engine, 512) is None
    return messages


def test_reasons_not_to_use_graphs() -> None:
    reasons = apart(refused)
    parts = ["runs on a cpu", "attention runs as SDPA", "ViT or Q-Former are trained", "works in Python hooks"]
    assert len(reasons) == 4
    assert all(part in reason for part, reason in zip(parts, reasons, strict=True))
