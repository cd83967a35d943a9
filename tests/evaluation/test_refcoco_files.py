"""The published RefCOCO files through the whole script: a perfect predictor has all hits, a broken one none."""

import argparse
import dataclasses
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tinygptv_ds.data.sets.common import box_string
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation import runner
from tinygptv_ds.evaluation.cli import add_options, scores
from tinygptv_ds.evaluation.evaluate import open_tasks
from tinygptv_ds.evaluation.scoring import score
from tinygptv_ds.generate.conversation import Prompt

DATA = Path(__file__).parent / "data"
SPLITS = {"refcoco_testB": 5095, "refcocog_val": 4896}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files as distributed, and for each of their images a plain one of the recorded size."""
    root = tmp_path_factory.mktemp("refcoco")
    sizes: dict[tuple[int, int], bytes] = {}
    images = root / "coco/train2014"
    images.mkdir(parents=True)
    for name in SPLITS:
        content = lzma.decompress((DATA / f"{name}.json.xz").read_bytes())
        folder = root / name.partition("_")[0]
        folder.mkdir()
        (folder / f"{name}.json").write_bytes(content)
        for entry in json.loads(content):
            size = entry["width"], entry["height"]
            if size not in sizes:
                out = io.BytesIO()
                Image.new("L", size, 120).save(out, "JPEG")
                sizes[size] = out.getvalue()
            path = images / f"{entry['img_id'][:27]}.jpg"
            if not path.exists():
                path.write_bytes(sizes[size])
    return root


def entries(root: Path) -> Iterator[dict]:
    for name in SPLITS:
        yield from json.loads((root / name.partition("_")[0] / f"{name}.json").read_bytes())


@pytest.mark.parametrize(("predictor", "expected"), [("perfect", 100.0), ("broken", 0.0)])
def test_scored_end_to_end(
    predictor: str, expected: float, root: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictor sees prompts and images as the model would, and tells boxes in the model's words."""
    true = entries(root)
    sizes: dict[Path, tuple[int, int]] = {}

    def predict(model: object, processor: object, prompts: list[Prompt], *_: object, **__: object) -> Iterator[str]:
        for prompt in prompts:
            entry, (image,) = next(true), prompt.images
            sizes.setdefault(image, Image.open(image).size)
            assert sizes[image] == (entry["width"], entry["height"])
            assert (
                prompt.text
                == f"###Human: <Img><ImageHere></Img> [refer] give me the location of {entry['sents']}###Assistant: "
            )
            box = box_string(entry["bbox"], sizes[image])
            yield box if predictor == "perfect" else f"it is {box}"

    monkeypatch.setattr(runner, "answers", predict)
    given = ["--model", str(exported), "--root", str(root), "--out", str(tmp_path), "--batch-size", "512"]
    results = [
        result
        for name in SPLITS
        for result in scores("refer", [*given, "--benchmarks", name.split("_")[0], "--splits", name.split("_")[1]])
    ]
    assert {result["benchmark"]: result["questions"] for result in results} == SPLITS
    assert [(result["strict"], result["compat"]) for result in results] == [(expected, expected)] * 2
    assert [result["unparsable_answers"] for result in results] == [0 if expected else n for n in SPLITS.values()]
    table = (tmp_path / "results.md").read_text()
    assert "| model | refcoco_testB | mean of given |" in table and "| TinyGPT-V (internal run) | 5.4 | 5.4 |" in table
    assert f"| **this model, strict** | {expected:.1f} | {expected:.1f} |" in table


@pytest.mark.parametrize(("steps", "option"), [(100, []), (1000, ["--res", "1000"])])
def test_boxes_in_other_steps(steps: int, option: list[str], root: Path) -> None:
    """The original's `--res`: a model that counts in steps of a thousandth is scored by those."""
    parser = argparse.ArgumentParser()
    add_options(parser, "refer")
    given = ["--model", "m", "--benchmarks", "refcocog", "--splits", "val", "--root", str(root), "--limit", "50"]
    (task,) = open_tasks(parser.parse_args([*given, *option]), "refer", ["refcocog"])
    answers = []
    for question in task.questions:
        x, y, width, height = question.truth
        across, down = steps / question.metadata["width"], steps / question.metadata["height"]
        corners = (x * across, y * down, (x + width) * across, (y + height) * down)
        answers.append(f"{{{''.join(f'<{min(round(c), 999)}>' for c in corners)}}}")
    assert score(task, answers, "###")["strict"] == 100.0
    other = [dataclasses.replace(q, metadata={**q.metadata, "resolution": 1100 - steps}) for q in task.questions]
    assert score(dataclasses.replace(task, questions=other), answers, "###")["strict"] < 10.0


@pytest.mark.parametrize("options", [["--benchmarks", "refcocog", "--res", "0"], ["--shards", "x", "--res", "50"]])
def test_odd_steps_are_refused(options: list[str], root: Path) -> None:
    with pytest.raises(ConfigError, match="--res"):
        scores("refer", ["--model", "m", "--root", str(root), "--splits", "val", *options])
