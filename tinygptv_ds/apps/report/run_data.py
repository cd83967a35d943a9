"""What a run directory holds, for a report: whatever can be read, and notes on what cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tinygptv_ds.charts.axes import Point
from tinygptv_ds.config.load import dotted_values
from tinygptv_ds.config.plain_yaml import LONGEST, parse_yaml
from tinygptv_ds.errors import ConfigError

METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"
_MARKS = (METRICS, "log.txt")  # of a run directory; an exported model has a recipe, too


@dataclass(frozen=True)
class Scores:
    """The scores of one benchmark after some step: shares in per cent, `iou` from 0 to 1."""

    benchmark: str
    step: int | None
    values: dict[str, float]
    questions: int | None

    @property
    def main(self) -> tuple[str, float]:
        """Name and value of the score that is quoted: the strict one, else the first."""
        name = "strict" if "strict" in self.values else next(iter(self.values))
        return name, self.values[name]


@dataclass(frozen=True)
class PanelAnswer:
    """One answer of the sample panel.

    Attributes:
        prompt: as the model was asked.
        truth: the true answer.
        answer: the generated one.
        images: files, as the model saw them.
    """

    prompt: str
    truth: str
    answer: str
    images: tuple[Path, ...]


@dataclass
class RunData:
    """One run.

    Attributes:
        path: its directory.
        name: unique among the runs of a report.
        recipe: by dotted key; datasets by their names. Empty where it cannot be read.
        series: (step, value) by metric, ascending; NaN for a value that was not finite.
        times: (step, seconds since 1970) of each line.
        scores: results of evaluations after training, one for each benchmark.
        panel: the newest sample panel, and the step that it is from.
        environment: versions and machine.
        notes: what a reader has to know: unfinished, damaged, missing.
    """

    path: Path
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[Point]] = field(default_factory=dict)
    times: list[Point] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    panel: list[PanelAnswer] = field(default_factory=list)
    panel_step: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run has ended and left its model."""
        return (self.path / "model").is_dir()

    @property
    def last_step(self) -> int:
        """Steps done, as far as they were logged."""
        return int(self.times[-1][0]) if self.times else 0

    @property
    def total_steps(self) -> int | None:
        """Steps that the recipe asks for."""
        parts = [self.recipe.get(f"train.{name}") for name in ("cycles", "epochs", "steps_per_epoch")]
        known = [part for part in parts if isinstance(part, int)]
        return math.prod(known) if len(known) == len(parts) else None

    def last(self, metric: str) -> float | None:
        """Return the last finite value of a metric."""
        return next((y for _, y in reversed(self.series.get(metric, [])) if math.isfinite(y)), None)

    def sums(self, prefix: str) -> dict[str, float]:
        """Return the sums of counted metrics, by the rest of their names."""
        found = {}
        for metric, points in self.series.items():
            if metric.startswith(prefix):
                found[metric.removeprefix(prefix)] = sum(y for _, y in points if math.isfinite(y))
        return found

    def by_name(self, prefix: str) -> dict[str, list[Point]]:
        """Return the series of metrics, by the rest of their names."""
        return {name.removeprefix(prefix): points for name, points in self.series.items() if name.startswith(prefix)}

    def training_seconds(self) -> float:
        """Return the time of all steps, without measurements, checkpoints and pauses between attempts."""
        steps = self.series.get("perf/step_seconds", [])
        counted = zip([0.0, *(x for x, _ in steps)], steps, strict=False)
        return sum((x - before) * y for before, (x, y) in counted if math.isfinite(y))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run directories among paths: each path itself, or the runs directly within it, by name.

    Raises:
        ConfigError: a path is neither.
    """
    found: list[Path] = []
    for path in paths:
        inner = sorted(folder for folder in path.iterdir() if _is_run(folder)) if path.is_dir() else []
        runs = [path] if _is_run(path) else inner
        if not runs:
            what = "is no folder" if not path.is_dir() else f"holds no {METRICS}, nor do the folders in it"
            raise ConfigError(f"{path} {what}; give run directories, e.g. runs/stage1, or the folder that holds them")
        found += [run for run in runs if run.resolve() not in [other.resolve() for other in found]]
    return found


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read runs, each under the shortest end of its path that no other has."""
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: Path, name: str) -> RunData:
    """Read one run directory."""
    run = RunData(path, name)
    recipe = _read_recipe(path / RECIPE, run.notes)
    run.recipe = _by_name(recipe)
    _read_metrics(run)
    run.scores = _read_scores(path)
    run.panel_step, run.panel = _read_panel(path / "samples", run.notes)
    run.environment = _environment(path, run)
    run.notes[:0] = _state(run)
    return run


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    length = next(
        (n for n in range(1, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(parts)), 1
    )
    return ["/".join(each[-length:]) for each in parts]


def _read_recipe(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as opened:
            recipe = parse_yaml(opened.read(LONGEST + 1))
        if isinstance(recipe, dict):
            return recipe
        notes.append(f"{file.name} holds no recipe.")
    except FileNotFoundError:
        notes.append(f"{file.name} is missing, so that no setting is shown.")
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        notes.append(f"{file.name} cannot be read ({error}), so that no setting is shown.")
    return {}


def _by_name(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe by dotted key, with the entries of its lists of datasets by their names."""
    data = recipe.get("data")
    if isinstance(data, dict):
        named = {
            key: {str(each.get("name")): {k: v for k, v in each.items() if k != "name"} for each in value}
            if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
            else value
            for key, value in data.items()
        }
        recipe = recipe | {"data": named}
    return dotted_values(recipe)


def _read_metrics(run: RunData) -> None:
    """Read the metrics; of a step that is there twice the later line counts."""
    damaged, times = 0, {}
    found: dict[str, dict[int, float]] = {}
    try:
        with (run.path / METRICS).open("rb") as file:
            for line in file:
                entry = _entry(line)
                if entry is None:
                    damaged += 1
                    continue
                step, values = entry
                for name, value in values.items():
                    if name == "time":
                        times[step] = value
                    else:
                        found.setdefault(name, {})[step] = value
    except FileNotFoundError:
        run.notes.append(f"{METRICS} is missing: the run has not logged a step yet.")
    except OSError as error:
        run.notes.append(f"{METRICS} cannot be read ({error.strerror}).")
    if damaged:
        run.notes.append(f"{METRICS} has {damaged} damaged line(s), which are left out.")
    run.series = {name: sorted(values.items()) for name, values in found.items()}
    run.times = sorted(times.items())


def _entry(line: bytes) -> tuple[int, dict[str, float]] | None:
    """Return the step of a line and its numbers, NaN for null; None: it is damaged."""
    try:
        entry = json.loads(line)
        step = entry["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(step, int) or not 0 <= step < 1 << 53:
        return None
    return step, {
        name: math.nan if value is None else _finite(value)
        for name, value in entry.items()
        if name != "step" and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }


def _finite(value: float) -> float:
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _read_scores(path: Path) -> list[Scores]:
    """Return the newest scores of each benchmark, of the run's own evaluations and of `tinygptv-ds eval` next to it."""
    own = sorted(path.glob("evaluation/step-*/*.json"))
    later = sorted((path.resolve().parent / "eval" / path.resolve().name).glob("*/results.json"))
    found: dict[str, Scores] = {}
    for file in [*own, *later]:
        result = _read_object(file)
        name, step, count = (result.get(key) for key in ("benchmark", "step", "questions"))
        values = {key: value for key, value in result.items() if isinstance(value, float) and math.isfinite(value)}
        if isinstance(name, str) and values:
            found[name] = Scores(name, _whole(step), values, _whole(count))
    return list(found.values())


def _read_panel(folder: Path, notes: list[str]) -> tuple[int | None, list[PanelAnswer]]:
    """Return the newest panel that is whole."""
    for file in sorted(folder.glob("step-*.json"), reverse=True):
        panel = _read_object(file)
        answers = panel.get("samples")
        if isinstance(answers, list) and answers:
            return _whole(panel.get("step")), list(_panel_answers(folder, answers))
        notes.append(f"samples/{file.name} is damaged.")
    return None, []


def _panel_answers(folder: Path, answers: Iterable[Any]) -> Iterator[PanelAnswer]:
    for each in answers:
        if isinstance(each, dict):
            prompt, truth, answer = (str(each.get(key, "")) for key in ("prompt", "truth", "answer"))
            images = each.get("images")
            names = [Path(str(name)).name for name in images] if isinstance(images, list) else []  # never elsewhere
            yield PanelAnswer(prompt, truth, answer, tuple(folder / "images" / name for name in names))


def _environment(path: Path, run: RunData) -> dict[str, str]:
    machine, versions = _read_object(path / "machine.json"), _read_object(path / "versions.json")
    if not versions:
        run.notes.append("versions.json is missing or damaged, so that no version is shown.")
    return {str(key): "-" if value is None else str(value) for key, value in (machine | versions).items()}


def _state(run: RunData) -> list[str]:
    """Return notes on how far the run got, and where it was resumed."""
    notes, total = [], run.total_steps
    if not run.finished:
        of = "" if total is None else f" of {total:,}"
        notes.append(f"Unfinished: {run.last_step:,}{of} steps are logged.")
    elif total is not None and run.last_step < total:
        notes.append(f"Ended early, after {run.last_step:,} of {total:,} steps.")
    resumed = _resumed_at(run)
    if resumed:
        notes.append(f"Resumed after step {', '.join(f'{step:,}' for step in resumed)}.")
    if run.times and "val/loss" not in run.series:
        notes.append("No validation loss was measured.")
    return notes


def _resumed_at(run: RunData) -> list[int]:
    """Return the steps that attempts continued from: the first step of each is logged out of turn."""
    every = run.recipe.get("train.log_every")
    steps = [int(step) for step, _ in run.series.get("train/loss", [])]
    if not isinstance(every, int) or every < 2:
        return []
    return [step - 1 for _, step in pairwise(steps) if step % every and step not in (1, run.total_steps)]


def _read_object(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file, empty where there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
