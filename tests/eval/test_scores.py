"""What counts as a right answer and a hit; a wrong score would hide behind a plausible number."""

import json

import pytest
from tiny import samples

from eval import refer, vqa
from eval.common import Question, read_questions, save_json
from tinygptv_ds.data.prepare import write_samples
from tinygptv_ds.errors import DataError
from tinygptv_ds.infer.boxes import iou, parse_box


def question(truth: str, **record: str) -> Question:
    return Question("k", "what is it ?", (), truth, record)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("red", True), ("Red.", True), (" red ", True), ("", False), ("reddish", False), ("a red", False)],
)
def test_vqa_answer_must_equal_the_truth(answer: str, right: bool) -> None:
    assert vqa.score([question("red")], [answer])["accuracy"] == float(right)


def test_vqa_scores_are_split_by_question_type_and_keep_every_prediction() -> None:
    questions = [question("red", question_type="color"), question("seven", question_type="digit")]
    result = vqa.score(questions, ["red", ""])
    assert result["by_type"] == {"color": 1.0, "digit": 0.0}
    assert (result["accuracy"], result["questions"], result["empty_answers"]) == (0.5, 2, 1)
    assert [p["answer"] for p in result["predictions"]] == ["red", ""]


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("{<1><2><30><100>}", (1, 2, 30, 100)),
        ("{ <1> <2> <30> <40> } and more", (1, 2, 30, 40)),
        ("it is {<1><2><30><40>}", None),
        ("{<1><2><30>}", None),
        ("{<1><2><30><4000>}", None),
        ("", None),
    ],
)
def test_only_an_answer_that_starts_with_a_well_formed_box_has_one(answer: str, box: tuple | None) -> None:
    assert parse_box(answer) == box


def test_iou_of_known_boxes() -> None:
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0.0
    assert iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0.0


def test_refer_counts_malformed_answers_as_misses() -> None:
    truths = [question("{<0><0><10><10>}")] * 2
    result = refer.score(truths, ["{<0><0><10><10>}", "no idea"])
    assert (result["iou"], result["accuracy"], result["malformed"]) == (0.5, 0.5, 1)


def test_questions_are_read_in_stored_order_and_up_to_the_limit(tmp_path) -> None:
    made = samples("vqa", 7)
    write_samples(iter(made), tmp_path / "vqa", samples_per_shard=3, total=7, settings={})
    questions = read_questions(str(tmp_path / "vqa"), 5)
    assert [q.text for q in questions] == [sample.record["text"] for sample in made[:5]]


def test_a_sample_without_a_single_question_is_named(tmp_path) -> None:
    write_samples(iter(samples("chat", 2)), tmp_path / "chat", samples_per_shard=2, total=2, settings={})
    with pytest.raises(DataError, match=r"00000\.tar: sample 000000"):
        read_questions(str(tmp_path / "chat"), None)


def test_results_are_never_left_half_written(tmp_path) -> None:
    target = tmp_path / "scores" / "vqa.json"
    save_json(target, {"accuracy": 1.0})
    with pytest.raises(TypeError):
        save_json(target, {"accuracy": object()})
    assert json.loads(target.read_text()) == {"accuracy": 1.0}
