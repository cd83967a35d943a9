"""What a path holds: a run, a checkpoint, a file of the original's, a base model; told from names, never asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing, open_file, open_weights, read_json, weight_files
from tinygptv_ds.weights.layouts.deepspeed_checkpoint import open_deepspeed, step_folder
from tinygptv_ds.weights.layouts.original import unwrapped
from tinygptv_ds.weights.released import Released, released_by_size

WEIGHTS = "trained.safetensors"
PROVENANCE = "provenance.json"
RECIPE = "recipe.yaml"
STATE = "state.safetensors"
_SIBLINGS = {WEIGHTS: PROVENANCE, STATE: "state.json"}  # with which a file is more than a file
KINDS = {
    "phi": "Phi",
    "eva_vit": "EVA ViT",
    "blip2": "Q-Former of BLIP-2",
    "projection": "first projection, as of MiniGPT-4",
    "trained": "trained weights of TinyGPT-V",
    "model": "whole TinyGPT-V",
}
_PHI = re.compile(r"transformer\.h\.\d+\.mixer\.Wqkv\.|model\.layers\.\d+\.self_attn\.(query_key_value|[qkv]_proj)\.")
_TRAINED = re.compile(
    r"(llama_model\.|llama_proj2?\."
    r"|language_model\..*(q_layernorm|k_layernorm|post_layernorm|\.lora_[AB])\.|base_model\.model\..*\.lora_[AB]\.)"
)


@dataclass(frozen=True)
class Opened:
    """Weights that were found, under the names of their file.

    Attributes:
        path: what was asked for.
        container: the sort of file or folder, in words.
        kind: a key of `KINDS`.
        files: the files that hold the weights.
        stored: tensors by the file's own names.
        folder: the folder of a run or a model with its notes next to, else None.
        notes: what else is there: of a `.pth` all but "model"; of a folder its provenance.json or state.json.
        ignored: names that are there and of no use.
        of_one_stage: whether this holds no more than its stage trains, as checkpoints do.
    """

    path: Path
    container: str
    kind: str
    files: list[Path]
    stored: dict[str, Stored]
    folder: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    of_one_stage: bool = False

    @property
    def released(self) -> Released | None:
        """Which of the authors' released files this seems to be, by its size."""
        return released_by_size(self.path.stat().st_size) if self.path.is_file() else None


def open_any(path: Path) -> Opened:
    """Open a file, a folder of weights, a run directory, its `model/`, a checkpoint of ours or of DeepSpeed's.

    Raises:
        WeightsError: nothing is there, it is damaged, or it is none of these.
    """
    path = Path(path)
    if path.is_file() and path.name in (WEIGHTS, STATE) and (path.parent / _SIBLINGS[path.name]).is_file():
        return open_any(path.parent)
    if path.is_file():
        _refuse_broken(path)
        stored, notes = open_file(path)
        container = "PyTorch file" if notes or path.suffix in (".pth", ".pt", ".bin") else "file"
        return Opened(path, container, kind_of(stored, path), [path], stored, notes=notes)
    if not path.is_dir():
        raise WeightsError(
            f"{path}: no such run or file; give a run directory, a checkpoint, a folder of weights or a weights' file"
        )
    for folder, container in ((path / "model", "run directory"), (path, "model/ folder of a run")):
        if (folder / WEIGHTS).is_file():
            return _model_folder(path, folder, container)
    if (path / STATE).is_file():
        return _checkpoint(path)
    step = step_folder(path)
    if step is not None:
        return _deepspeed(path, step)
    _refuse_unfinished(path)
    stored = open_weights(path)
    notes = read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else {}
    kind = kind_of(stored, path)
    container = "exported model" if kind == "model" else "folder of weights"
    return Opened(path, container, kind, weight_files(path), stored, path, notes)


def kind_of(names: Iterable[str], path: Path) -> str:
    """Which of `KINDS` these names are of; `path` is named in errors.

    Raises:
        WeightsError: of none.
    """
    names = [unwrapped(name) for name in names]
    if any(map(_TRAINED.match, names)):
        if all(re.fullmatch(r"llama_proj\.(weight|bias)", name) for name in names):
            return "projection"
        whole = any(name.endswith("model.embed_tokens.weight") for name in names)
        return "model" if whole and any(name.startswith("visual_encoder.") for name in names) else "trained"
    if any(name == "query_tokens" or name.lower().startswith("qformer.") for name in names):
        return "blip2"
    if any(name.startswith("blocks.") for name in names):
        return "eva_vit"
    if any(map(_PHI.match, names)):
        return "phi"
    raise WeightsError(
        f"{path}: holds {listing(names)}: neither {', nor '.join(KINDS.values())}. Is it the file you meant?"
    )


def _trained(names: Iterable[str], path: Path) -> str:
    """The kind of a run's own weights: trained, even where they are the whole model or one of its base models."""
    kind = kind_of(names, path)
    return kind if kind == "projection" else "trained"


def _model_folder(path: Path, folder: Path, container: str) -> Opened:
    file = folder / WEIGHTS
    stored, _ = open_file(file)
    notes = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    return Opened(path, container, _trained(stored, file), [file], stored, folder, notes)


def _checkpoint(path: Path) -> Opened:
    """A checkpoint of a run's; its optimizer moments are left aside."""
    stored, _ = open_file(path / STATE)
    weights = {name.removeprefix("weight/"): value for name, value in stored.items() if name.startswith("weight/")}
    moments = sorted(stored.keys() - {f"weight/{name}" for name in weights})
    run = path.resolve().parents[1]
    notes = read_json(path / "state.json")
    kind = _trained(weights, path)
    return Opened(path, "checkpoint of a run", kind, [path / STATE], weights, run, notes, moments, True)


def _deepspeed(path: Path, step: Path) -> Opened:
    found = open_deepspeed(step)
    container = f"DeepSpeed checkpoint (ZeRO-{found.zero_stage}, {found.ranks} rank(s))"
    run = next((parent for parent in step.resolve().parents[:3] if (parent / RECIPE).is_file()), None)
    files = sorted(step.glob("*_states.pt"))
    kind = kind_of(found.weights, step)
    return Opened(path, container, kind, files, found.weights, run, {"step": found.step}, found.frozen, True)


def _refuse_broken(path: Path) -> None:
    released = released_by_size(path.stat().st_size)
    if released is not None and not released.usable:
        raise WeightsError(f"{path} has the size of {released.name}, {released.note}")


def _refuse_unfinished(path: Path) -> None:
    checkpoints = sorted(path.glob("checkpoints/step-*[0-9]"))
    if checkpoints:
        raise WeightsError(f"{path}: the run has not finished; let it finish, or name its checkpoint {checkpoints[-1]}")
    if (path / RECIPE).is_file() and not any(path.glob("*.safetensors")):
        raise WeightsError(f"{path}: the run has not finished and has no checkpoint yet; start it again to go on")
