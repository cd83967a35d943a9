"""A whole run with compiled blocks: the losses and weights of an eager one; ZeRO-3 is refused with the reason."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from helpers.forked import Ranks, ended
from safetensors.torch import load_file

from tinygptv_ds.config.deepspeed import resolve_deepspeed
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.compiler import missing_compiler

ZERO_3 = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}


def cache_in(cache: Path) -> None:
    """Have a rank keep compiled code there, and nowhere else; it compiles by itself, without processes for it.

    One rank shows that kernels are generated and compiled; the other one's graphs run operation by operation.
    """
    torch._inductor.config.compile_threads = 1
    if os.environ["RANK"] != "0":
        torch.compile = partial(torch.compile, backend="aot_eager")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="there is no C++ compiler")
def test_a_compiled_run_equals_an_eager_one(
    recipe_file: Callable[..., Path], shards: dict[str, Path], tmp_path: Path
) -> None:
    """Within rounding, with dropout and recomputed blocks.

    Two ranks train under ZeRO-2, whose hooks take the gradients that a compiled backward pass leaves. Each micro-batch
    has several images: for one, torch would compile further graphs.
    """
    recipe = recipe_file(
        data__datasets=[{"name": kind, "shards": str(shards[kind])} for kind in ("vqa", "pair")],
        model__resid_dropout=0.1,
        model__lora_dropout=0.1,
        model__gradient_checkpointing=2,
        train__steps_per_epoch=3,
    )

    def train(compiled: str) -> tuple[Ranks, list[float], dict[str, torch.Tensor]]:
        option = f"--set=model.compile={compiled}"
        run = ended(recipe, tmp_path / compiled, option, ranks=2, fault=cache_in, cache=tmp_path / "cache")
        return run, run.column("train/loss"), load_file(run.folder / "model/trained.safetensors")

    eager, losses, weights = train("false")
    assert "are compiled" not in eager.output
    assert not (tmp_path / "cache/tinygptv_ds/torchinductor").exists()
    run, ours, trained = train("true")
    assert "the blocks of Phi, ViT and Q-Former are compiled at their first call" in run.output
    assert "torch.compile failed" not in run.output
    assert "nothing to partition" not in run.output  # the optimizer of a single rank
    assert len(losses) == 3 and ours == pytest.approx(losses, rel=1e-4)
    assert ours != losses  # another order of sums
    assert trained.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(trained[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert list((tmp_path / "cache/tinygptv_ds/torchinductor").rglob("*.so"))


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
