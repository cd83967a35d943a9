"""Are the files that a recipe names there? Asked before anything is loaded, and answered with how to get them."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.config.schema import DataSection, ModelSection, Recipe
from tinygptv_ds.data.features import shards_of
from tinygptv_ds.data.sets import how_to_get
from tinygptv_ds.errors import ConfigError, DataError

_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models"
HOW_TO_GET_WEIGHTS = {
    "phi": "Phi-2: 'hf download microsoft/phi-2 --local-dir DIR', then name that folder",
    "eva_vit": f"EVA ViT-g (2 GB): {_LAVIS}/BLIP2/eva_vit_g.pth",
    "qformer": f"BLIP-2's Q-Former: {_LAVIS}/BLIP2/blip2_pretrained_flant5xxl.pth",
    "init_from": "train the stage before this one (its run directory is what is named here), or take a released "
    "TinyGPT-V file: 'hf download Tyrannosaurus/TinyGPT-V'",
}


def check_files(recipe: Recipe) -> None:
    """Raise one `ConfigError` that lists every missing weight file and dataset, each with its remedy."""
    problems = [*_weights(recipe.model), *_datasets(recipe.data)]
    if problems:
        lines = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
        raise ConfigError(
            f"{len(problems)} thing(s) that the recipe of stage {recipe.stage} names cannot be used:\n{lines}"
        )


def _weights(model: ModelSection) -> list[str]:
    problems = []
    for name, remedy in HOW_TO_GET_WEIGHTS.items():
        path = getattr(model, name)
        if path is not None and not Path(path).exists():
            problems.append(f"model.{name}: {path} does not exist. {remedy}. Or --set model.{name}=PATH")
    if Path(model.phi).exists() and not (Path(model.phi) / "config.json").is_file():
        problems.append(f"model.phi: {model.phi} has no config.json; it must be a folder as transformers saves it")
    return problems


def _datasets(data: DataSection) -> list[str]:
    problems = []
    for dataset, root in [*((d, data.features) for d in data.datasets), *((d, None) for d in data.validation)]:
        try:
            shards_of(dataset, root)
        except DataError as error:
            remedy = f"\n{how_to_get(dataset.name)}" if root is None else ""
            problems.append(f"dataset {dataset.name}: {error}{remedy}")
    return problems
