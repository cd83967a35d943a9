"""Weights & Biases: a missing package is reported at once; a resumed run keeps its entry."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.metrics.wandb_tracker import WandbTracker, check_tracking

RAW = Callable[..., dict[str, Any]]


def test_the_package_has_to_be_there(raw_recipe: RAW, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.wandb is 'mine', .*'pip install wandb'.* --set train\.wandb=null"):
        check_tracking(build_recipe(raw_recipe(train__wandb="mine"), "test"))
    check_tracking(build_recipe(raw_recipe(), "test"))


def test_a_resumed_run_keeps_its_entry(raw_recipe: RAW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: started.append(settings)))
    recipe = build_recipe(raw_recipe(train__wandb="mine"), "test")
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        WandbTracker(recipe, tmp_path / folder)
    ids = [settings["id"] for settings in started]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 16


def test_without_a_project_nothing_is_sent(raw_recipe: RAW, tmp_path: Path) -> None:
    tracking = WandbTracker(build_recipe(raw_recipe(), "test"), tmp_path)
    tracking.log({"train/loss": 1.0}, 1)
    tracking.close()
    assert list(tmp_path.iterdir()) == [] and "wandb" not in sys.modules
