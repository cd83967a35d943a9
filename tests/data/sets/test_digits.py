"""The embedded scenes: what they say about themselves has to be true, or every score on them means nothing."""

import io
import itertools
import random
import re

import numpy as np
import pytest
from PIL import Image

from tinygptv_ds.data.sets import digits
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import render

BOX = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>\}")


def scenes(count: int, split: str = "test") -> list[digits.Scene]:
    rng = random.Random(7)
    return [digits.random_scene(rng, split) for _ in range(count)]


@pytest.mark.parametrize("name", digits.DIGIT_SETS)
def test_samples_are_a_function_of_their_arguments(name):
    first = list(digits.samples(name, "train", 20, seed=3))
    assert first == list(digits.samples(name, "train", 20, seed=3))
    assert first[:5] == list(digits.samples(name, "train", 5, seed=3)), "a smaller set is a part of the larger one"
    records = [sample.record for sample in first]
    assert records != [sample.record for sample in digits.samples(name, "train", 20, seed=4)]
    assert records != [sample.record for sample in digits.samples(name, "test", 20, seed=3)]
    assert len({sample.key for sample in first}) == 20


@pytest.mark.parametrize("name", digits.DIGIT_SETS)
def test_every_record_renders_with_its_image(name):
    rng = random.Random(0)
    for sample in digits.samples(name, "test", 20, seed=0):
        turns = render(sample.record, len(sample.images), rng.randrange).turns
        assert all(answer for _, answer in turns)
        for image in sample.images:
            assert Image.open(io.BytesIO(image)).size == (digits.SIZE, digits.SIZE)


def test_no_scan_is_in_both_splits():
    def scans(split: str) -> set[bytes]:
        return {glyph.tobytes() for of_value in digits.glyphs(split).values() for glyph in of_value}

    assert not scans("train") & scans("test")
    assert sum(map(len, digits.glyphs("train").values())) == 1438 * len(digits.GLYPH_SIZES)
    assert sum(map(len, digits.glyphs("test").values())) == 359 * len(digits.GLYPH_SIZES)


def test_boxes_are_the_tight_bounds_of_the_drawn_pixels():
    for number in range(60):
        cell, value = number % 9, digits.VALUES[number % 10]
        with_digit = digits.draw(random.Random(number), "test", [(cell, value, "white")])
        # the same random numbers without the digit: the background alone
        without = digits.draw(random.Random(number), "test", [])
        changed = (with_digit.pixels != without.pixels).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        (digit,) = with_digit.digits
        assert digit.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        left, top = cell % 3 * digits.CELL, cell // 3 * digits.CELL
        x1, y1, x2, y2 = digit.box
        assert left <= x1 < x2 <= left + digits.CELL and top <= y1 < y2 <= top + digits.CELL


def test_digits_of_a_scene_differ_so_that_a_question_has_one_answer():
    counts = set()
    for scene in scenes(300):
        counts.add(len(scene.digits))
        for attribute in ("value", "color", "cell"):
            assert len({getattr(digit, attribute) for digit in scene.digits}) == len(scene.digits)
    assert counts == {1, 2, 3, 4}


def answer_from_scene(question: str, scene: digits.Scene) -> str:
    """Answers a question by its words alone, in another way than it was made."""
    if question.startswith("how many"):
        return digits.VALUES[len(scene.digits)]
    words = set(re.findall(r"[a-z]+(?:-[a-z]+)?", question))
    if question.startswith(("is there", "do you see")):
        said = words & (set(digits.VALUES) | set(digits.COLORS))
        return "yes" if any(said <= {digit.value, digit.color} for digit in scene.digits) else "no"
    (digit,) = [d for d in scene.digits if words & {d.value, d.color, d.cell}]
    if "place" in words or "where" in words:
        return digit.cell
    return digit.color if "color" in words else digit.value


@pytest.mark.parametrize("kind", digits.QUESTIONS)
def test_answers_are_true(kind):
    rng = random.Random(11)
    for scene in scenes(300):
        question, answer = digits.QUESTIONS[kind][0](rng, scene)
        assert answer_from_scene(question, scene) == answer, question
        assert " " not in answer


def test_boxes_in_the_texts_are_those_of_the_digits_they_name():
    for name in ("digits_refer", "digits_identify", "digits_grounding", "digits_detection"):
        for sample in digits.samples(name, "test", 50, seed=1):
            boxes = {digits.box_string(tuple(digit["box"])): digit for digit in sample.record["scene"]}
            text, answer = sample.record["text"], sample.record["answer"]
            if name == "digits_grounding":
                pairs = [(m[1], m[2]) for m in re.finditer(r"<p>(.*?)</p> (\{.*?\})", answer)]
                assert len(pairs) == len(boxes)
            else:
                pairs = [(answer, text)] if name == "digits_identify" else [(text, BOX.search(answer)[0])]
            for phrase, box in pairs:
                digit = boxes[box]
                assert set(phrase.split()) - {"the", "a"} <= {digit["value"], digit["color"]}


def test_box_text_is_cut_off_to_whole_per_cent():
    assert digits.box_string((0, 29, 83, 84)) == "{<0><34><98><100>}"


def test_captions_and_descriptions_name_every_digit_and_no_other():
    rng = random.Random(2)
    for scene in scenes(100):
        for text in (digits.caption(rng, scene), digits.description(scene).partition(". ")[2]):
            words = re.findall(r"[a-z-]+", text)
            assert [word for word in words if word in digits.VALUES] == [digit.value for digit in scene.digits]
            assert [word for word in words if word in digits.COLORS] == [digit.color for digit in scene.digits]


def test_guessing_scores_below_a_fifth():
    vqa = digits.vqa_chance([sample.record for sample in digits.samples("digits_vqa", "test", 1000, seed=0)])
    assert set(vqa) == {"all", *digits.QUESTIONS}
    assert 0.1 < vqa["all"] < 0.2
    refer = digits.refer_chance([sample.record for sample in digits.samples("digits_refer", "test", 300, seed=0)])
    assert 0.02 < refer < 0.2


def test_chance_is_the_share_of_each_types_most_frequent_answer():
    answers = [("digit", "one"), ("digit", "one"), ("digit", "two"), ("count", "two")]
    chance = digits.vqa_chance([{"question_type": kind, "answer": answer} for kind, answer in answers])
    assert chance == {"all": 3 / 4, "digit": 2 / 3, "count": 1.0}
    assert digits.refer_chance([{"answer": "{<10><10><20><20>}"}] * 3) == 1.0


def test_arithmetic_in_texts_without_images_is_right():
    value = digits.VALUES.index
    for sample in itertools.islice(digits.samples("digits_text", "train", 200, seed=0), 200):
        assert sample.images == ()
        question, answer = sample.record["text"], sample.record["answer"]
        named = [value(word) for word in re.findall(r"[a-z]+", question) if word in digits.VALUES]
        expected = max(named) if "larger" in question else min(named)
        expected += 1 if "after" in question else -1 if "before" in question else 0
        assert value(answer) == expected


def test_unknown_names_are_refused_by_name():
    with pytest.raises(DataError, match="embedded dataset 'digits_vq'"):
        next(digits.samples("digits_vq", "train", 1, seed=0))
    with pytest.raises(DataError, match="split 'validation'"):
        next(digits.samples("digits_vqa", "validation", 1, seed=0))
