"""The whole run directory on a disk that is full, nearly full or read-only: a warning, or one message, and no harm."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import tiny
from helpers.forked import Ranks, ended, started
from helpers.small_disk import SmallDisk, small_disk
from rank_faults import watched

STEPS, SAVED = 8, "step-00000006"
SIZE = 12_000_000


@pytest.fixture(scope="module")
def recipe(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tiny.recipe(weights, shards, train__steps_per_epoch=STEPS, train__checkpoint_every=2, train__sample_count=0)
    return tiny.write_recipe(tmp_path_factory.mktemp("full") / "recipe.yaml", raw)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run that had room."""
    return ended(recipe, recipe.with_name("whole"), fault=watched).folder


@pytest.fixture(scope="module")
def half(whole: Path) -> Path:
    """The same run as it was after step 6."""
    copy = shutil.copytree(whole, whole.with_name("half"))
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    return copy


def errors(run: Ranks) -> list[str]:
    assert "Traceback" not in run.output, run.output
    return re.findall(r"^error: .*$", run.output, flags=re.M)


def resumed(recipe: Path, disk: SmallDisk) -> tuple[int, Ranks]:
    with started(recipe, disk.folder) as run:
        (code,) = run.end()
    return code, run


def test_a_disk_that_fills_and_clears(recipe: Path, half: Path, whole: Path, tmp_path: Path) -> None:
    """Whatever a start could still write, the next one with room ends with the unbroken run's weights."""
    with small_disk(tmp_path / "run", SIZE) as disk:
        run_dir = shutil.copytree(half, disk.folder, dirs_exist_ok=True)
        for left in (0, 4096, 24 * 1024):
            disk.fill(left)
            code, run = resumed(recipe, disk)
            assert code == 2 and len(errors(run)) == 1, run.output
            assert "No space left on device" in run.output
            assert (run_dir / "checkpoints" / SAVED / "state.safetensors").is_file()
            assert not (run_dir / "model").exists() and not list(run_dir.rglob("*.partial"))
            disk.clear()
        code, run = resumed(recipe, disk)
        assert (code, errors(run)) == (0, []), run.output
        assert (run_dir / "model/trained.safetensors").read_bytes() == (
            whole / "model/trained.safetensors"
        ).read_bytes()
        assert [line["step"] for line in run.metrics] == list(range(1, STEPS + 1))


def test_a_read_only_disk(recipe: Path, half: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "run", SIZE) as disk:
        shutil.copytree(half, disk.folder, dirs_exist_ok=True)
        disk.make_read_only()
        code, run = resumed(recipe, disk)
        (error,) = errors(run)
        assert code == 2 and "Read-only file system" in error
