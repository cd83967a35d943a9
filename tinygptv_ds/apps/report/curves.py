"""The charts of a report: which metrics they show, and how several runs share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, count, pairwise
from pathlib import Path

from tinygptv_ds.apps.report.run_data import RunData
from tinygptv_ds.charts.axes import Point
from tinygptv_ds.charts.lines import Band, Line, line_chart
from tinygptv_ds.charts.style import HEIGHT, WIDTH

LOSS = "train/loss"
# (metric, title, unit); those that no run has are left out
_METRICS = (
    (LOSS, "Training loss", "per target token"),
    ("val/loss", "Validation loss", "per target token"),
    ("train/lr", "Learning rate", ""),
    ("perf/samples_s", "Throughput", "samples/s, all ranks"),
    ("perf/target_tokens_s", "Target tokens", "target tokens/s"),
    ("perf/mfu", "MFU", "per cent of the GPU's peak"),
    ("train/grad_norm", "Gradient norm", "norm before clipping"),
    ("perf/data_wait_pct", "Wait for data", "per cent of the time"),
    ("perf/mem_gib", "Memory", "GiB, peak of rank 0"),
)
_LOG_SCALE = (LOSS, "val/loss", "train/grad_norm")  # charts that can be switched to it
_BY_NAME = (  # of a single run: (prefix, title, unit)
    ("train/loss_", "Training loss by dataset", "per target token"),
    ("val/loss_", "Validation loss by dataset", "per target token"),
    ("data/mix_", "Mixture", "per cent of the samples"),
)
_NOT_DATASETS = ("train/loss_scale",)
_ALL_RUNS = "step, all runs"


def is_chain(runs: Sequence[RunData]) -> bool:
    """Return whether each run began from the one before it, as the stages of one training do."""
    starts = [(before.path.resolve().name, after.recipe.get("model.init_from")) for before, after in pairwise(runs)]
    return bool(starts) and all(isinstance(start, str) and name in Path(start).parts for name, start in starts)


def loss_curve(runs: Sequence[RunData], size: tuple[float, float]) -> str:
    """Return the chart of the training loss alone."""
    return _chart(runs, LOSS, "loss per target token", log=False, size=size)


def charts(runs: Sequence[RunData]) -> Iterator[tuple[str, str, str]]:
    """Yield (title, unit, HTML) of every chart with at least one value."""
    numbers = count()
    for metric, title, unit in _METRICS:
        if any(run.last(metric) is not None for run in runs):
            yield title, unit, _switched(partial(_chart, runs, metric), metric in _LOG_SCALE, next(numbers))
        if metric == "val/loss":
            yield from _scores(runs)
    if len(runs) == 1:
        for prefix, title, unit in _BY_NAME:
            found = {name: p for name, p in runs[0].by_name(prefix).items() if prefix + name not in _NOT_DATASETS}
            if len(found) > 1:
                lines = [Line(name, points, number) for number, (name, points) in enumerate(found.items())]
                yield title, unit, line_chart(lines)


def _scores(runs: Sequence[RunData]) -> Iterator[tuple[str, str, str]]:
    """Yield a chart for each score that was measured more than once: while training, or after each run of a chain."""
    names = {name for run in runs for name, points in run.by_name("eval/").items() if len(points) > 1}
    for name in sorted(names):
        if name.endswith("/strict") or f"{name.rpartition('/')[0]}/strict" not in names:
            yield f"Score: {name.replace('/', ', ')}", "", _chart(runs, f"eval/{name}")
    if not is_chain(runs):
        return
    ends = list(accumulate(run.last_step for run in runs))
    found: dict[str, list[Point]] = {}
    for end, run in zip(ends, runs, strict=True):
        for each in run.scores:
            name, value = each.main
            found.setdefault(f"{each.benchmark}, {name}", []).append((end, value))
    lines = [Line(name, points, number) for number, (name, points) in enumerate(found.items()) if len(points) > 1]
    if lines:
        title = "Scores" if len(lines) > 1 else f"Score: {lines[0].name}"
        yield title, "after each run", line_chart(lines, x_label=_ALL_RUNS, bands=_bands(runs))


def _chart(
    runs: Sequence[RunData],
    metric: str,
    unit: str = "",
    *,
    log: bool = False,
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """Draw a metric of all runs: one after the other where they are a chain, else over each other."""
    if not is_chain(runs):
        lines = [Line(run.name, run.series.get(metric, []), number) for number, run in enumerate(runs)]
        return line_chart(lines, y_label=unit, log=log, size=size)
    bands = _bands(runs)
    lines = [
        Line("", [(band.start + x, y) for x, y in run.series.get(metric, [])], number)
        for number, (run, band) in enumerate(zip(runs, bands, strict=True))
    ]
    return line_chart(lines, x_label=_ALL_RUNS, y_label=unit, log=log, bands=bands, size=size)


def _bands(runs: Sequence[RunData]) -> list[Band]:
    """Return the steps of each run of a chain, counted on from those of the runs before it."""
    ends = list(accumulate(run.last_step for run in runs))
    stages = {run.recipe.get("stage") for run in runs}
    names = [f"stage {run.recipe['stage']}" if len(stages) == len(runs) else run.name for run in runs]
    return [Band(end - run.last_step, end, name) for end, run, name in zip(ends, runs, names, strict=True)]


def _switched(draw: Callable[..., str], both: bool, number: int) -> str:
    """Return a chart, with a switch to the logarithmic scale where `both` are wanted; it works without a script."""
    if not both:
        return draw(log=False)
    return (
        f'<input type="checkbox" id="log{number}"><label for="log{number}">log scale</label>'
        f'<div class="linear">{draw(log=False)}</div><div class="log">{draw(log=True)}</div>'
    )
