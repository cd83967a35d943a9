"""The strict scores against the original's; a loose score passes for a good model."""

import pytest

from tinygptv_ds.evaluation.answer_scores import (
    clean_answer,
    gqa_hit,
    hateful_memes_label,
    okvqa_accuracy,
    okvqa_answer,
    vizwiz_accuracy,
    vsr_hit,
    vsr_points,
)
from tinygptv_ds.evaluation.benchmarks.question import Question
from tinygptv_ds.evaluation.benchmarks.table import PUBLISHED
from tinygptv_ds.evaluation.box_scores import counts_as_hit, parse_box, pixel_iou
from tinygptv_ds.evaluation.vqa_accuracy import normalize, remove_punctuation, vqa_accuracy
from tinygptv_ds.evaluation.wording import Settings, wording

REFERENCES = ["red"] * 9 + ["blue"]


@pytest.mark.parametrize(
    ("text", "strict", "compat"),
    [
        ("Yes###Human: no", "yes", "yes"),
        ("Assistant: Red", "red", "assistant: red"),
        ("a <unk>###x", "a", "a"),
        ("###red", "", ""),
    ],
)
def test_okvqa_answers(text: str, strict: str, compat: str) -> None:
    assert (okvqa_answer(text), okvqa_answer(text, compat=True)) == (strict, compat)


@pytest.mark.parametrize(
    ("text", "references", "strict", "compat"),
    [
        ("Red", REFERENCES, 100, 100),
        ("blue", REFERENCES, 30, 30),
        ("Assistant: red", REFERENCES, 100, 0),
        ("", REFERENCES, 0, 0),
        ("", ["", "", "", "", "red", "red", "red", "red", "red", "red"], 0, 100),
        ("### red", ["a", "a", "a", "a", "red", "red", "red", "red", "red", "red"], 0, 100),  # "a" normalised is empty
    ],
)
def test_okvqa_accuracy(text: str, references: list[str], strict: float, compat: float) -> None:
    assert (okvqa_accuracy(text, references), okvqa_accuracy(text, references, compat=True)) == (strict, compat)


@pytest.mark.parametrize(
    ("text", "references", "strict", "compat"),
    [
        ("RED### blue", ["red", "Red", "blue", "green"], 2 / 3, 2 / 3),
        ("red", ["red"] * 10, 1, 1),
        ("", ["red"] * 10, 0, 1),
        ("### red", ["red"] * 10, 0, 1),
        ("", [""] * 10, 0, 1),
        ("red", ["dark red", "red car", "blue"], 0, 2 / 3),  # contained in the reference
        ("dark red", ["red", "dark", "blue"], 0, 2 / 3),  # contains the reference
        ("<unk>red", ["red", "blue"], 1 / 3, 1 / 3),
        ("red", ["red_red_red", "blue"], 0, 1),  # three references for the original
        ("b_c", ["b_c", "d"], 1 / 3, 2 / 3),
    ],
)
def test_vizwiz(text: str, references: list[str], strict: float, compat: float) -> None:
    assert (vizwiz_accuracy(text, references), vizwiz_accuracy(text, references, compat=True)) == (strict, compat)


@pytest.mark.parametrize(
    ("text", "strict", "compat"),
    [
        ("Yes###no", 1, 1),
        (" no ", 0, 0),
        ("Assistant: no", 0, 0),
        ("another", None, 0),
        ("knows yes", None, 1),
        ("no, it is not", None, 0),
        ("no<unk>", 0, 0),
        ("maybe", None, None),
        ("### yes", None, None),
    ],
)
def test_hateful_memes(text: str, strict: int | None, compat: int | None) -> None:
    assert (hateful_memes_label(text), hateful_memes_label(text, compat=True)) == (strict, compat)


@pytest.mark.parametrize(
    ("text", "label", "strict", "gqa", "vsr"),
    [
        ("Dog###cat", "dog", True, True, True),
        ("dog", "Dog", True, False, True),  # GQA's label is not lower-cased
        ("hotdog", "dog", False, True, True),
        ("it is true", "true", False, True, True),
        ("cat###Human: dog", "dog", False, True, True),  # the continuation is not cut
        ("", "", False, True, True),
        ("cat", "dog", False, False, False),
    ],
)
def test_labels(text: str, label: str, strict: bool, gqa: bool, vsr: bool) -> None:
    assert (gqa_hit(text, label), vsr_hit(text, label)) == (strict, strict)
    assert (gqa_hit(text, label, compat=True), vsr_hit(text, label, compat=True)) == (gqa, vsr)


