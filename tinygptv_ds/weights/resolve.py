"""From a run, a checkpoint or a file to a whole model: its recipe, base weights and trained weights, all checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tinygptv_ds.config.load import apply_overrides, build_recipe, load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import (
    all_weights,
    assemble,
    base_paths,
    load_tokenizer,
    meta_model,
    model_config,
)
from tinygptv_ds.weights.detect import Opened, open_any
from tinygptv_ds.weights.guess_stage import guess_stage
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.provenance import size_of
from tinygptv_ds.weights.source import Source
from tinygptv_ds.weights.trained import adjacent_recipe, check_fit, trained_source, whole_source

STAGES = Path(__file__).resolve().parents[2] / "stages"


@dataclass(frozen=True)
class Resolved:
    """A whole model of which nothing is read yet.

    Attributes:
        opened: where the trained weights lie.
        recipe: of the stage that trained them, with the base weights' present places.
        config: the model's.
        trained: the trained weights, and what else replaces the base models'.
    """

    opened: Opened
    recipe: Recipe
    config: TinyGPTVConfig
    trained: Source

    @property
    def base(self) -> dict[str, Path]:
        """Where the base weights lie, by part."""
        return base_paths(self.recipe.model)

    def weights(self) -> dict[str, Stored]:
        """Every parameter by canonical name, in the model's order."""
        return all_weights(self.config, self.base, self.trained)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Phi's."""
        return load_tokenizer(self.base["phi"])

    def model(self, dtype: torch.dtype) -> TinyGPTVForConditionalGeneration:
        """The model in memory on the CPU, LoRA apart, all of it in `dtype`."""
        return assemble(self.config, self.base, self.trained, frozen_dtype=dtype).to(dtype)


def resolve(path: Path, recipe: Path | None = None, overrides: Sequence[str] = ()) -> Resolved:
    """Find all that a model consists of.

    Args:
        path: anything that `open_any` opens and that holds trained weights.
        recipe: the stage's YAML; None takes the one that lies with a run's weights, and for the original's files the
            published recipe of their stage.
        overrides: `key=value` changes to the recipe as of `--set`, such as other places of base weights.

    Raises:
        WeightsError: something is missing or does not fit, or the stage is not known.
        ConfigError: the recipe cannot be read, or is of another stage.
    """
    opened = open_any(Path(path))
    found = load_recipe(recipe, overrides) if recipe else _recipe_of(opened, overrides)
    _check_stage(opened, found)
    _check_base(opened, found)
    config = model_config(found.model, found.text)
    trained = whole_source(opened, found.model.init_from)
    check_fit(meta_model(config), opened, trained)
    return Resolved(opened, found, config, trained)


def resolve_trained(path: Path, recipe: Path | None = None, overrides: Sequence[str] = ()) -> tuple[Opened, Source]:
    """The trained weights alone, for which no base is needed; arguments and errors as of `resolve`."""
    opened = open_any(Path(path))
    if not opened.of_one_stage:
        return opened, trained_source(opened)
    found = load_recipe(recipe, overrides) if recipe else _recipe_of(opened, overrides)
    return opened, whole_source(opened, found.model.init_from)


def _recipe_of(opened: Opened, overrides: Sequence[str]) -> Recipe:
    noted = opened.notes.get("recipe")
    if isinstance(noted, dict) and isinstance(noted.get("model"), dict):  # a checkpoint notes hashes alone
        return build_recipe(apply_overrides(noted, overrides), f"{opened.folder}/provenance.json")
    adjacent = adjacent_recipe(opened, overrides)
    if adjacent is not None:
        return adjacent
    guess = guess_stage(opened, trained_source(opened))
    if len(guess.stages) > 1:
        raise WeightsError(
            f"{opened.path} does not tell its stage: {guess}. Name its recipe, e.g. --recipe stages/stage3.yaml"
        )
    published = STAGES / f"stage{guess.stages[0]}.yaml"
    if not published.is_file():
        raise ConfigError(f"{opened.path} seems to be of stage {guess}; name that stage's recipe with --recipe FILE")
    return load_recipe(published, overrides)


def _check_stage(opened: Opened, recipe: Recipe) -> None:
    released = opened.released
    if released is not None and released.stage != recipe.stage:
        raise ConfigError(
            f"{opened.path} is the released file of stage {released.stage}, but the recipe is of stage {recipe.stage}; "
            f"use --recipe stages/stage{released.stage}.yaml"
        )


def _check_base(opened: Opened, recipe: Recipe) -> None:
    """The base weights must be there, and those that the run has noted must not have changed since."""
    paths = base_paths(recipe.model)
    gone = [f"{part} ({path})" for part, path in paths.items() if not path.exists()]
    if gone:
        raise WeightsError(
            f"the base weights of {opened.path} are not there: {', '.join(gone)}; put them back, or say where they "
            f"are, e.g. --set model.{gone[0].split()[0]}=PATH"
        )
    noted = opened.notes.get("base")
    for part, path in paths.items():
        note = noted.get(part, {}) if isinstance(noted, dict) else {}
        if note.get("path") == str(path) and note.get("bytes") not in (None, size_of(path)):
            raise WeightsError(
                f"{path} has changed since {opened.path} was trained on it: {size_of(path)} bytes instead of "
                f"{note['bytes']}. Put the old files back, or say where they are with --set model.{part}=PATH"
            )
