"""What counts as a right answer on held-out shards; a wrong score would hide behind a plausible number."""

import json
from pathlib import Path

import pytest
from helpers.tiny import samples

from tinygptv_ds.data.prepare.prepare import write_samples
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.errors import DataError
from tinygptv_ds.evaluation.benchmarks.held_out import KINDS, read_held_out
from tinygptv_ds.evaluation.benchmarks.question import Question, Task
from tinygptv_ds.evaluation.benchmarks.table import PUBLISHED
from tinygptv_ds.evaluation.box_scores import parse_box
from tinygptv_ds.evaluation.report import save_json
from tinygptv_ds.evaluation.scoring import score
from tinygptv_ds.processing.boxes import iou


def scored(kind: str, truths: list, answers: list[str], facts: list[dict] | None = None) -> dict:
    facts = facts or [{}] * len(truths)
    questions = [
        Question(f"k{n}", "what?", t, tuple, metadata=f) for n, (t, f) in enumerate(zip(truths, facts, strict=True))
    ]
    return score(Task(kind, KINDS[kind], questions), answers, "###")


@pytest.mark.parametrize(
    ("answer", "strict", "compat"),
    [
        ("red", 100, 100),
        ("Red.", 100, 100),
        (" red ", 100, 100),
        ("", 0, 0),
        ("reddish", 0, 100),
        ("a red", 0, 100),
        ("blue ### red", 0, 100),
        ("red ### blue", 100, 100),
    ],
)
def test_vqa_answer_must_equal_the_truth(answer: str, strict: float, compat: float) -> None:
    result = scored("vqa", ["red"], [answer])
    assert (result["strict"], result["compat"]) == (strict, compat)


def test_what_follows_the_end_counts_for_compat_alone() -> None:
    """The original keeps what follows a last `[/INST]`, wherever it is; the answer for the strict rule has ended."""
    task = Task("vizwiz", PUBLISHED["vizwiz"].benchmark, [Question("k", "?", ["yes"] * 10, tuple)])
    result = score(task, ["yes### [INST] is it ? [/INST] no"], "###")
    assert (result["strict"], result["compat"]) == (100.0, 0.0)


def test_vqa_scores_are_split_by_question_type_and_keep_every_prediction() -> None:
    facts = [{"question_type": "color"}, {"question_type": "digit"}]
    result = scored("vqa", ["red", "seven"], ["red", ""], facts)
    assert result["by_type"] == {"color": 100.0, "digit": 0.0}
    assert (result["strict"], result["questions"], result["empty_answers"]) == (50.0, 2, 1)
    assert [(p["key"], p["answer"], p["raw"]) for p in result["predictions"]] == [("k0", "red", "red"), ("k1", "", "")]


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
    result = scored("refer", ["{<0><0><10><10>}"] * 3, ["{<0><0><10><10>}", "no idea", "{<0><0><10><10>} 5"])
    assert result["iou"] == pytest.approx(2 / 3)
    assert (result["strict"], result["compat"]) == (pytest.approx(200 / 3), pytest.approx(100 / 3))
    assert result["unparsable_answers"] == 1


def test_captions_are_scored_against_all_of_peoples() -> None:
    truths = [["A red bus (left).", "the bus"], ["Two dogs, running!"], ["a cat on a mat by the door"]]
    same = scored("caption", truths, ["a red bus (left)", "two dogs running", "A cat on a mat by the door..."])
    assert same["bleu_1"] == same["bleu_2"] == pytest.approx(100.0)
    assert same["cider"] > 100
    assert {name for name in same if name.startswith("bleu")} == {f"bleu_{n}" for n in range(1, 5)}
    other = scored("caption", truths, ["a red bus", "", "a dog"])
    assert other["cider"] < same["cider"] and other["empty_answers"] == 1


def test_questions_are_read_in_stored_order_and_up_to_the_limit(tmp_path) -> None:
    made = samples("vqa", 7)
    write_samples(iter(made), tmp_path / "vqa", samples_per_shard=3, total=7, settings={})
    questions = read_held_out("vqa", str(tmp_path / "vqa"), 5)
    assert [q.metadata["text"] for q in questions] == [sample.record["text"] for sample in made[:5]]
    assert [(q.images(), q.image_count) for q in questions] == [(sample.images, 1) for sample in made[:5]]
    assert (
        questions[0].text
        == f"[vqa] Based on the image, respond to this question with a short answer: {made[0].record['text']}"
    )


@pytest.mark.parametrize("record", [b"[" * 100_000, b"no JSON", b"[1]"])
def test_a_record_that_is_none_is_named(record: bytes, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 1) as writer:
        writer.write("odd", {"json": record})
        writer.finish()
    with pytest.raises(DataError, match="sample odd"):
        read_held_out("vqa", str(tmp_path))


def test_results_are_never_left_half_written(tmp_path) -> None:
    target = tmp_path / "scores" / "vqa.json"
    save_json(target, {"accuracy": 1.0})
    with pytest.raises(TypeError):
        save_json(target, {"accuracy": object()})
    assert json.loads(target.read_text()) == {"accuracy": 1.0}
