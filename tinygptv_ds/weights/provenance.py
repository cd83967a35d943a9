"""Where weights come from: the notes in a run's `model/` folder and in everything that is exported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinygptv_ds import __version__
from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.files import sha256
from tinygptv_ds.weights.detect import PROVENANCE

BASE_PARTS = ("phi", "eva_vit", "qformer")


def provenance_of(recipe: Recipe) -> dict[str, Any]:
    """Return what `save_trained` notes of a run: stage, recipe, and the paths and sizes in bytes of base weights."""
    paths = {part: Path(getattr(recipe.model, part)).resolve() for part in BASE_PARTS}
    return {
        "stage": recipe.stage,
        "recipe": recipe_with_base(recipe, {part: str(path) for part, path in paths.items()}),
        "base": {part: {"path": str(path), "bytes": size_of(path)} for part, path in paths.items()},
    }


def recipe_with_base(recipe: Recipe, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the recipe as a dictionary that names its base weights as in `paths`, by part."""
    model = dataclasses.replace(recipe.model, phi=paths["phi"], eva_vit=paths["eva_vit"], qformer=paths["qformer"])
    return recipe_dict(dataclasses.replace(recipe, model=model))


def write_provenance(folder: Path, notes: Mapping[str, Any]) -> None:
    """Write `provenance.json`: the notes, and the versions of this package and of torch."""
    versions = {"tinygptv_ds": __version__, "torch": str(torch.__version__)}
    text = json.dumps({**notes, "versions": versions}, indent=2, default=str)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")


def hashes(files: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        return {file.name: sha256(file, bar.update) for file in files}


def size_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files of a folder together."""
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
