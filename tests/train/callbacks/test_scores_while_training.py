"""Scores while training: on all ranks under ZeRO-3, with any share of questions, equal to those of the scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import benchmark_files, forked, tiny
from helpers.launcher import ZERO_3

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.cli import scores
from tinygptv_ds.train.setup.job import parse_job

RAW = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return seven questions, of which the second batch of two has no image."""
    made = tiny.samples("vqa", 7)
    made[2:4] = tiny.samples("text", 4)[2:]
    return tiny.write_shards(tmp_path_factory.mktemp("held_out") / "vqa", made)


def test_under_zero_3_and_as_the_scripts_do(raw_recipe: RAW, held_out: Path, tmp_path: Path) -> None:
    root = benchmark_files.all_of_vqa(tmp_path / "root")
    benchmarks = [
        {"kind": "vqa", "shards": str(held_out), "name": "scenes"},
        {"kind": "iconvqa", "root": str(root)},
        {"kind": "gqa", "root": str(root), "template": "training"},
    ]
    section = {"benchmarks": benchmarks, "every": 2, "limit": 5, "batch_size": 2, "max_new_tokens": 6}
    best = {"train__keep_best": "eval/scenes/strict"}
    raw = raw_recipe(evaluation=section, train__steps_per_epoch=3, **best)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    run = forked.ended(recipe, tmp_path / "run", ZERO_3, ranks=2)
    scored = [line for line in run.metrics if "eval/scenes/strict" in line]
    assert [line["step"] for line in scored] == [2, 3]
    assert {f"eval/{name}/{rule}" for name in ("scenes", "iconvqa", "gqa") for rule in ("strict", "compat")} <= {
        *scored[0]
    }
    assert "step 2: scenes: strict" in run.output
    for name, given in (
        ("scenes", ["--shards", str(held_out), "--limit", "5"]),
        ("iconvqa", ["--benchmarks", "iconvqa", "--root", str(root)]),
        ("gqa", ["--benchmarks", "gqa", "--root", str(root), "--template", "training"]),
    ):
        during = json.loads((run.folder / f"evaluation/step-00000003/{name}.json").read_text())
        options = ["--model", str(run.folder), "--batch-size", "2", "--max-new-tokens", "6", "--dtype", "fp32"]
        (after,) = scores("vqa", [*options, *given, "--out", str(tmp_path / "out")])
        assert after["step"] == 3 and after["template"] == during["template"]
        asked = [
            (row["question"], row.get("raw"), pytest.approx(row.get("losses", []), rel=1e-4))
            for row in during["predictions"]
        ]
        assert [(row["question"], row.get("raw"), row.get("losses", [])) for row in after["predictions"]] == asked
    assert (tmp_path / "run/tensorboard").is_dir()
    kept = json.loads((run.folder / "best/provenance.json").read_text())["best"]
    first = max(scored, key=lambda line: line["eval/scenes/strict"])  # the first of equal ones
    assert (kept["step"], kept["value"]) == (first["step"], first["eval/scenes/strict"])


def test_files_are_checked_before_anything_loads(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    section = {
        "benchmarks": [{"kind": "gqa", "root": str(tmp_path / "no")}, {"kind": "vqa", "shards": str(tmp_path / "gone")}]
    }
    with pytest.raises(ConfigError, match=r"(?s)no/gqa/testdev_balanced_questions\.json is missing.*vqa: .*gone"):
        parse_job(["--run-dir", str(tmp_path / "run")], recipe_file(evaluation=section))


def test_the_score_that_is_to_be_best_must_exist(
    recipe_file: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    section = {"benchmarks": [{"kind": "vqa", "shards": str(held_out), "name": "mine"}], "every": 2}
    recipe = recipe_file(evaluation=section, train__keep_best="eval/mine/cider")
    with pytest.raises(ConfigError, match=r"mine has no score 'cider'; choose one of strict, contains, f1, compat"):
        parse_job(["--run-dir", str(tmp_path / "run")], recipe)


def test_an_unreadable_image_stops_before_the_first_step(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    root = benchmark_files.all_of_vqa(tmp_path / "root")
    (root / "gqa/gqa_images/n1.jpg").write_bytes(b"no image")
    recipe = recipe_file(evaluation={"benchmarks": [{"kind": "gqa", "root": str(root)}], "batch_size": 1})
    run = forked.ended(recipe, tmp_path / "run", code=2, ranks=2)
    assert "gqa, question 201: " in run.output and "step 1/" not in run.output


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"benchmarks": [{"kind": "gpa", "root": "x"}]}, "kind 'gpa' is unknown; did you mean gqa"),
        ({"benchmarks": [{"kind": "gqa"}]}, "gqa: name the folder of its files with root"),
        ({"benchmarks": [{"kind": "vqa", "root": "x"}]}, "vqa: name its held-out shards with shards"),
        ({"benchmarks": [{"kind": "refcoco", "root": "x", "split": "test"}]}, "its splits are val, testA, testB"),
        (
            {"benchmarks": [{"kind": "vqa", "shards": "x", "template": "no"}]},
            "template must be one of training, benchmark, A, B, C, or",
        ),
        ({"benchmarks": [{"kind": "vqa", "shards": "x"}] * 2}, "vqa appears more than once; give each a name"),
        ({"every": 5}, "evaluation.every is set, but evaluation.benchmarks is empty"),
        ({"limit": 0}, "evaluation.limit must be positive"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens must be positive"),
        (
            {"benchmarks": [{"kind": "gqa", "root": "x", "instruction": "{}"}]},
            "gqa: instruction is of the kinds vqa, refer, caption",
        ),
        (
            {"benchmarks": [{"kind": "vqa", "shards": "x", "add_bos_token": 3}]},
            "add_bos_token must be true or false, not 3",
        ),
    ],
)
def test_mistakes_in_the_recipe(section: dict, message: str, raw_recipe: RAW) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe(raw_recipe(evaluation=section), "test")
