"""The tables of a report: the runs, their scores, mixture, skipped samples, settings and environment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from tinygptv_ds.apps.report.run_data import RunData
from tinygptv_ds.charts.axes import short
from tinygptv_ds.charts.style import COLORS

_NOTHING = "–"
_DATASETS = ("data.datasets.", "data.validation.")


def overview(runs: Sequence[RunData]) -> str:
    """Return a table with a row for each run: how far it got, what it reached, and how fast."""
    header = ("run", "stage", "state", "steps", "loss, first → last", "validation loss", "samples/s", "time", "memory")
    return table(header, [_row(run, number) for number, run in enumerate(runs)])


def tiles(run: RunData) -> str:
    """Return the figures of a single run, large."""
    figures = [("loss, first → last", _first_to_last(run)), ("validation loss", _number(run.last("val/loss")))]
    figures += [(f"{each.benchmark}: {each.main[0]}", score(*each.main)) for each in run.scores]
    figures += [
        ("steps", f"{run.last_step:,}"),
        ("samples/s", _number(_median(run, "perf/samples_s"))),
        ("time of the steps", _duration(run.training_seconds())),
        ("memory, peak", _gib(run)),
    ]
    shown = [(name, value) for name, value in figures if value != _NOTHING]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown)
    return f'<dl class="tiles">{cells}</dl>'


def scores_table(runs: Sequence[RunData]) -> str:
    """Return a row for each run and benchmark, with all its scores; empty where there are none."""
    rows = [
        (
            _run_cell(run, number, of=len(runs)),
            escape(each.benchmark),
            _NOTHING if each.step is None else f"{each.step:,}",
            _NOTHING if each.questions is None else f"{each.questions:,}",
            escape(", ".join(f"{name} {score(name, value)}" for name, value in each.values.items())),
        )
        for number, run in enumerate(runs)
        for each in run.scores
    ]
    return table(("run", "benchmark", "step", "questions", "scores"), rows) if rows else ""


def mixture_table(runs: Sequence[RunData]) -> str:
    """Return what each dataset contributed, with its share as a bar and next to that of the recipe's weights."""
    rows = []
    for number, run in enumerate(runs):
        images, texts = run.sums("data/with_image_"), run.sums("data/text_only_")
        every = sum(images.values()) + sum(texts.values())
        weights = _weights(run)
        for name in images:
            used = images[name] + texts.get(name, 0)
            share = 100 * used / every if every else 0.0
            rows.append(
                (
                    _run_cell(run, number, of=len(runs)),
                    escape(name),
                    f"{used:,.0f}",
                    f"{_bar(share, number)} {share:.1f} %",
                    f"{weights[name]:.1f} %" if name in weights else _NOTHING,
                    f"{texts.get(name, 0):,.0f}",
                    _number(run.last(f"train/loss_{name}")),
                    _number(run.last(f"val/loss_{name}")),
                )
            )
    header = ("run", "dataset", "samples", "share", "by weight", "text only", "last loss", "validation loss")
    return table(header, rows) if rows else ""


def skipped_table(runs: Sequence[RunData]) -> str:
    """Return the samples that could not be used, by reason."""
    counts = [run.sums("data/skipped_") for run in runs]
    reasons = sorted({reason for each in counts for reason, count in each.items() if count})
    if not reasons:
        return ""
    rows = [
        (_run_cell(run, number, of=len(runs)), *(f"{counts[number].get(reason, 0):,.0f}" for reason in reasons))
        for number, run in enumerate(runs)
    ]
    return table(("run", *(escape(reason) for reason in reasons)), rows)


def differing_settings(runs: Sequence[RunData]) -> str:
    """Return the settings in which runs differ; empty where they are equal, or where one has no recipe."""
    recipes = [run.recipe for run in runs]
    if len(runs) < 2 or not all(recipes):
        return ""
    every = [_with_dataset_names(recipe) for recipe in recipes]
    rows = []
    for key in dict.fromkeys(key for recipe in every for key in recipe):
        values = [_value(recipe[key]) if key in recipe else _NOTHING for recipe in every]
        of_some_dataset = key.startswith(_DATASETS) and _NOTHING in values  # its name is in a row of its own
        if len(set(values)) > 1 and not of_some_dataset:
            rows.append((f"<code>{escape(key)}</code>", *(escape(value) for value in values)))
    header = ("setting", *(_run_cell(run, number, of=len(runs)) for number, run in enumerate(runs)))
    return table(header, rows, "text") if rows else ""


