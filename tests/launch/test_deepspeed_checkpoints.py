"""What two ranks write in DeepSpeed's own format is read as what they trained, under ZeRO-2 and ZeRO-3."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended
from helpers.launcher import ROOT
from safetensors.torch import load_file

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.assemble import meta_model
from tinygptv_ds.weights.detect import open_any
from tinygptv_ds.weights.resolve import resolve
from tinygptv_ds.weights.trained import fitting_source

SETS = {
    2: ["deepspeed.zero_optimization.stage=2"],
    # Small sub-groups: the fp32 values of a rank then lie in several rows.
    3: ["deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.sub_group_size=600"],
}


@pytest.fixture(scope="module", params=SETS, ids=lambda stage: f"ZeRO-{stage}")
def done(request: pytest.FixtureRequest, weights: Path, shards: dict[str, Path], tmp_path_factory) -> tuple[int, Ranks]:
    folder = tmp_path_factory.mktemp("deepspeed")
    raw = tiny.recipe(weights, shards, train__steps_per_epoch=2)
    recipe = tiny.write_recipe(folder / "recipe.yaml", raw)
    sets = [f"--set={text}" for text in SETS[request.param]]
    return request.param, ended(recipe, folder / "run", *sets, script="tests/launch/save_deepspeed.py", ranks=2)


@pytest.mark.parametrize("name", ["lean", "whole"])
def test_every_bit_of_what_was_trained(done: tuple[int, Ranks], name: str) -> None:
    stage, run = done
    trained = load_file(run.folder / "model/trained.safetensors")
    opened = open_any(run.folder / name)
    assert opened.container == f"DeepSpeed checkpoint (ZeRO-{stage}, 2 rank(s))"
    assert opened.stored.keys() == trained.keys()
    for key, stored in opened.stored.items():
        assert stored.shape == tuple(trained[key].shape)
        assert torch.equal(stored.read(), trained[key]), key
    assert bool(opened.ignored) is (name == "whole")  # the frozen weights


def test_a_stage_starts_from_it(done: tuple[int, Ranks]) -> None:
    run = done[1].folder
    trained = load_file(run / "model/trained.safetensors")
    source = fitting_source(meta_model(resolve(run).config), run / "lean")
    assert source.weights.keys() == trained.keys()
    assert all(torch.equal(source.weights[name].read(), tensor) for name, tensor in trained.items())


def test_the_whole_model_from_it(done: tuple[int, Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe lies in the run directory around it."""
    monkeypatch.chdir(ROOT)
    found = resolve(done[1].folder / "lean/global_step2")
    assert (found.recipe.stage, found.config.lora_r) == (4, 4)
    weights = found.weights()
    trained = load_file(done[1].folder / "model/trained.safetensors")
    assert all(torch.equal(weights[name].read(), tensor) for name, tensor in trained.items())


def test_a_rank_that_is_missing_is_noticed(done: tuple[int, Ranks], tmp_path: Path) -> None:
    for file in (done[1].folder / "lean/global_step2").iterdir():
        if "rank_1" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WeightsError, match=r"written by 2 ranks, but there are 1 \*_optim_states\.pt"):
        open_any(tmp_path)
