"""Which model answered: its hash, its step, and the TensorBoard folder of its run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.evaluation.benchmarks.held_out import CAPTION
from tinygptv_ds.evaluation.wording import bare_captions
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.weights.detect import Opened, open_any
from tinygptv_ds.weights.provenance import hashes
from tinygptv_ds.weights.resolve import resolve


@dataclass(frozen=True)
class ScoredModel:
    """The identity of a model in results.

    Attributes:
        model: the path that was given.
        files: those of its weights.
        step: optimizer steps that it was trained for; None if unknown.
        board: the TensorBoard folder of the run that it is in, if it is in one.
    """

    model: str
    files: tuple[Path, ...]
    step: int | None
    board: Path | None

    @cached_property
    def checkpoint(self) -> str:
        """SHA-256 of its file of weights; of several files, that of their names with their hashes.

        Each file is read whole: take it after the model is loaded, which refuses wrong weights by names and shapes.
        """
        digests = hashes(list(self.files))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return next(iter(digests.values())) if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def identify(path: Path) -> ScoredModel:
    """Return the identity of the model at `path`; raises WeightsError where there is none."""
    opened = open_any(path)
    boards = (folder / "tensorboard" for folder in (path, *path.resolve().parents[:2]))
    return ScoredModel(
        str(path), tuple(opened.files), _step(opened), next((board for board in boards if board.is_dir()), None)
    )


def config_of(path: Path, overrides: list[str], recipe: Path | None) -> TinyGPTVConfig:
    """Return a model's configuration without reading its weights."""
    if (path / "processor_config.json").is_file():
        return TinyGPTVConfig.from_pretrained(path)
    return resolve(path, recipe, overrides).config


def trained_captions(path: Path) -> str | None:
    """Return what the model at `path` was trained to answer with bare captions; None: to the image alone.

    It is what its own recipe says (`text.prompts`); weights without one, such as the released ones, have `CAPTION`.
    """
    notes = open_any(path).notes
    recipe, flat = notes.get("recipe"), notes.get("must_match")  # a checkpoint holds the recipe's values by dotted key
    if isinstance(recipe, dict) and isinstance(recipe.get("text"), dict):
        return bare_captions(recipe["text"].get("prompts"))
    if isinstance(flat, dict) and "text.prompts" in flat:
        return bare_captions(flat["text.prompts"])
    return CAPTION


def _step(opened: Opened) -> int | None:
    """Return a checkpoint's own step, or the last step of the finished run whose weights these are."""
    step, recipe = opened.notes.get("step"), opened.notes.get("recipe")
    if isinstance(step, int):
        return step
    return _last_step(recipe) if isinstance(recipe, dict) and isinstance(recipe.get("train"), dict) else None


def _last_step(recipe: dict[str, Any]) -> int:
    return build_recipe(recipe, "provenance.json").train.total_steps
