"""Resuming: which checkpoint a run resumes from, and restoring its state."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tinygptv_ds.errors import CheckpointError, WeightsError
from tinygptv_ds.files import fingerprint_differences, remove
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint.content_check import check_state, check_tensors
from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones, step_of
from tinygptv_ds.train.checkpoint.storage import STATE, SUMS, TENSORS, read_state
from tinygptv_ds.train.engine import MOMENTS, Engine
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.weights.layouts.deepspeed_checkpoint import open_deepspeed, step_folder


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of ours or of DeepSpeed's.

    Attributes:
        folder: where it is.
        state: step, optimizer steps, loss scale and what has to match, as in `state.json`.
        names: the parameters that it holds.
        tensor: reads `weight`, `exp_avg` or `exp_avg_sq` of a parameter, fp32.
    """

    folder: Path
    state: dict[str, Any]
    names: frozenset[str]
    tensor: Callable[[str, str], Tensor]


def choose_checkpoint(job: Job, fingerprint: dict[str, Any]) -> str | None:
    """Return the verified folder that the run resumes from; None: it begins. Call on rank 0, which holds the lock.

    With `--resume auto` it is the newest complete checkpoint of the run directory; damaged ones are named in the log.

    Raises:
        CheckpointError: none is complete, the one that is named is damaged, or it is of another recipe, other data or
            other base weights; what differs is named.
    """
    own = job.run_dir / FOLDER
    _sweep(own)
    if job.resume == "never":
        return None
    folder = _newest_complete(own) if job.resume == "auto" else _named(job, Path(job.resume))
    if folder is not None:
        check_fingerprint(job, folder, _state_of(folder)["must_match"], fingerprint)
        LOGGER.info("resuming from %s", folder)
    return None if folder is None else str(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint that `choose_checkpoint` has verified."""
    ranks_folder = step_folder(folder)
    if ranks_folder is not None:
        return _open_deepspeed(folder, ranks_folder)
    with safe_open(folder / TENSORS, framework="pt") as file:
        names = {key.removeprefix("weight/") for key in file.keys() if key.startswith("weight/")}  # noqa: SIM118
    return Checkpoint(
        folder,
        json.loads((folder / STATE).read_text(encoding="utf-8")),
        frozenset(names),
        partial(_read_tensor, folder / TENSORS),
    )


def began_from(job: Job, folder: Path) -> str | None:
    """Return the checkpoint of another run that this one began from, now or in an earlier attempt."""
    if folder.resolve().parent == (job.run_dir / FOLDER).resolve():
        return _state_of(folder).get("began_from")
    return str(folder.resolve())


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the trained weights into a model before DeepSpeed makes its master copies from it.

    Raises:
        CheckpointError: it holds other parameters than the model trains, of other shapes, or NaN or Inf.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if checkpoint.names != set(trained):
        odd = sorted(checkpoint.names ^ set(trained))
        raise CheckpointError(f"{checkpoint.folder} holds other parameters than this stage trains: {odd[:5]} ...")
    with torch.no_grad():
        for name, parameter in trained.items():
            stored = checkpoint.tensor("weight", name)
            if stored.shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} is {list(stored.shape)}, here {list(parameter.shape)}"
                )
            parameter.copy_(_finite(stored, checkpoint, "weight", name))


def restore_optimizer(engine: Engine, checkpoint: Checkpoint) -> int:
    """Restore moments and step counters; returns the step to resume at. Call on all ranks."""
    _prime_optimizer(engine)
    for moment in MOMENTS:
        engine.set_moments(moment, partial(_read_moment, checkpoint, moment))
    state = checkpoint.state
    # Up to version 0.1 every step counted for all parameters alike.
    engine.set_optimizer_steps(state["optimizer_steps"], state.get("image_steps", state["optimizer_steps"]))
    engine.skipped_before = state.get("skipped_steps", state["step"] - state["optimizer_steps"])
    if engine.scale is not None and state["loss_scale"] is not None:
        engine.scale.set(*state["loss_scale"])
    return state["step"]


def _sweep(checkpoints: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for pattern in ("step-*.partial", "step-*.old"):
        for leftover in checkpoints.glob(pattern):
            remove(leftover)


def _newest_complete(checkpoints: Path) -> Path | None:
    folders = complete_ones(checkpoints)
    for folder in reversed(folders):
        try:
            verify(folder)
        except CheckpointError as error:
            LOGGER.warning("%s; trying the checkpoint before", error)
            continue
        return folder
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoint(s) in {checkpoints} is complete; the log above says why. Name "
            "another one with --resume PATH, or begin again in another --run-dir"
        )
    return None


def _named(job: Job, path: Path) -> Path:
    """Return the checkpoint of `--resume PATH`: one of the run directory, or one for the run to begin from."""
    if job.evaluate_only:
        return _is_checkpoint(path)
    own = job.run_dir / FOLDER
    if path.resolve().parent != own.resolve():
        mine = _newest_complete(own)
        if mine is not None and _state_of(mine).get("began_from") != str(path.resolve()):
            raise CheckpointError(
                f"{job.run_dir} has checkpoints of its own, which do not come from {path}; resume from them with "
                "--resume auto, or choose another --run-dir"
            )
        return _is_checkpoint(path) if mine is None else mine
    _is_checkpoint(path)
    for newer in complete_ones(own):
        if step_of(newer) > step_of(path):
            aside = newer.with_name(newer.name + ".aside")
            remove(aside)
            newer.rename(aside)
            LOGGER.warning("%s is newer than %s and was put aside as %s", newer, path.name, aside.name)
    return path


def _is_checkpoint(path: Path) -> Path:
    """Return a path after verifying that it is a complete checkpoint of either format."""
    try:
        ranks_folder = step_folder(path)
        if ranks_folder is not None:
            open_deepspeed(ranks_folder)
            return path
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    if not (path / STATE).is_file() and not (path / SUMS).is_file():
        inside = complete_ones(path / FOLDER)
        hint = f"; name one of its checkpoints, such as {inside[-1]}" if inside else ""
        raise CheckpointError(f"{path} is no checkpoint, neither of a run nor of DeepSpeed's format{hint}")
    verify(path)
    return path


def verify(folder: Path) -> None:
    """Raise CheckpointError where a checkpoint of ours is damaged, or holds what no run can resume from."""
    check_state(folder, read_state(folder))
    check_tensors(folder / TENSORS)


def _state_of(folder: Path) -> dict[str, Any]:
    return open_checkpoint(folder).state


def check_fingerprint(
    job: Job, folder: Path | str, recorded: dict[str, Any] | None, fingerprint: dict[str, Any]
) -> None:
    """Compare the fingerprint that a checkpoint recorded with this run's.

    Args:
        job: says whether differences are meant.
        folder: the checkpoint, for messages.
        recorded: None where it was not recorded.
        fingerprint: this run's.

    Raises:
        CheckpointError: they differ; each difference is named.
    """
    if recorded is None:
        LOGGER.warning("%s holds no fingerprint of recipe, data and base weights: nothing could be compared", folder)
        return
    differing = fingerprint_differences(recorded, fingerprint, recorded_in="in the checkpoint").values()
    if not differing:
        return
    listed = "\n".join(f"  - {line}" for line in differing)
    if job.resume_anyway:
        LOGGER.warning("resuming although %s is of another run (--resume-anyway):\n%s", folder, listed)
        return
    raise CheckpointError(
        f"{folder} is of another recipe, other data or other base weights:\n{listed}\nChoose another --run-dir, put "
        "back what differs, or, if it is meant, add --resume-anyway"
    )


def _open_deepspeed(folder: Path, ranks_folder: Path) -> Checkpoint:
    try:
        found = open_deepspeed(ranks_folder)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    stored = {"weight": found.weights, **found.moments}
    noted = found.client
    state = {
        "step": noted.get("step", found.step),
        "optimizer_steps": noted.get("optimizer_steps", found.optimizer_steps),
        "image_steps": noted.get("image_steps", noted.get("optimizer_steps", found.image_steps)),
        "skipped_steps": noted.get("skipped_steps", 0),
        "loss_scale": noted.get("loss_scale"),
        "must_match": noted.get("must_match"),
    }
    check_state(folder, state)
    return Checkpoint(folder, state, frozenset(found.weights), lambda kind, name: stored[kind][name].read())


def _read_tensor(file: Path, kind: str, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(f"{kind}/{name}")


def _read_moment(checkpoint: Checkpoint, moment: str, name: str) -> Tensor:
    return _finite(checkpoint.tensor(moment, name), checkpoint, moment, name)


def _finite(tensor: Tensor, checkpoint: Checkpoint, kind: str, name: str) -> Tensor:
    """Return the tensor; raise CheckpointError where a value is NaN or Inf, from which no training can continue."""
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.folder}: {kind} of {name} holds NaN or Inf, so the training cannot continue from it; name an "
            "earlier checkpoint with --resume PATH"
        )
    return tensor


def _prime_optimizer(engine: Engine) -> None:
    """Take one step at learning rate 0 on a loss of zero: AdamW's states do not exist before a first step."""
    ids = torch.tensor([engine.module.config.bos_token_id], device=engine.device)
    row = torch.zeros(1, dtype=torch.long, device=engine.device)
    inputs = {
        "input_ids": ids,
        "position_ids": row,
        "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32, device=engine.device),
        "max_seqlen": 1,
        "image_rows": row[:0],
        "target_rows": row,
        "targets": ids,
    }
    engine.set_learning_rate(0.0)
    engine.set_boundary(True)
    output = engine.deepspeed(**inputs)
    engine.backward(output.token_losses.sum() * 0.0 + output.anchor)
    engine.step()
