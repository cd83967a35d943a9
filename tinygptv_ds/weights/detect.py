"""What a path holds: a run, a checkpoint, a file of the original's, an adapter, a base model; detected from names.

`Opened` has the tensors under the names of their file; `canonical_source` gives them their canonical names, and
`guess_stage` finds the stage that trained them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygptv_ds.config.paths import local_path
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.parameters import lora, projections
from tinygptv_ds.weights.folders import open_file, open_weights, weight_files
from tinygptv_ds.weights.io import Stored, read_json
from tinygptv_ds.weights.kinds import kind_of
from tinygptv_ds.weights.layouts.blip2 import canonical_name as blip2_name
from tinygptv_ds.weights.layouts.deepspeed_checkpoint import open_deepspeed, step_folder
from tinygptv_ds.weights.layouts.eva import canonical_name as eva_name
from tinygptv_ds.weights.layouts.phi2 import to_canonical
from tinygptv_ds.weights.layouts.tinygptv import original_source
from tinygptv_ds.weights.opening import model_weights
from tinygptv_ds.weights.other_files import not_there
from tinygptv_ds.weights.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from tinygptv_ds.weights.released import Released, released_by_size
from tinygptv_ds.weights.source import Source, rename_all

WEIGHTS = "trained.safetensors"
PROVENANCE = "provenance.json"
RECIPE = "recipe.yaml"
STATE = "state.safetensors"
# A weight file that has the second file next to it is opened as the folder of both.
_NOTES_OF = {WEIGHTS: PROVENANCE, STATE: "state.json", ADAPTER_WEIGHTS: ADAPTER_CONFIG}


@dataclass(frozen=True)
class Opened:
    """Weights that were found, under the names of their file.

    Attributes:
        path: the path that was given.
        container: the sort of file or folder, for messages.
        kind: a key of `KINDS`.
        files: the files that hold the weights.
        stored: tensors by the file's own names.
        folder: the folder of a run, a model or an adapter with its notes; None for a file alone.
        notes: what else is there: of a `.pth` all but "model"; of a folder its provenance.json or state.json.
        ignored: names that are there and that nothing needs.
        of_one_stage: whether this holds only what its stage trains, as checkpoints do.
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
        """The released file of the authors that this seems to be, by its size."""
        return released_by_size(self.path.stat().st_size) if self.path.is_file() else None


def open_any(path: Path) -> Opened:
    """Open a file, a folder of weights, a run directory, its `model/`, an adapter, or a checkpoint.

    Raises:
        WeightsError: nothing is there, it is damaged, or it is none of these.
    """
    path = local_path(path)
    if path.is_file() and path.name in _NOTES_OF and (path.parent / _NOTES_OF[path.name]).is_file():
        return open_any(path.parent)
    if path.is_file():
        _refuse_broken(path)
        tensors, notes = open_file(path)
        stored, outside = model_weights(tensors, path)
        container = "PyTorch file" if notes or path.suffix in (".pth", ".pt", ".bin") else "file"
        return Opened(path, container, kind_of(stored, path), [path], stored, notes=notes, ignored=outside)
    if not path.is_dir():
        raise WeightsError(f"{path}: {not_there(path)}")
    for folder, container in ((path / "model", "run directory"), (path, "model/ folder of a run")):
        if (folder / WEIGHTS).is_file():
            return _model_folder(path, folder, container)
    if (path / STATE).is_file():
        return _checkpoint(path)
    step = step_folder(path)
    if step is not None:
        return _deepspeed(path, step)
    _refuse_unfinished(path)
    stored, outside = model_weights(open_weights(path), path)
    notes = read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else {}
    kind = kind_of(stored, path)
    if is_adapter(path):
        kind = _kind_of_adapter(stored, path, kind)
    container = "peft adapter" if is_adapter(path) else "exported model" if kind == "model" else "folder of weights"
    return Opened(path, container, kind, weight_files(path), stored, path, notes, outside)


def canonical_source(opened: Opened, heads: int) -> Source:
    """Return all that a file holds under canonical names; names that nothing needs are among `ignored`.

    Args:
        opened: the file.
        heads: Phi's attention heads, by which its rows are reordered when they are read; names and shapes do not
            depend on them.

    Raises:
        WeightsError: it mixes layouts.
    """
    if opened.kind == "phi":
        return to_canonical(opened.stored, opened.ignored, heads, opened.path)
    if opened.kind == "eva_vit":
        return rename_all(opened.stored, opened.ignored, eva_name, opened.path)
    if opened.kind == "blip2":
        return rename_all(opened.stored, opened.ignored, blip2_name, opened.path)
    return original_source(opened.stored, opened.path, opened.ignored)