def settings(run: RunData) -> str:
    """Return all settings of a run."""
    rows = [(f"<code>{escape(key)}</code>", escape(_value(value))) for key, value in run.recipe.items()]
    return table(("setting", "value"), rows, "text") if rows else ""


def environment_table(runs: Sequence[RunData]) -> str:
    """Return machine and versions of each run, in one column where they are equal."""
    shown = runs[:1] if all(run.environment == runs[0].environment for run in runs) else runs
    keys = dict.fromkeys(key for run in shown for key in run.environment)
    names = [_run_cell(run, number, of=len(shown)) for number, run in enumerate(shown)]
    rows = [(escape(key), *(escape(run.environment.get(key, _NOTHING)) for run in shown)) for key in keys]
    return table(("", *names), rows, "text") if rows else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Return an HTML table, wide ones scroll by themselves; cells are HTML already. Empty columns are left out.

    The cells of one of `kind` text are wrapped.
    """
    lines = [header, *rows]
    kept = [n for n in range(len(header)) if any(row[n] not in ("", _NOTHING) for row in lines[1:])]
    head = "".join(f"<th>{header[n]}</th>" for n in kept)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{''.join(f'<td>{row[n]}</td>' for n in kept)}</tr>" for row in lines[1:])
    return f'<div class="wide {kind}"><table>{head}<tbody>{body}</tbody></table></div>'


def score(name: str, value: float) -> str:
    """Return a score as people write it: in per cent with one digit, an IoU with three."""
    return f"{value:.3f}" if name == "iou" else f"{value:.1f} %"


def _with_dataset_names(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the names of its datasets as settings of their own."""
    names: dict[str, dict[str, None]] = {}
    for key in recipe:
        for prefix in _DATASETS:
            if key.startswith(prefix):
                names.setdefault(prefix.removesuffix("."), {})[key.removeprefix(prefix).rpartition(".")[0]] = None
    return {**recipe, **{key: ", ".join(each) for key, each in names.items()}}


def _row(run: RunData, number: int) -> tuple[str, ...]:
    total = run.total_steps
    return (
        _run_cell(run, number, of=2),
        escape(str(run.recipe.get("stage", _NOTHING))),
        "finished" if run.finished else "unfinished",
        f"{run.last_step:,}" + (f" of {total:,}" if total not in (None, run.last_step) else ""),
        _first_to_last(run),
        _number(run.last("val/loss")),
        _number(_median(run, "perf/samples_s")),
        _duration(run.training_seconds()),
        _gib(run),
    )


def _run_cell(run: RunData, number: int, *, of: int) -> str:
    """Return a run's name next to its color; nothing where there is a single run."""
    if of == 1:
        return ""
    return f'<i class="dot" style="background: var(--c{number % COLORS})"></i>{escape(run.name)}'


def _bar(share: float, number: int) -> str:
    """Return a bar of `share` per cent in a run's color."""
    return f'<span class="bar"><i style="width: {share:.1f}%; background: var(--c{number % COLORS})"></i></span>'


def _first_to_last(run: RunData) -> str:
    values = [y for _, y in run.series.get("train/loss", []) if math.isfinite(y)]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else _NOTHING


def _weights(run: RunData) -> dict[str, float]:
    """Return the shares that a recipe's weights ask for, in per cent."""
    prefix, suffix = "data.datasets.", ".weight"
    found = {
        key.removeprefix(prefix).removesuffix(suffix): float(value)
        for key, value in run.recipe.items()
        if key.startswith(prefix) and key.endswith(suffix) and isinstance(value, int | float)
    }
    total = sum(found.values())
    return {name: 100 * weight / total for name, weight in found.items()} if total > 0 else {}


def _median(run: RunData, metric: str) -> float | None:
    values = [y for _, y in run.series.get(metric, []) if math.isfinite(y)]
    return median(values) if values else None


def _number(value: float | None) -> str:
    return _NOTHING if value is None else short(float(f"{value:.4g}"))


def _gib(run: RunData) -> str:
    peak = run.last("perf/mem_gib")
    return _NOTHING if peak is None else f"{peak:.1f} GiB"


def _duration(seconds: float) -> str:
    if not seconds:
        return _NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value.strip() and value.isprintable()
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
