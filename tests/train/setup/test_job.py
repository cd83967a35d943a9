"""From a stage's command line to a job, and what the run directory keeps of it."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.train.setup import job as job_module
from tinygptv_ds.train.setup.job import parse_job
from tinygptv_ds.train.setup.run_dir import note_run, start_run_dir

ROOT = Path(__file__).parents[3]
OWN = ROOT / "stages/stage4.yaml"
CPU = f"--deepspeed_config={ROOT / 'ds_configs/cpu.json'}"


def test_options(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    argv = ["--local_rank=1", "--recipe", str(recipe_file()), CPU]
    sets = ["--set", "train.log_every=3", "--set", "deepspeed.zero_optimization.stage=3"]
    job = parse_job([*argv, *sets, "--run-dir", str(tmp_path / "run")], OWN)
    assert (job.recipe.train.log_every, job.zero_stage, job.precision) == (3, 3, "fp32")
    assert (job.run_dir, job.resume) == (tmp_path / "run", "auto")
    assert not job.run_dir.exists()  # nothing is written before all ranks are there
    assert parse_job(argv, OWN).run_dir == Path("runs/stage4")


def test_ranks_come_from_the_launcher(recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(name, value)
    job = parse_job(["--recipe", str(recipe_file()), CPU], OWN)
    r = job.ranks
    assert (r.rank, r.local_rank, r.world_size, r.local_world_size, r.is_main) == (3, 1, 4, 2, False)
    assert job.deepspeed["gradient_accumulation_steps"] == 1


def test_without_a_launcher_there_is_one_rank(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = parse_job(["--recipe", str(recipe_file()), CPU], OWN).ranks
    assert (ranks.rank, ranks.world_size, ranks.local_world_size) == (0, 1, 1)


def test_the_default_json_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for hiding in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):  # the tests' own
        monkeypatch.delenv(hiding, raising=False)
    monkeypatch.setattr(job_module.Path, "exists", lambda self: False)
    assert job_module.default_deepspeed_json().name == "cpu.json"
    monkeypatch.setattr(job_module.Path, "exists", lambda self: self.name == "nvidiactl")
    assert job_module.default_deepspeed_json().name == "zero2_bf16.json"


def test_the_run_directory_repeats_the_run(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    job = parse_job(["--recipe", str(recipe_file()), CPU, "--run-dir", str(tmp_path / "run"), "--set=seed=5"], OWN)
    assert start_run_dir(job) == tmp_path / "run/log.txt"
    note_run(job)
    assert load_recipe(tmp_path / "run/recipe.yaml") == job.recipe
    assert json.loads((tmp_path / "run/deepspeed.json").read_text()) == job.deepspeed
    versions = json.loads((tmp_path / "run/versions.json").read_text())
    assert versions["torch"] == metadata.version("torch")
    assert {"python", "tinygptv_ds", "commit", "deepspeed", "flash-attn"} <= versions.keys()
    machine = json.loads((tmp_path / "run/machine.json").read_text())
    assert machine["device"].startswith("CPU") and (machine["ranks"], machine["precision"]) == (1, "fp32")