@dataclass(frozen=True)
class StageGuess:
    """The stages that may have trained the weights, and the evidence."""

    stages: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        return f"{' or '.join(map(str, self.stages))} ({self.why})"


def guess_stage(opened: Opened, source: Source) -> StageGuess:
    """Find the stage from a run's notes, the size of a released file, the original's configuration, or the names.

    Args:
        opened: the file or folder.
        source: the same weights under canonical names.
    """
    if isinstance(opened.notes.get("stage"), int):
        return StageGuess((opened.notes["stage"],), "its provenance.json")
    if opened.released is not None:
        return StageGuess((opened.released.stage,), f"the size of the released {opened.released.name}")
    has_lora = any(map(lora, source.weights))
    stage = _stage_by_configuration(opened.notes.get("config"), has_lora)
    if stage is not None:
        return StageGuess((stage,), "the configuration in the file")
    if any(name.startswith("qformer.") for name in source.weights):
        return StageGuess((4,), "a trained Q-Former, as in the first release")
    if has_lora:
        return StageGuess((2, 3, 4), "LoRA; these three train the same parts")
    return StageGuess((1,), "no LoRA")


def _stage_by_configuration(config: Any, has_lora: bool) -> int | None:
    """Find the stage from the configuration that the original saves: model class and datasets differ by stage."""
    if not isinstance(config, dict):
        return None
    model, datasets = config.get("model"), config.get("datasets")
    if isinstance(model, dict) and model.get("arch") == "minigpt_v2":
        return 4
    if not isinstance(datasets, dict):
        return None
    if "cc_sbu_align" in datasets:
        return 3
    return (2 if has_lora else 1) if {"laion", "cc_sbu"} & datasets.keys() else None


def _kind_of_run(names: Iterable[str], path: Path) -> str:
    """Return "trained" for a run's own weights, even if they are the whole model or one of its base models."""
    kind = kind_of(names, path)
    return kind if kind == "projection" else "trained"


def _kind_of_adapter(stored: Mapping[str, Stored], path: Path, kind: str) -> str:
    """Return "trained" for an adapter that holds all that a stage trains, "adapter" for any other."""
    names = original_source(stored, path).weights
    elsewhere = any(lora(name) and not name.startswith("language_model.") for name in names)
    dora = any(name.endswith(".lora_magnitude_vector") for name in names)
    whole = kind == "trained" and any(map(projections, names)) and not elsewhere and not dora
    return "trained" if whole else "adapter"


def _model_folder(path: Path, folder: Path, container: str) -> Opened:
    file = folder / WEIGHTS
    stored, _ = model_weights(open_file(file)[0], file, "trained")
    notes = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    return Opened(path, container, _kind_of_run(stored, file), [file], stored, folder, notes)


def _checkpoint(path: Path) -> Opened:
    """Open a checkpoint of a run without its optimizer moments."""
    stored, _ = open_file(path / STATE)
    weights = {name.removeprefix("weight/"): value for name, value in stored.items() if name.startswith("weight/")}
    moments = sorted(stored.keys() - {f"weight/{name}" for name in weights})
    weights, _ = model_weights(weights, path / STATE, "trained")
    run = path.resolve().parents[1]
    notes = read_json(path / "state.json")
    kind = _kind_of_run(weights, path)
    return Opened(path, "checkpoint of a run", kind, [path / STATE], weights, run, notes, moments, True)


def _deepspeed(path: Path, step: Path) -> Opened:
    found = open_deepspeed(step)
    container = f"DeepSpeed checkpoint (ZeRO-{found.zero_stage}, {found.ranks} rank(s))"
    run = next((parent for parent in step.resolve().parents[:3] if (parent / RECIPE).is_file()), None)
    files = sorted(step.glob("*_states.pt"))
    weights, _ = model_weights(found.weights, step, "trained")
    kind = kind_of(weights, step)
    return Opened(path, container, kind, files, weights, run, {"step": found.step}, found.frozen, True)


def _refuse_broken(path: Path) -> None:
    released = released_by_size(path.stat().st_size)
    if released is not None and not released.usable:
        raise WeightsError(f"{path} has the size of {released.name}, {released.note}")


def _refuse_unfinished(path: Path) -> None:
    checkpoints = sorted(path.glob("checkpoints/step-*[0-9]"))
    if checkpoints:
        raise WeightsError(f"{path}: the run has not finished; let it finish, or name its checkpoint {checkpoints[-1]}")
    if (path / RECIPE).is_file() and not any(path.glob("*.safetensors")):
        raise WeightsError(f"{path}: the run has not finished and has no checkpoint yet; start it again to resume it")
