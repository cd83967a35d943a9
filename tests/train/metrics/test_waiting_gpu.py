"""A GPU that waits for the host is seen by events and the host's clock, without waiting, and reported once."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.flops import BatchCounts, FlopRates
from tinygptv_ds.models.launches import remedy
from tinygptv_ds.train.callbacks.callback import CallbackList
from tinygptv_ds.train.callbacks.log import Log
from tinygptv_ds.train.metrics import stopwatch
from tinygptv_ds.train.metrics.accumulator import RankTimes, Totals
from tinygptv_ds.train.metrics.reporter import Reporter, _remedy
from tinygptv_ds.train.metrics.stopwatch import Stopwatch


class Gpu:
    """A device that does what is queued, one after the other, from when it is queued on; both clocks in seconds."""

    def __init__(self) -> None:
        self.host = self.free_at = 0.0

    def launch(self, kernels: int, host: float, device: float) -> None:
        """Launch kernels that each take the host and the device so many seconds."""
        for _ in range(kernels):
            self.host += host
            self.free_at = max(self.free_at, self.host) + device

    def wait(self) -> None:
        """Let the host wait for the device, as it does once a step."""
        self.host = max(self.host, self.free_at)

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        """Return an event as torch.cuda.Event; nothing may be asked of it that waits."""
        assert enable_timing
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.host, self.free_at))
        event.elapsed_time = lambda later: 1000 * (later.at - event.at)
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: device.host)
    return device


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger=LOGGER.name):
        yield lambda: [record.getMessage() for record in caplog.records]


def log_of(device: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Log, Stopwatch, dict[str, float]]:
    """Return the log callback of a run, its clock of forward passes, and the scalars that it wrote last."""
    written: dict[str, float] = {}
    clock = Stopwatch(torch.device(device))
    engine = SimpleNamespace(forward_clock=clock, grad_norm=float, loss_scale=float, skipped_steps=0)
    run = SimpleNamespace(engine=engine, recipe=SimpleNamespace())
    totals = Totals(1.0, {}, [(0, 1.0, 1)], {"a": 1}, {}, BatchCounts(), [RankTimes(0.0, 1.0)], [])
    reporter = Reporter.__new__(Reporter)
    reporter._device, reporter._first, reporter._total = torch.device(device), 0, 10
    reporter._has_waited = False
    reporter._remedy = remedy(from_features=False, compiled=False, graphs=False)
    reporter._costs, reporter._peak = FlopRates(), None
    reporter._clock = SimpleNamespace(read=lambda: 1.0)
    reporter._bar = SimpleNamespace(update=lambda: None, set_postfix=lambda **_: None)
    reporter._job = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(log_every=1)))
    reporter.board = SimpleNamespace()
    monkeypatch.setattr(reporter, "scalars", lambda step, values: written.update(values))
    monkeypatch.setattr("tinygptv_ds.train.metrics.reporter.memory_gib", lambda device: 0.0)
    monkeypatch.setattr("tinygptv_ds.train.callbacks.log.learning_rate_of_step", lambda *_: 0.0)
    accumulator = SimpleNamespace(read=lambda times: totals)
    return Log(run, accumulator, reporter, Stopwatch(torch.device("cpu")), CallbackList()), clock, written


def steps(gpu: Gpu, log: Log, clock: Stopwatch, count: int, *, host: float, device: float) -> None:
    """Run steps of a forward pass, a backward pass, and the host waiting for the device."""
    for step in range(count):
        with clock.running():
            gpu.launch(2000, host, device)
        gpu.launch(2000, host, device)
        gpu.wait()
        log.on_step(step)


def test_short_kernels(gpu: Gpu, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes longer than the device: reported once, after the first step, with what helps."""
    log, clock, written = log_of("cuda", monkeypatch)
    steps(gpu, log, clock, 1, host=12e-6, device=4e-6)
    assert not warnings() and written["perf/host_pct"] > 99
    steps(gpu, log, clock, 4, host=12e-6, device=4e-6)
    (warning,) = warnings()
    assert warning.startswith("launch-bound: the GPU waits for the host")
    assert "train.micro_batch_size" in warning and "data.features" in warning


@pytest.mark.parametrize(("ranks", "offered"), [(1, True), (2, False)])
def test_graphs_are_for_one_gpu(ranks: int, offered: bool) -> None:
    recipe = SimpleNamespace(
        data=SimpleNamespace(features=None),
        model=SimpleNamespace(compile="auto", frozen_bits=None),
        train=SimpleNamespace(cuda_graph_tokens=0),
    )
    job = SimpleNamespace(recipe=recipe, zero_stage=2, ranks=SimpleNamespace(world_size=ranks))
    assert ("CUDA graphs (train.cuda_graph_tokens)" in _remedy(job)) is offered


@pytest.mark.parametrize("device", [20e-6, 40e-6])
def test_long_kernels(
    gpu: Gpu, device: float, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host runs ahead of the device, and nothing is reported."""
    log, clock, written = log_of("cuda", monkeypatch)
    steps(gpu, log, clock, 5, host=12e-6, device=device)
    assert not warnings()
    assert written["perf/host_pct"] == pytest.approx(100 * 12e-6 / device, rel=0.01)


def test_a_cpu_waits_for_nothing(gpu: Gpu, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock, written = log_of("cpu", monkeypatch)
    steps(gpu, log, clock, 5, host=12e-6, device=0.0)
    assert not warnings() and written["perf/host_pct"] == 100
