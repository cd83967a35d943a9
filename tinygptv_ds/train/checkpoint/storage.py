"""Portable checkpoints: what was trained, in fp32, with its optimizer moments, by canonical name.

A checkpoint is the folder `checkpoints/step-N` with `state.safetensors`, `state.json` (step, sample position, loss
scale, and the fingerprint that a resumed run must share) and `SHA256SUMS` of both, as `sha256sum -c` reads it. It is
written under a temporary name and renamed when complete, and can be resumed under another ZeRO stage and world
size. The random numbers of dropout and data are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.errors import CheckpointError
from tinygptv_ds.files import check_is_file, read_text, remove, sha256, whole_folder
from tinygptv_ds.train.checkpoint.folders import step_of
from tinygptv_ds.weights.io import in_memory
from tinygptv_ds.weights.safetensors_writer import write_tensors

TENSORS, STATE, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
_NEEDED = {"step", "optimizer_steps", "loss_scale", "must_match"}


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one step, in this process's memory.

    Attributes:
        tensors: fp32, by `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`.
        state: the content of `state.json`.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"step-{self.state['step']:08d}"


def write_checkpoint(checkpoints: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint, complete or not at all; returns its folder."""
    folder = checkpoints / snapshot.name
    with whole_folder(folder) as partial:
        sums = {TENSORS: _write_tensors(partial / TENSORS, snapshot.tensors)}
        (partial / STATE).write_text(json.dumps(snapshot.state, indent=2) + "\n", encoding="utf-8")
        sums[STATE] = sha256(partial / STATE)
        (partial / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return folder


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file of fp32 tensors, hashed on the way; return its SHA-256."""
    digest = hashlib.sha256()
    write_tensors(path, {name: in_memory(tensor) for name, tensor in tensors.items()}, on_write=digest.update)
    return digest.hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `state.json` after verifying the hash of every file.

    Raises:
        CheckpointError: a file is missing or is not what was written; names it with both hashes.
    """
    for name, expected in _sums(folder).items():
        try:
            check_is_file(folder / name)
            found = sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: {error.strerror or error}") from None
        if found != expected:
            raise CheckpointError(f"{folder / name} has SHA-256 {found}, but {expected} was written: it is damaged")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} is no JSON ({error}); name another checkpoint") from None
    if not isinstance(state, dict) or not state.keys() >= _NEEDED:
        raise CheckpointError(f"{folder / STATE} is of another version of this program")
    return state


def _sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    try:
        text = read_text(path, 1000)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        text = ""
    lines = re.fullmatch(rf"([0-9a-f]{{64}})  {re.escape(TENSORS)}\n([0-9a-f]{{64}})  {re.escape(STATE)}\n", text)
    if lines is None:
        raise CheckpointError(f"{path} is damaged: it should hold two lines, the SHA-256 of {TENSORS} and of {STATE}")
    return {TENSORS: lines[1], STATE: lines[2]}


def remove_old(folders: list[Path], train: TrainSection, held: Callable[[Path], bool] | None = None) -> None:
    """Remove all checkpoints but those that the recipe keeps: the newest, and those at multiples of `keep_every`.

    Args:
        folders: the oldest first.
        train: how many are kept.
        held: whether one has to stay for the moment; it is removed the next time.
    """
    for old in folders[: -train.keep_checkpoints]:
        kept = train.keep_every and step_of(old) % train.keep_every == 0
        if not kept and not (held is not None and held(old)):
            # Under its name a checkpoint is complete at any time, also while it is being removed.
            remove(old.rename(old.with_name(old.name + ".old")))
