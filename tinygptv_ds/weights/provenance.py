"""Where weights come from: the notes next to a run's `model/` and next to everything that is exported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tinygptv_ds import __version__
from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.files import sha256
from tinygptv_ds.weights.detect import PROVENANCE
from tinygptv_ds.weights.io import weight_files
from tinygptv_ds.weights.trained import frozen_updates

if TYPE_CHECKING:
    from tinygptv_ds.weights.resolve import Resolved

BASE_PARTS = ("phi", "eva_vit", "qformer")


def provenance_of(recipe: Recipe) -> dict[str, Any]:
    """What `save_trained` notes of a run: stage, recipe, and where the base weights lie, with their sizes in bytes."""
    paths = {part: Path(getattr(recipe.model, part)).resolve() for part in BASE_PARTS}
    return {
        "stage": recipe.stage,
        "recipe": _with_base(recipe, {part: str(path) for part, path in paths.items()}),
        "base": {part: {"path": str(path), "bytes": size_of(path)} for part, path in paths.items()},
    }


def hashed(resolved: Resolved) -> dict[str, Any]:
    """As `provenance_of`, with the SHA-256 of every file of base and trained weights."""
    notes = provenance_of(resolved.recipe)
    for part, path in resolved.base.items():
        notes["base"][part]["files"] = hashes(weight_files(path))
    return notes | {"trained": hashes(resolved.opened.files), "frozen_updates": frozen_updates(resolved.trained)}


def shareable(resolved: Resolved) -> dict[str, Any]:
    """As `hashed`, with the names of the base weights in place of where they lie on this machine."""
    notes = hashed(resolved)
    notes["base"] = {part: {"files": base["files"]} for part, base in notes["base"].items()}
    return notes | {"recipe": _with_base(resolved.recipe, {p: path.name for p, path in resolved.base.items()})}


def write_provenance(folder: Path, notes: Mapping[str, Any]) -> None:
    """Write `provenance.json`; the versions are added."""
    versions = {"tinygptv_ds": __version__, "torch": str(torch.__version__)}
    text = json.dumps({**notes, "versions": versions}, indent=2, default=str)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")


def hashes(files: list[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        return {file.name: sha256(file, bar.update) for file in files}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _with_base(recipe: Recipe, places: Mapping[str, str]) -> dict[str, Any]:
    return recipe_dict(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **places)))
