"""Evaluation results for the card of an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import WeightsError

_COUNTS = ("step", "questions", "empty_answers", "unparsable_answers")


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Read results of evaluation by the name of their file.

    Raises:
        WeightsError: a file is none.
    """
    return {path.stem: _read(path) for path in files}


def scores_of_run(trained: Path, recipe: Recipe) -> list[Path]:
    """Return the results that a run has written after its last step; none if it exported another step."""
    if recipe.train.result != "last":
        return []
    step = Path("evaluation", f"step-{recipe.train.total_steps:08d}")
    return next((found for run in (trained, trained.parent) if (found := sorted((run / step).glob("*.json")))), [])


def measures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a result by name, without its counts."""
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _COUNTS
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"--scores {path}: {error}; evaluation writes such a file with --json FILE") from None
    if not isinstance(result, dict):
        raise WeightsError(f"--scores {path}: not an evaluation result, which is a JSON object")
    return result
