"""The last lines of a run: what it has reached, where its model is, and which commands come next."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.config.evaluation_section import HELD_OUT, ScoredSection
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.train.checkpoint.result import MODEL
from tinygptv_ds.train.run import Run
from tinygptv_ds.weights.detect import PROVENANCE

_STAGES = 4


def closing_report(run: Run) -> list[str]:
    """Return the lines, for rank 0, after `model/` has been written."""
    run_dir = run.job.run_dir
    resumed = f", resumed at step {run.first_step}" if run.first_step else ""
    reached = ", ".join(f"{name} {value:.4f}" for name, value in _last_values(run_dir / "metrics.jsonl").items())
    return [
        f"finished: {run.last_step} steps{resumed}, {_clock_time(time.monotonic() - run.began)}"
        f"{f'; {reached}' if reached else ''}",
        f"model: {run_dir / MODEL}{_chosen(run_dir / MODEL)}",
        "next:",
        *(f"  {command}" for command in next_commands(run.recipe, run_dir)),
    ]


def next_commands(recipe: Recipe, run_dir: Path) -> list[str]:
    """Return commands for a shell: chat, evaluation, export, and the stage that follows."""
    folder = shlex.quote(str(run_dir))
    commands = [
        f"tinygptv-ds chat {folder}",
        _evaluation(recipe, folder),
        f"tinygptv-ds export {folder} --out my_model",
    ]
    if recipe.stage < _STAGES:
        setting = shlex.quote(f"model.init_from={run_dir}")
        commands.append(f"tinygptv-ds train stage{recipe.stage + 1} --set {setting}")
    return commands


def _evaluation(recipe: Recipe, folder: str) -> str:
    """Return the evaluation on what the recipe scores or validates on."""
    for scored in recipe.evaluation.benchmarks:
        if scored.kind in HELD_OUT or not scored.places:
            return f"tinygptv-ds eval {_scored(scored)} --model {folder}"
    places = [section.shards for section in recipe.data.validation]
    return f"tinygptv-ds eval vqa --shards {shlex.quote(places[0]) if places else 'SHARDS'} --model {folder}"


def _scored(scored: ScoredSection) -> str:
    if scored.shards is not None:
        instruction = f" --instruction {shlex.quote(scored.instruction)}" if scored.instruction is not None else ""
        return f"{scored.kind} --shards {shlex.quote(scored.shards)}{instruction}"
    kind = "refer" if scored.kind.startswith("refcoco") else "vqa"
    return f"{kind} --benchmarks {scored.kind} --root {shlex.quote(str(scored.root))}"


def _last_values(metrics: Path) -> dict[str, float]:
    """Return the last training loss, validation loss and strict scores; whatever cannot be read is left out."""
    found: dict[str, float] = {}
    for line in _lines(metrics):
        for key, value in line.items():
            wanted = key in ("train/loss", "val/loss") or (key.startswith("eval/") and key.endswith("/strict"))
            if wanted and isinstance(value, int | float):
                found[key] = value
    return found


def _lines(metrics: Path) -> Iterator[dict]:
    try:
        texts = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def _chosen(model: Path) -> str:
    """Return what chose the weights, where they are not the last ones."""
    best = json.loads((model / PROVENANCE).read_text(encoding="utf-8")).get("best")
    return (
        "" if best is None else f" (those of step {best['step']}, with the best {best['metric']}: {best['value']:.4f})"
    )


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