@pytest.mark.parametrize(
    ("text", "label", "strict", "points"),
    [
        ("true", "true", True, 1),
        ("no", "false", False, 1),
        ("i do not know", "False", False, 1),  # "no" stands in both "not" and "know"
        ("false, no", "false", False, 2),
        ("true, yes", "true", False, 2),
        ("yes", "false", False, 0),
        ("no", "true", False, 0),
    ],
)
def test_statement_may_score_twice_in_the_second_version(text: str, label: str, strict: bool, points: int) -> None:
    assert (vsr_hit(text, label), vsr_points(text, label)) == (strict, points)


@pytest.mark.parametrize(
    ("answer", "any_form", "strict", "compat"),
    [
        ("{<10><10><50><50>}", False, True, True),
        (" <unk>{ <10> <10> <50> <50> }###", False, True, True),
        ("{<10><10><50><50>} 7", False, True, False),  # the original's fifth number raises
        ("{<10><10><50><50>}{<10><10><50><50>}", False, True, False),
        ("it is {<10><10><50><50>}", False, False, False),
        ("it is {<10><10><50><50>}", True, True, True),
        ("it is {<10><10><50><50>} 7", True, True, False),
        ("{<60><60><90><90>}", False, False, False),
        ("{<50><50><10><10>}", False, False, False),
        ("{<10><10><50>}", True, False, False),
        ("", True, False, False),
    ],
)
def test_hits(answer: str, any_form: bool, strict: bool, compat: bool) -> None:
    where = ((20, 10, 80, 40), 200, 100)  # x, y, width, height in an image of 200 x 100
    assert counts_as_hit(answer, *where, any_form=any_form) is strict
    assert counts_as_hit(answer, *where, any_form=any_form, compat=True) is compat


def test_half_of_the_box_is_no_hit() -> None:
    """Ten pixels of twenty, the last ones counted: exactly half."""
    where = ((0, 0, 19, 0), 100, 100)
    assert pixel_iou((0, 0, 9, 0), (0, 0, 19, 0)) == 0.5
    assert not counts_as_hit("{<0><0><9><0>}", *where)
    assert counts_as_hit("{<0><0><10><0>}", *where)
    assert counts_as_hit("{<0><0><100><0>}", *where, resolution=1000)


def test_boxes_that_cancel_out_do_not_overlap() -> None:
    """Wrong corners make an area of -1 next to one of 1: the original divides by zero and counts a miss."""
    assert pixel_iou((0, 0, -2, 0), (5, 5, 5, 5)) == 0


def test_parsed_boxes_are_cleaned() -> None:
    assert parse_box("\n<unk>{<1> <2><3><4>}") == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two dogs, a cat", "2 dogs cat"),
        ("none\tof\nthem", "0 of them"),
        ("shouldntve", "shouldntve"),  # two apostrophes are missing
        ("shouldn'tve", "shouldn't've"),
        ("y'allll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("Im Ive lets shes", "im ive lets shes"),
        ("1,000 t-shirts", "1000 tshirts"),  # a number with a comma has all punctuation left out
        ("t-shirts", "t shirts"),
        ("a.m. 3.5.", "am 3.5"),
        ("5:30", "5:30"),
    ],
)
def test_normalised(answer: str, expected: str) -> None:
    assert normalize(answer) == expected


def test_no_more_than_32_periods_go() -> None:
    assert remove_punctuation("x" + "." * 40) == "x" + "." * 8


def test_normalised_only_where_people_differ() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 100
    assert vqa_accuracy("TWO\n", ["two"] * 10) == 100
    assert vqa_accuracy("two.", ["two", "two\n", " two"] * 3 + ["two"]) == 0  # white space is no difference


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100)])
def test_each_person_is_left_out_in_turn(agreeing: int, expected: float) -> None:
    assert vqa_accuracy("no", ["no"] * agreeing + ["yes"] * (10 - agreeing)) == expected


def test_braces_in_a_question_stay() -> None:
    words = wording(PUBLISHED["okvqa"].benchmark, Settings(), None, "###")
    asked = words.text(Question("k", "{question}?", "", tuple))
    assert asked == "###Human: <Img><ImageHere></Img> {question}?###Assistant: "


def test_last_turn_of_the_assistant_counts() -> None:
    assert clean_answer("Assistant: a Assistant: <unk> b ### Assistant: c") == "b"
