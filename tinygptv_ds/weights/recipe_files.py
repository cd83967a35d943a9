"""The check that the weights and shards of a recipe exist, before anything is loaded, with the remedy for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tinygptv_ds.config.recipe import ModelSection, Recipe
from tinygptv_ds.data.stream.availability import absent, options_without
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import check_is_file

_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models"
HOW_TO_GET_WEIGHTS = {
    "phi": "Phi-2: 'hf download microsoft/phi-2 --local-dir DIR', then name that folder",
    "eva_vit": f"EVA ViT-g (2 GB): {_LAVIS}/BLIP2/eva_vit_g.pth",
    "qformer": f"BLIP-2's Q-Former: {_LAVIS}/BLIP2/blip2_pretrained_flant5xxl.pth",
    "init_from": "train the stage before this one (its run directory is what is named here), or take a released "
    "TinyGPT-V file: 'hf download Tyrannosaurus/TinyGPT-V'",
}


def check_files(recipe: Recipe, further_problems: Sequence[str] = ()) -> None:
    """Check that every weight file and dataset that a recipe names exists.

    Args:
        recipe: the checked recipe.
        further_problems: what the caller has found to be wrong; reported in the same error.

    Raises:
        ConfigError: lists everything that is missing, each with its remedy. If some datasets exist and others do not,
            it ends with the option that trains on the former.
    """
    away = absent(recipe.data)
    problems = [*_weights(recipe.model), *away.values(), *further_problems]
    if problems:
        lines = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
        options = options_without(recipe.data, away)
        subset = f"\nTo train on the datasets that are there: {' '.join(options)}" if options else ""
        raise ConfigError(
            f"{len(problems)} thing(s) that the recipe of stage {recipe.stage} names cannot be used:\n{lines}{subset}"
        )


def _weights(model: ModelSection) -> list[str]:
    problems = []
    for name, remedy in HOW_TO_GET_WEIGHTS.items():
        path = getattr(model, name)
        problem = None if path is None else _why_unreadable(path)
        if problem is not None:
            problems.append(f"model.{name}: {path} {problem}. {remedy}. Or --set model.{name}=PATH")
    if _why_unreadable(model.phi) is None and not (Path(model.phi) / "config.json").is_file():
        problems.append(f"model.phi: {model.phi} has no config.json; it must be a folder as transformers saves it")
    return problems


def _why_unreadable(path: str) -> str | None:
    """Return what keeps a file or folder from being read; None: nothing."""
    try:
        if Path(path).is_dir():
            os.scandir(path).close()
        else:
            check_is_file(Path(path))
            with Path(path).open("rb"):
                return None
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None
