"""Runs that are copied to object storage resume on another machine, which has an empty run directory."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import ended
from rank_faults import watched

from tinygptv_ds.object_storage import RemoteFolders


class Place:
    """A recipe with a mirror in a folder."""

    def __init__(self, raw: dict[str, Any], tmp_path: Path) -> None:
        self.folder = tmp_path / "mirror"
        self.remote = RemoteFolders(self.folder.as_uri())
        raw["train"]["mirror"] = self.remote.url
        self.recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)


@pytest.fixture
def place(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Place:
    changes = {"train__steps_per_epoch": 9, "train__checkpoint_every": 3, "train__sample_count": 0}
    return Place(raw_recipe(model__resid_dropout=0.1, model__lora_dropout=0.1, **changes), tmp_path)


def trained(folder: Path) -> bytes:
    return (folder / "model/trained.safetensors").read_bytes()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")


def test_stopped_here_and_resumed_there(place: Place, tmp_path: Path) -> None:
    """The last checkpoint before SIGTERM gets there; `model/` and the metric of the mirror at the end, too."""
    whole = ended(place.recipe, tmp_path / "whole", "--set=train.mirror=null", ranks=2)
    here = ended(place.recipe, tmp_path / "here", ranks=2, fault=watched, at=3, number=signal.SIGTERM, code=143)
    assert place.remote.names("checkpoints") == ["step-00000003", "step-00000005"]
    assert "copied checkpoints/step-00000005 to file://" in here.output
    there = ended(place.recipe, tmp_path / "there", ranks=2)
    assert f"fetched {place.remote}/checkpoints/step-00000005" in there.output
    assert [line["step"] for line in there.metrics] == [6, 7, 8, 9]
    assert trained(there.folder) == trained(whole.folder) == trained(place.folder)
    assert there.metrics[-1]["mirror/step"] >= 5 and there.metrics[-1]["mirror/failures"] == 0
    assert place.remote.names("checkpoints") == ["step-00000006", "step-00000009"]
    assert not any(path.name.endswith(".partial") for path in there.folder.rglob("*"))


def test_damage_and_other_recipes(place: Place, tmp_path: Path) -> None:
    """Damaged checkpoints are passed over, those of another recipe refused; in neither case does a run start over."""
    result = trained(ended(place.recipe, tmp_path / "first").folder)
    other = ended(place.recipe, tmp_path / "other", "--set=optimizer.lr=0.002", code=2)
    assert "optimizer.lr: 0.003 in the checkpoint, 0.002 here" in other.output and "Traceback" not in other.output
    assert f"{place.remote}/checkpoints/step-00000009 is of another recipe" in other.output
    assert list((tmp_path / "other/checkpoints").glob("*")) == []
    never = ended(place.recipe, tmp_path / "never", "--resume", "never", code=2)
    assert f"{place.remote} holds checkpoints" in never.output

    damage(place.folder / "checkpoints/step-00000009/state.safetensors")
    run = ended(place.recipe, tmp_path / "before")
    assert "trying the checkpoint before" in run.output and run.metrics[0]["step"] == 7
    assert trained(run.folder) == trained(place.folder) == result
    shutil.rmtree(place.folder / "model")
    damage(place.folder / "checkpoints/step-00000009/state.safetensors")
    damage(place.folder / "checkpoints/step-00000006/manifest.json")
    none = ended(place.recipe, tmp_path / "none", code=2)
    assert "none of the 2 checkpoint(s)" in none.output and "Traceback" not in none.output


def test_the_newer_one_wins(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended(place.recipe, run, fault=watched, at=6, number=signal.SIGKILL, after="step-00000006", code=-signal.SIGKILL)
    shutil.rmtree(place.folder / "checkpoints")
    place.remote.put(run / "checkpoints/step-00000003", "checkpoints/step-00000003")
    again = ended(place.recipe, run)
    assert "fetched" not in again.output and again.metrics[-1]["step"] == 9
    assert place.remote.names("checkpoints") == ["step-00000006", "step-00000009"]


def test_a_mirror_that_cannot_be_written(place: Place, tmp_path: Path) -> None:
    place.folder.write_text("a file")
    refused = ended(place.recipe, tmp_path / "run", code=2)
    assert f"error: train.mirror: {place.remote}" in refused.output and "Traceback" not in refused.output
    assert "step 1" not in refused.output
