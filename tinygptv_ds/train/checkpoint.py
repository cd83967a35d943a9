"""Portable checkpoints: what was trained, in fp32, with its optimizer moments, by canonical name.

A checkpoint is the folder `checkpoints/step-N` with `state.safetensors` and `state.json` (step, sample position,
fingerprint of the recipe, hash of the tensors). It is written under a temporary name and renamed when complete, and can
be resumed under another ZeRO stage and number of ranks. The random numbers of dropout and data are functions of the
step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.schema import Recipe
from tinygptv_ds.disk import sha256, whole_folder
from tinygptv_ds.errors import CheckpointError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.engine import MOMENTS, Engine
from tinygptv_ds.train.job import Job


def fingerprint(recipe: Recipe) -> dict[str, str]:
    """Hash of each part of a recipe that a resumed run must share; how often it logs or saves may change.

    Of the datasets those that are used count, whether the others are left out by `data.only` or not listed.
    """
    data = dataclasses.replace(recipe.data, datasets=recipe.data.used)
    plain = recipe_dict(dataclasses.replace(recipe, data=data))
    plain.pop("deepspeed")
    for name in (
        "micro_batch_size",
        "max_tokens",
        "log_every",
        "sample_every",
        "sample_count",
        "validate_every",
        "validation_samples",
        "max_overflows",
        "wandb",
        "checkpoint_every",
        "keep_checkpoints",
    ):
        plain["train"].pop(name)
    for name in (
        "only",
        "num_workers",
        "max_skipped_share",
        "validation",
        "cache_dir",
        "cache_gb",
        "allow_pipe",
        "features",
    ):
        plain["data"].pop(name)
    for name in ("attention", "gradient_checkpointing"):
        plain["model"].pop(name)
    return {key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in plain.items()}


def save_checkpoint(engine: Engine, step: int) -> None:
    """Write the state after `step` optimizer steps. To be called on all ranks."""
    tensors = {f"weight/{name}": weight for name, weight in engine.trained_state().items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": value for name, value in engine.moments(moment).items()}
    job = engine.job
    if job.ranks.is_main:
        state = {
            "step": step,
            "samples": step * job.recipe.train.batch_size,
            "optimizer_steps": engine.optimizer_steps,
            "skipped_steps": engine.skipped_steps,
            "loss_scale": None if engine.scale is None else [engine.scale.value, engine.scale.good_steps],
            "recipe": fingerprint(job.recipe),
            "world_size": job.ranks.world_size,
            "zero_stage": job.zero_stage,
        }
        _write(job.run_dir / "checkpoints" / f"step-{step:08d}", tensors, state)
        _remove_old(job.run_dir / "checkpoints", job.recipe.train.keep_checkpoints)
    torch.distributed.barrier()


def _write(folder: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    with whole_folder(folder) as partial:
        save_file(tensors, partial / "state.safetensors")
        state["sha256"] = sha256(partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def _remove_old(checkpoints: Path, keep: int) -> None:
    for old in _complete(checkpoints)[:-keep]:
        shutil.rmtree(old)


def _complete(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first; not those that were being written when the run was killed."""
    return sorted(path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what `state.json` says."""

    folder: Path
    state: dict


def latest_checkpoint(job: Job) -> Checkpoint | None:
    """The newest checkpoint of the run directory, verified; a damaged one is named and the one before is taken.

    Raises:
        CheckpointError: it is of another recipe; the sections that differ are named.
    """
    for folder in reversed(_complete(job.run_dir / "checkpoints")):
        try:
            checkpoint = _read(folder)
        except (OSError, ValueError) as error:
            LOGGER.warning("checkpoint %s is damaged (%s); trying the one before", folder, error)
            continue
        there, here = checkpoint.state["recipe"], fingerprint(job.recipe)
        differing = sorted(key for key in here if there.get(key) != here[key])
        if differing:
            raise CheckpointError(
                f"{folder} is of another recipe: {', '.join(differing)} differ. Choose another --run-dir, or the "
                f"recipe in {job.run_dir / 'recipe.yaml'}"
            )
        LOGGER.info("going on from %s", folder)
        return checkpoint
    return None


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / "state.json").read_text())
    if not isinstance(state, dict) or not {"step", "optimizer_steps", "loss_scale", "recipe", "sha256"} <= state.keys():
        raise ValueError("state.json is incomplete")
    found = sha256(folder / "state.safetensors")
    if found != state["sha256"]:
        raise ValueError(f"state.safetensors has sha256 {found}, expected {state['sha256']}")
    return Checkpoint(folder, state)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put the trained weights into a model that DeepSpeed has not seen yet (its master copies are made from it)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(checkpoint.folder / "state.safetensors", framework="pt") as file:
        stored = {key.removeprefix("weight/") for key in file.keys() if key.startswith("weight/")}  # noqa: SIM118
        if stored != set(trained):
            odd = sorted(stored ^ set(trained))
            raise CheckpointError(f"{checkpoint.folder} holds other parameters than this stage trains: {odd[:5]} ...")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(f"weight/{name}"))


def restore_optimizer(engine: Engine, checkpoint: Checkpoint) -> int:
    """Put the moments and step counters back; returns the step to go on with. To be called on all ranks."""
    _prime_optimizer(engine)
    with safe_open(checkpoint.folder / "state.safetensors", framework="pt") as file:
        for moment in MOMENTS:
            engine.set_moments(moment, lambda name, moment=moment: file.get_tensor(f"{moment}/{name}"))
    state = checkpoint.state
    engine.set_optimizer_steps(state["optimizer_steps"])
    engine.skipped_before = state.get("skipped_steps", state["step"] - state["optimizer_steps"])
    if engine.scale is not None and state["loss_scale"] is not None:
        engine.scale.set(*state["loss_scale"])
    return state["step"]


def _prime_optimizer(engine: Engine) -> None:
    """One step at rate 0 on a loss of zero: AdamW's states do not exist before a first step."""
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
    engine.backward_and_step(output.token_losses.sum() * 0.0 + output.anchor)
