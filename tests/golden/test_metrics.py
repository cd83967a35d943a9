"""Every score equals that of the original's scorers exactly."""

import json
from pathlib import Path

import pytest

from tinygptv_ds.evaluation.answer_scores import (
    cut_turn,
    gqa_hit,
    hateful_memes_label,
    okvqa_answer,
    vizwiz_accuracy,
    vsr_hit,
)
from tinygptv_ds.evaluation.box_scores import (
    HIT_IOU,
    clean_box_answer,
    corners,
    counts_as_hit,
    integers,
    is_well_formed,
    pixel_box,
    pixel_iou,
)
from tinygptv_ds.evaluation.vqa_accuracy import (
    normalize,
    remove_punctuation,
    single_line,
    vqa_accuracy,
)
from tinygptv_ds.generate.conversation import Conversation
from tinygptv_ds.processing.templates import PUBLISHED


def read(golden: Path, name: str) -> dict:
    return json.loads((golden / f"metrics/{name}.json").read_bytes())


def test_vqa_accuracy(golden: Path) -> None:
    rows = read(golden, "vqa_accuracy")["rows"]
    assert rows
    for row in rows:
        answer, truths = row["prediction"], row["ground_truths"]
        ours = {
            "after_punctuation": remove_punctuation(single_line(answer)),
            "normalised": normalize(answer),
            "accuracy_official": vqa_accuracy(answer, truths),
        }
        assert row | ours == row, row


def test_boxes(golden: Path) -> None:
    known = read(golden, "refcoco")
    resolution, cases = known["resolution"], known["cases"]
    assert cases
    assert known["threshold"] == f"iou > {HIT_IOU}"
    for case in cases:
        size = case["image_width"], case["image_height"]
        cleaned = clean_box_answer(case["raw"])
        numbers = integers(cleaned)
        expected = case["cleaned"], case["well_formed"], case["integers"], case.get("error")
        assert (cleaned, is_well_formed(cleaned), numbers, error_of(numbers)) == expected, case
        if error_of(numbers):
            assert (case["box"], case["iou"]) == (None, None)
            with pytest.raises(ValueError, match="unpack"):
                pixel_box(numbers, *size, resolution)
        else:
            box = pixel_box(numbers, *size, resolution)
            overlap = pixel_iou(box, corners(case["ground_truth"]))
            assert (list(box), overlap, len(numbers) > 4) == (case["box"], case["iou"], case["extra_integers"]), case
        for field, any_form in (("counts_as_hit", False), ("would_hit_if_not_filtered", True)):
            hit = counts_as_hit(
                case["raw"], case["ground_truth"], *size, resolution=resolution, any_form=any_form, compat=True
            )
            assert hit is case[field], (field, case)


def error_of(numbers: list[int]) -> str | None:
    """Return the error of the original, which scales the first four numbers, then treats the whole list as a box."""
    return "IndexError" if len(numbers) < 4 else "ValueError" if len(numbers) > 4 else None


def test_okvqa_answers(golden: Path) -> None:
    cases = read(golden, "answer_cleaning")["okvqa"]
    assert cases
    for case in cases:
        assert okvqa_answer(case["raw"], compat=True) == case["answer"], case


def test_vizwiz(golden: Path) -> None:
    cases = read(golden, "answer_cleaning")["vizwiz"]
    assert cases
    for case in cases:
        ours = cut_turn(case["raw"]), vizwiz_accuracy(case["raw"], case["ground_truths"], compat=True)
        assert ours == (case["answer"], case["accuracy"]), case


def test_hateful_memes(golden: Path) -> None:
    """An answer that is neither yes nor no is kept as it is in the original's results."""
    cases = read(golden, "answer_cleaning")["hateful_memes"]
    assert cases
    for case in cases:
        label = hateful_memes_label(case["raw"], compat=True)
        assert (cut_turn(case["raw"]) if label is None else label) == case["prediction"], case


def test_labels_in_the_text(golden: Path) -> None:
    cases = read(golden, "answer_cleaning")["contains_label"]
    assert cases
    for case in cases:
        ours = tuple(hit(case["raw"], case["label"], compat=True) for hit in (gqa_hit, vsr_hit))
        assert ours == (case["gqa_hit"], case["vsr_hit"]), case


def test_prompts(golden: Path) -> None:
    known = read(golden, "answer_cleaning")["eval_prompt"]
    assert known["template_of_one_question"] == Conversation(PUBLISHED).ask("{question}", ["image"]).text
    assert known["examples"]
    for example in known["examples"]:
        assert Conversation(PUBLISHED).ask(example["question"], ["image"]).text == example["prompt"]
