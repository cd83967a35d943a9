"""The run directory: all files of one run, so that it can be understood and repeated later."""

from __future__ import annotations

import json
import platform
import shutil
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
    """Write the resolved recipe, the DeepSpeed JSON and the versions, once the run has started."""
    recipe = yaml.safe_dump(recipe_dict(job.recipe), sort_keys=False, allow_unicode=True)
    notes = {"recipe.yaml": recipe, "deepspeed.json": json.dumps(job.deepspeed, indent=2) + "\n"}
    for name, text in (notes | {"versions.json": json.dumps(versions(), indent=2) + "\n"}).items():
        try:
            write_atomically(job.run_dir / name, text.encode())
        except OSError as error:
            LOGGER.warning("%s cannot be written (%s); training continues", job.run_dir / name, error.strerror)


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
