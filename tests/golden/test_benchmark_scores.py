"""The path from raw text to a benchmark's `compat` score gives exactly the original's scores."""

import json
from pathlib import Path

import pytest

from tinygptv_ds.evaluation.answer_scores import okvqa_answer
from tinygptv_ds.evaluation.benchmarks.question import Question, Task
from tinygptv_ds.evaluation.benchmarks.table import PUBLISHED
from tinygptv_ds.evaluation.scoring import score
from tinygptv_ds.evaluation.wording import Settings, wording


def read(golden: Path, name: str) -> dict:
    return json.loads((golden / f"metrics/{name}.json").read_bytes())


def cases(golden: Path, name: str, key: str) -> list[dict]:
    """Return the cases of a set, of which there are some."""
    found = read(golden, name)[key]
    assert found
    return found


def points(name: str, raw: str, truth: object, **metadata: object) -> float:
    question = Question("k", "?", truth, tuple, metadata=metadata)
    return score(Task(name, PUBLISHED[name].benchmark, [question]), [raw], "###")["compat"]


def test_vizwiz(golden: Path) -> None:
    for case in cases(golden, "answer_cleaning", "vizwiz"):
        assert points("vizwiz", case["raw"], case["ground_truths"]) == pytest.approx(100 * case["accuracy"]), case


def test_hateful_memes(golden: Path) -> None:
    for case in cases(golden, "answer_cleaning", "hateful_memes"):
        found = [points("hm", case["raw"], label) for label in (0, 1)]
        assert found == [100.0 * (case["prediction"] == label) for label in (0, 1)], case


def test_gqa_and_vsr(golden: Path) -> None:
    for case in cases(golden, "answer_cleaning", "contains_label"):
        found = [points(name, case["raw"], case["label"]) for name in ("gqa", "vsr")]
        assert found == [100.0 * case["gqa_hit"], 100.0 * case["vsr_hit"]], case


def test_okvqa(golden: Path) -> None:
    """The scorer's table agrees; the cleaning of answers before it has cases of its own."""
    rows = cases(golden, "vqa_accuracy", "rows")
    clean = [row for row in rows if okvqa_answer(row["prediction"], compat=True) == row["prediction"]]
    assert len(clean) > len(rows) / 2
    for row in clean:
        assert points("okvqa", row["prediction"], row["ground_truths"]) == row["accuracy_official"], row


def test_refcoco(golden: Path) -> None:
    for case in cases(golden, "refcoco", "cases"):
        size = {"width": case["image_width"], "height": case["image_height"]}
        found = points("refcoco", case["raw"], case["ground_truth"], **size)
        assert found == 100.0 * case["counts_as_hit"], case


def test_prompts(golden: Path) -> None:
    examples = read(golden, "answer_cleaning")["eval_prompt"]["examples"]
    assert examples
    for example in examples:
        words = wording(PUBLISHED["okvqa"].benchmark, Settings(), None, "\n")
        assert words.text(Question("k", example["question"], "", tuple)) == example["prompt"]
