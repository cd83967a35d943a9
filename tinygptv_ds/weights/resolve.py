"""From a run, a checkpoint or a file to a whole model: its recipe, base weights and trained weights, all checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tinygptv_ds.config.load import apply_overrides, build_recipe, load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.resources import project_root
from tinygptv_ds.weights.assemble import (
    all_weights,
    assemble,
    base_paths,
    load_tokenizer,
    meta_model,
    model_config,
)
from tinygptv_ds.weights.detect import Opened, guess_stage, open_any
from tinygptv_ds.weights.folders import weight_files
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.provenance import hashes, provenance_of, recipe_with_base, size_of
from tinygptv_ds.weights.source import Source
from tinygptv_ds.weights.trained import check_fit, recipe_of_run, trained_source, whole_source


@dataclass(frozen=True)
class Resolved:
    """A whole model of which nothing is read yet.

    Attributes:
        opened: the file or folder of the trained weights.
        recipe: of the stage that trained them, with the present paths of the base weights.
        config: the model's.
        trained: the trained weights, and whatever else replaces weights of the base models.
    """

    opened: Opened
    recipe: Recipe
    config: TinyGPTVConfig
    trained: Source

    @property
    def base(self) -> dict[str, Path]:
        """The paths of the base weights by part."""
        return base_paths(self.recipe.model)

    def weights(self) -> dict[str, Stored]:
        """Return every parameter by canonical name, in the model's order."""
        return all_weights(self.config, self.base, self.trained)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return Phi's tokenizer."""
        return load_tokenizer(self.base["phi"])

    def model(self, dtype: torch.dtype) -> TinyGPTVForConditionalGeneration:
        """Return the model in memory on the CPU, with LoRA kept apart, all of it in `dtype`."""
        model = assemble(self.config, self.base, self.trained, frozen_dtype=dtype)
        return model.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature

    def provenance(self) -> dict[str, Any]:
        """Return `provenance_of` the recipe and the SHA-256 of every file of base and trained weights."""
        notes = provenance_of(self.recipe)
        for part, path in self.base.items():
            notes["base"][part]["files"] = hashes(weight_files(path))
        return notes | {"trained": hashes(self.opened.files), "frozen_updates": self.trained.frozen_updates}

    def shareable_provenance(self) -> dict[str, Any]:
        """Return `provenance` with the names of the base weights instead of their paths on this machine."""
        notes = self.provenance()
        notes["base"] = {part: {"files": base["files"]} for part, base in notes["base"].items()}
        names = {part: path.name for part, path in self.base.items()}
        return notes | {"recipe": recipe_with_base(self.recipe, names)}


def resolve(path: Path, recipe: Path | None = None, overrides: Sequence[str] = ()) -> Resolved:
    """Find everything that a model consists of.

    Args:
        path: anything that `open_any` opens and that holds trained weights.
        recipe: the stage's YAML; None takes the one noted with a run's weights, and for the original's files the
            published recipe of their stage.
        overrides: `key=value` changes to the recipe as of `--set`, e.g. other paths of base weights.

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
    """Find the trained weights alone, for which no base is needed; arguments and errors as of `resolve`."""
    opened = open_any(Path(path))
    if not opened.of_one_stage:
        return opened, trained_source(opened)
    found = load_recipe(recipe, overrides) if recipe else _recipe_of(opened, overrides)
    return opened, whole_source(opened, found.model.init_from)


def _recipe_of(opened: Opened, overrides: Sequence[str]) -> Recipe:
    noted = opened.notes.get("recipe")
    if isinstance(noted, dict) and isinstance(noted.get("model"), dict):  # a checkpoint notes hashes alone
        return build_recipe(apply_overrides(noted, overrides), f"{opened.folder}/provenance.json")
    of_run = recipe_of_run(opened, overrides)
    if of_run is not None:
        return of_run
    guess = guess_stage(opened, trained_source(opened))
    if len(guess.stages) > 1:
        raise WeightsError(
            f"the stage of {opened.path} cannot be determined: {guess}. Name its recipe, e.g. --recipe "
            "stages/stage3.yaml"
        )
    published = project_root() / f"stages/stage{guess.stages[0]}.yaml"
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
    """Check that the base weights exist and that those noted by the run have not changed since."""
    paths = base_paths(recipe.model)
    gone = [f"{part} ({path})" for part, path in paths.items() if not path.exists()]
    if gone:
        raise WeightsError(
            f"base weights of {opened.path} are missing: {', '.join(gone)}; put them back, or give their new place, "
            f"e.g. --set model.{gone[0].split()[0]}=PATH"
        )
    noted = opened.notes.get("base")
    for part, path in paths.items():
        note = noted.get(part, {}) if isinstance(noted, dict) else {}
        if note.get("path") == str(path) and note.get("bytes") not in (None, size_of(path)):
            raise WeightsError(
                f"{path} has changed since {opened.path} was trained on it: {size_of(path)} bytes instead of "
                f"{note['bytes']}. Put the old files back, or give their place with --set model.{part}=PATH"
            )
