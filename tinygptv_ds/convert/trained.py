"""What a stage trained: a run's `model/` folder, and loading it or one of the original's files into a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinygptv_ds import __version__
from tinygptv_ds.config.schema import Recipe
from tinygptv_ds.convert.files import Source, check_weights, copy_weights, open_weights, read_json
from tinygptv_ds.convert.tinygptv_pth import original_source
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.trainable import lora, norms, projections

WEIGHTS = "trained.safetensors"
PROVENANCE = "provenance.json"
BASE_PARTS = ("phi", "eva_vit", "qformer")
_FIRST_PROJECTION = {"llama_proj.weight", "llama_proj.bias"}


def provenance_of(recipe: Recipe) -> dict[str, Any]:
    """What `save_trained` notes of a run: stage, recipe, and where the base weights lie, with their sizes in bytes."""
    paths = {part: Path(getattr(recipe.model, part)).resolve() for part in BASE_PARTS}
    return {
        "stage": recipe.stage,
        "recipe": dataclasses.asdict(recipe),
        "base": {part: {"path": str(path), "bytes": _bytes(path)} for part, path in paths.items()},
    }


def save_trained(state: Mapping[str, Tensor], config: TinyGPTVConfig, out: Path, provenance: Mapping[str, Any]) -> None:
    """Write a run's `model/` folder, complete or not at all; one that is there is replaced.

    Args:
        state: what was trained, by canonical name; stored in fp32.
        config: the model's.
        out: the folder; it gets `trained.safetensors`, `config.json` and `provenance.json`.
        provenance: from `provenance_of`; the hash of the weights and the versions are added.
    """
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(partial)
    notes = {
        **provenance,
        "sha256": {WEIGHTS: _sha256(partial / WEIGHTS)},
        "versions": {"tinygptv_ds": __version__, "torch": str(torch.__version__)},
    }
    (partial / PROVENANCE).write_text(json.dumps(notes, indent=2, default=str) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def trained_file(path: Path) -> Path:
    """The weights' file for a run directory, its `model/`, or the file itself.

    Raises:
        WeightsError: there is none.
    """
    if path.is_file():
        return path
    for file in (path / "model" / WEIGHTS, path / WEIGHTS):
        if file.is_file():
            return file
    if path.is_dir():
        raise WeightsError(f"{path}: no model/{WEIGHTS} there; the run has not finished, or this is no run directory")
    raise WeightsError(f"{path}: no such run or file; give a run directory, its model/ folder, or a .pth of TinyGPT-V")


def load_trained(model: nn.Module | Mapping[str, Tensor], path: Path) -> set[str]:
    """Copy the trained weights of an earlier stage into a model.

    Norms and projections must all be there, LoRA all or not at all (stage 1 trains none); a Q-Former may be. A file
    that holds nothing but `llama_proj` (MiniGPT-4's) starts the first projection.

    Args:
        model: the model, or its parameters by canonical name.
        path: a run directory, its `model/`, the file in it, or a `.pth` of the original.

    Returns:
        The canonical names that were loaded.

    Raises:
        WeightsError: a key is missing, unknown or of another shape, or LoRA does not fit the model's.
    """
    source = fitting_source(model, path)
    copy_weights(_parameters(model), source.weights)
    return set(source.weights)


def fitting_source(model: nn.Module | Mapping[str, Tensor], path: Path) -> Source:
    """The weights that `load_trained` would load, checked against the model but not read yet."""
    file = trained_file(Path(path))
    source = original_source(open_weights(file), file)
    config = getattr(model, "config", None)
    if config is not None and config.lora_r:
        _check_lora_scale(config, source)
    _check_trained({name: tuple(target.shape) for name, target in _parameters(model).items()}, source)
    return source


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else model


def _check_trained(shapes: Mapping[str, tuple[int, ...]], source: Source) -> None:
    given = source.weights.keys()
    if given == _FIRST_PROJECTION:
        LOGGER.warning("%s holds llama_proj alone: a start for the first projection, nothing else", source.path)
        required = _FIRST_PROJECTION
    else:
        _check_lora(shapes, source)
        has_lora = any(map(lora, given))
        required = {name for name in shapes if projections(name) or norms(name) or (has_lora and lora(name))}
    check_weights(
        {name: shape for name, shape in shapes.items() if name in required or name in given},
        source,
        "Trained weights go with the Phi, Q-Former, proj_hidden_size and lora_targets that they were trained with: "
        "point model.* at the same ones, or init_from at another run",
    )


def _check_lora(shapes: Mapping[str, tuple[int, ...]], source: Source) -> None:
    def ranks(named: Mapping[str, tuple[int, ...]]) -> set[int]:
        return {shape[0] for name, shape in named.items() if ".lora_A." in name}

    in_file, in_model = ranks({name: stored.shape for name, stored in source.weights.items()}), ranks(shapes)
    if not in_file or in_file == in_model:
        return
    rank = max(in_file)
    if not in_model:
        raise WeightsError(
            f"{source.path} holds LoRA of rank {rank}, the model has none (lora_r 0); set model.lora_r={rank}"
        )
    raise WeightsError(
        f"{source.path} holds LoRA of rank {rank}, the model's is {max(in_model)}; set model.lora_r={rank}, "
        "or start from the weights of a stage without LoRA"
    )


def _check_lora_scale(config: TinyGPTVConfig, source: Source) -> None:
    """Weights trained under another alpha would be applied with another strength."""
    beside = source.path.with_name("config.json")
    if source.path.name != WEIGHTS or not beside.is_file():
        return
    trained = read_json(beside)
    if trained.get("lora_r") and trained.get("lora_alpha") != config.lora_alpha:
        raise WeightsError(
            f"{source.path} was trained with lora_alpha {trained.get('lora_alpha')}, the model has "
            f"{config.lora_alpha}; set model.lora_alpha={trained.get('lora_alpha')}"
        )


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
