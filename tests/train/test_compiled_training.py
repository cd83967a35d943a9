"""A whole run with compiled blocks: the losses and weights of an eager one; ZeRO-3 is refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launcher
from helpers.forked import ended
from safetensors.torch import load_file

from tinygptv_ds.config.deepspeed import resolve_deepspeed
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.compiler import missing_compiler

ZERO_3 = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}


def losses_of(folder: Path) -> list[float]:
    """Return the losses of training and of validation, in the order of the log."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [value for line in lines for name, value in line.items() if name in ("train/loss", "val/loss")]


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="there is no C++ compiler")
def test_a_compiled_run_equals_an_eager_one(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within rounding, with dropout, recomputed blocks, validation and a panel of answers."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    recipe = recipe_file(
        model__resid_dropout=0.1,
        model__lora_dropout=0.1,
        model__gradient_checkpointing=2,
        data__validation_share=0.2,
        train__validate_every=2,
        train__steps_per_epoch=4,
    )

    def train(name: str, *options: str) -> tuple[launcher.Run, list[float], dict[str, torch.Tensor]]:
        done = launcher.run(launcher.one_process(4), recipe, tmp_path / name, *options)
        return done, losses_of(done.folder), load_file(done.folder / "model/trained.safetensors")

    _, losses, weights = train("eager")
    assert len(losses) > 4
    assert not (cache / "tinygptv_ds/torchinductor").exists()
    done, ours, trained = train("compiled", "--set=model.compile=true")
    assert "the blocks of Phi, ViT and Q-Former are compiled at their first call" in done.output
    assert "torch.compile failed" not in done.output
    assert ours == pytest.approx(losses, rel=1e-4)
    assert ours != losses  # another order of sums
    assert trained.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(trained[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert list((cache / "tinygptv_ds/torchinductor").rglob("*.so"))


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="there is no C++ compiler")
def test_two_compiled_ranks_equal_eager_ones(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Under ZeRO-2 itself, whose hooks take the gradients that a compiled backward pass leaves."""
    recipe = recipe_file(model__lora_dropout=0.1, train__steps_per_epoch=3)
    eager, ours = (
        ended(recipe, tmp_path / str(compiled), f"--set=model.compile={str(compiled).lower()}", ranks=2)
        for compiled in (False, True)
    )
    assert "blocks of Phi, ViT and Q-Former are compiled" in ours.output and "are compiled" not in eager.output
    assert "torch.compile failed" not in ours.output
    assert "nothing to partition" not in ours.output  # the optimizer of a single rank
    losses = ours.column("train/loss")
    assert len(losses) == 3 and losses == pytest.approx(eager.column("train/loss"), rel=1e-4)
    assert losses != eager.column("train/loss")  # another order of sums
    trained, weights = (load_file(run.folder / "model/trained.safetensors") for run in (ours, eager))
    assert trained.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(trained[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_zero_3_and_compiled_blocks_are_refused_together(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    """Before torch is imported; auto trains without."""
    recipe = build_recipe(raw_recipe(model__compile=True), "test")
    with pytest.raises(ConfigError, match=r"here.json: model.compile is true, but ZeRO-3 gathers .* or take ZeRO-2"):
        resolve_deepspeed(ZERO_3, recipe, 1, "here.json")
    resolve_deepspeed(ZERO_3, build_recipe(raw_recipe(), "test"), 1, "here.json")
    resolve_deepspeed(ZERO_3 | {"zero_optimization": {"stage": 2}}, recipe, 1, "here.json")


@pytest.mark.parametrize("value", ["yes please", 1, None, ["auto"]])
def test_values(value: Any, raw_recipe: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"model\.compile must be"):
        build_recipe(raw_recipe(model__compile=value), "test")
