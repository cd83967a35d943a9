"""The run directory: all files of one run, so that it can be understood and repeated later."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import yaml

from tinygptv_ds import __version__
from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import write_atomically
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.train.setup.machine import gpus_are_hidden
from tinygptv_ds.train.setup.run_dir_lock import lock_run_dir

PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "timm", "peft", "webdataset", "flash-attn", "numpy")


def start_run_dir(job: Job) -> Path:
    """Make the run directory and lock it for this process; return the path of the log file.

    Raises:
        ConfigError: another job has the lock.
    """
    if job.dry_run:  # remove the files of a dry run that was killed
        shutil.rmtree(job.run_dir, ignore_errors=True)
    try:
        job.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run-dir {job.run_dir} cannot be made ({error.strerror}); choose another") from None
    lock_run_dir(job.run_dir)
    return job.run_dir / "log.txt"


def note_run(job: Job) -> None:
    """Write the resolved recipe, the DeepSpeed JSON, the machine and the versions, once the run has started."""
    notes = {"recipe.yaml": yaml.safe_dump(recipe_dict(job.recipe), sort_keys=False, allow_unicode=True)}
    plain = {"deepspeed.json": job.deepspeed, "machine.json": machine(job), "versions.json": versions()}
    for name, text in (notes | {name: json.dumps(each, indent=2) + "\n" for name, each in plain.items()}).items():
        try:
            write_atomically(job.run_dir / name, text.encode())
        except OSError as error:
            LOGGER.warning("%s cannot be written (%s); training continues", job.run_dir / name, error.strerror)


def machine(job: Job) -> dict[str, str | int]:
    """Return what the run runs on, as seen by this rank: host, device, ranks, ZeRO stage and precision."""
    import torch

    gpu = torch.cuda.is_available() and not gpus_are_hidden()
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "ranks": job.ranks.world_size,
        "ranks of this host": job.ranks.local_world_size,
        "ZeRO stage": job.zero_stage,
        "precision": job.precision,
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python, this package with its commit, and the packages that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "tinygptv_ds": __version__}
    found["commit"] = _commit()
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
