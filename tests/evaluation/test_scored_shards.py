"""Held-out shards: every question is asked in the words of training, and its answer is scored as what it is."""

import json
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.evaluation.benchmarks.held_out import CAPTION, KINDS, read_held_out
from tinygptv_ds.evaluation.benchmarks.question import Question, Task
from tinygptv_ds.evaluation.cli import scores
from tinygptv_ds.evaluation.scoring import score
from tinygptv_ds.evaluation.text_scores import contains, equals, token_f1, words
from tinygptv_ds.evaluation.wording import Settings, answer_tokens, bare_captions, wording
from tinygptv_ds.log import LOGGER
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, build_sequence, prompt_text
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, load_prompts, render

TAG = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
PLAIN = {"text": "What colour?", "answer": "Red."}
RECORDS: dict[str, tuple[dict[str, Any], int]] = {
    "bare question": ({"pool": None, **PLAIN}, 1),
    "question without a pool": (PLAIN, 1),
    "text alone": (PLAIN, 0),
    "two images": (PLAIN, 2),
    "cleaned": ({"text": 'What "Colour" (it is)?', "answer": "Red. And: blue", "clean": ["text", "answer"]}, 1),
    "placed by itself": ({"raw": True, "text": f"Is {TAG} like {TAG}?", "answer": "no"}, 2),
    "conversation": ({"conversation": [["What colour?", "red"], ["And what shape?", "a circle"], ["Sure?", "yes"]]}, 1),
    "conversation of text": ({"conversation": [["one", "two"], ["three", "four"]]}, 0),
    "conversation, placed": (
        {"raw": True, "conversation": [[f"{TAG}\nWhat?", "red"], ["And now?", "blue"], [f"And {TAG}?", "green"]]},
        2,
    ),
    "one-turn conversation": ({"conversation": [["Describe it.", "A red circle on gray, and nothing else."]]}, 1),
    **{
        pool: ({"pool": pool, **PLAIN, "answer": "{<1><2><3><4>}"}, 1)
        for pool in load_prompts().pools
        if pool != "stage3"
    },
}


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes (record, number of images) as shards in a folder of their own, unchecked."""
    images, folders = tiny.encoded_images(3), count()

    def write(*records: tuple[dict[str, Any], int]) -> str:
        folder = tmp_path / f"shards{next(folders)}"
        with ShardWriter(folder, 10) as writer:
            for number, (record, shown) in enumerate(records):
                members = {"json": json.dumps(record).encode()}
                members |= {f"{place}.png": image for place, image in enumerate(images[:shown])}
                writer.write(f"{number:03d}", members)
            writer.finish()
        return str(folder)

    return write


def in_training(record: dict[str, Any], images: int, template: str | None, choice: int) -> list[tuple[str, str]]:
    """Return the prompt of each question as training has it, history included, with its answer."""
    turns = render(record, images, lambda n: min(choice, n - 1)).turns
    asked = []
    so_far = ""
    for question, answer in turns:
        so_far += question if template is None else template.replace("{}", question, 1)
        asked.append((so_far, answer))
        so_far += answer + "###"
    return asked


@pytest.mark.parametrize("template", ["[INST] {} [/INST]", None])
@pytest.mark.parametrize("name", list(RECORDS))
def test_questions_are_asked_in_the_words_of_training(name: str, template: str | None, shard: Callable) -> None:
    """They are, character by character, one of the prompts that training draws from, after the true answers before."""
    record, images = RECORDS[name]
    questions = read_held_out("vqa", shard((record, images)))
    ours = wording(KINDS["vqa"], Settings(), template, "###")
    asked = [(ours.text(question), question.truth) for question in questions]
    assert asked in [in_training(record, images, template, choice) for choice in range(20)]
    prompts = [ours.prompt(question, question.images()) for question in questions]
    assert all(prompt.add_bos_token for prompt in prompts)
    assert [len(prompt.images) for prompt in prompts] == [prompt.text.count(IMAGE_PLACEHOLDER) for prompt in prompts]


def test_tokens_are_those_of_training(weights: Path, shard: Callable) -> None:
    """Ids up to the answer are equal to those of the row that training builds."""
    tokenizer = AutoTokenizer.from_pretrained(weights / "phi")
    image = ImageTokens(len(tokenizer) + 4, tiny.QUERIES)
    processor = TinyGPTVProcessor(tokenizer, num_query_tokens=image.count, image_token_id=image.token_id)
    text = TextSection(prompt_template="[INST] {} [/INST]", end_sym="###", max_txt_len=200)
    for name in ("bare question", "two images", "cleaned", "one-turn conversation"):
        record, images = RECORDS[name]
        (question,) = read_held_out("vqa", shard((record, images)))
        prompt = wording(KINDS["vqa"], Settings(), text.prompt_template, "###").prompt(question, question.images())
        row = build_sequence(render(record, images, lambda n: 0), images, tokenizer, text, image, lambda n: 0)
        first = int((row.labels != IGNORE).argmax())
        assert processor.row(prompt.parts, images, add_bos_token=prompt.add_bos_token) == row.input_ids[:first].tolist()


def test_another_instruction_replaces_the_wording(shard: Callable) -> None:
    shards = shard(RECORDS["vqa"], RECORDS["conversation"], RECORDS["placed by itself"], ({"caption": "a bus"}, 1))
    questions = read_held_out("vqa", shards, instruction="[x] {} now")
    assert [question.text for question in questions] == [
        "[x] What colour? now",
        *("[x] What colour? now", "[x] And what shape? now", "[x] Sure? now"),
        f"[x] Is {TAG} like {TAG}? now",
        "[x]  now",
    ]
    assert {question.instruction for question in questions} == {"[x] {} now"}
    fixed = read_held_out("vqa", shards, instruction="Describe.")
    ours = wording(KINDS["vqa"], Settings(), "[INST] {} [/INST]", "###")
    assert ours.text(fixed[4]) == f"[INST] {TAG}{TAG} Describe. [/INST]"  # the images that it no longer places


@pytest.mark.parametrize(
    ("prompts", "template", "asked"),
    [
        (None, None, IMAGE_PLACEHOLDER),
        (None, "[INST] {} [/INST]", IMAGE_PLACEHOLDER),
        ("stage3", "[INST] {} [/INST]", f"[INST] {TAG} Describe this image in detail. [/INST]"),
    ],
)
def test_bare_captions_are_asked_for_as_the_recipe_trains_them(
    prompts: str | None, template: str | None, asked: str, shard: Callable
) -> None:
    for kind in ("caption", "vqa"):
        (question,) = read_held_out(kind, shard(({"caption": "A red bus."}, 1)))
        ours = wording(KINDS[kind], Settings(), template, "###", bare_captions(prompts))
        text = TextSection(prompt_template=template, prompts=prompts)
        assert ours.text(question) == asked
        assert asked == prompt_text(render({"caption": "x"}, 1, lambda n: 0), 1, text, lambda n: 0)
        assert question.truth == (["A red bus."] if kind == "caption" else "A red bus.")
    other = wording(KINDS["caption"], Settings("C"), template, "###", bare_captions(None))
    assert other.text(question) == f"###Human: {TAG} {CAPTION}###Assistant: "


def test_captions_of_records_with_a_question(shard: Callable) -> None:
    shards = shard(({"pool": "caption", "text": "", "answer": ["a bus", "the bus"]}, 1), (PLAIN, 1))
    first, second = read_held_out("caption", shards)
    assert (first.text, first.truth) == (CAPTION, ["a bus", "the bus"])
    assert (second.text, second.truth) == ("What colour?", ["Red."])
    assert read_held_out("caption", shards, 1, "what?")[0].text == "what?"


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("refer", PLAIN, r"its answer 'Red\.' is no box such as .* scored by vqa"),
        ("caption", RECORDS["conversation"][0], "it is a conversation, not a caption"),
        ("vqa", {"text": "what?"}, "none of the fields"),
        ("vqa", {"pool": "nope", **PLAIN}, "no instruction pool is called 'nope'"),
        ("vqa", {"text": f"{TAG} what?", "answer": "x"}, "leave it out of the text"),
        ("caption", {"caption": 3}, "must be a string or a list of strings"),
    ],
)
def test_what_cannot_be_scored_is_named(kind: str, record: dict, message: str, shard: Callable) -> None:
    with pytest.raises(DataError, match=rf"00000\.tar: sample 000: .*{message}"):
        read_held_out(kind, shard((record, 1)))


def test_limits_count_questions_and_empty_answers_are_left_out(
    shard: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger=LOGGER.name)
    shards = shard(RECORDS["conversation"], ({"text": "a", "answer": " "}, 1), RECORDS["text alone"])
    assert [question.key.split("/", 1)[1] for question in read_held_out("vqa", shards, 2)] == ["000/1", "000/2"]
    assert len(read_held_out("vqa", shards)) == 4
    assert "1 question(s) without a true answer are left out, e.g. " in caplog.text
    with pytest.raises(DataError, match=r"no question in 1 sample"):
        read_held_out("vqa", shard(({"text": "a", "answer": ""}, 1)))


def test_records_of_other_trainers_are_read_as_in_training(shard: Callable) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", "red"), ("human", "And now?"), ("gpt", "blue")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    first, second = read_held_out("vqa", shard((record, 1)))
    ours = wording(KINDS["vqa"], Settings(), "[INST] {} [/INST]", "###")
    assert (first.truth, second.truth, second.image_count) == ("red", "blue", 1)
    assert ours.text(second).count(IMAGE_PLACEHOLDER) == 1 and ours.text(first) in ours.text(second)


def test_several_true_answers(shard: Callable) -> None:
    (question,) = read_held_out("vqa", shard(({"text": "what?", "answer": ["red", "crimson", "red"]}, 1)))
    result = score(Task("x", KINDS["vqa"], [question]), ["crimson"], "###")
    assert question.truth == ["red", "crimson"] and (result["strict"], result["compat"]) == (100, 100)


def test_conversations_are_scored_by_turn(shard: Callable) -> None:
    questions = read_held_out("vqa", shard(RECORDS["conversation"], RECORDS["bare question"]))
    result = score(Task("x", KINDS["vqa"], questions), ["red", "a blue circle", "", "Red"], "###")
    assert result["by_type"] == {"turn 1": 100.0, "turn 2": 0.0, "turn 3": 0.0}
    assert result["strict"] == 50.0 and result["f1"] == pytest.approx((100 + 80 + 0 + 100) / 4)
    assert "history" not in result["predictions"][0]
    assert result["predictions"][2]["history"] == (("What colour?", "red"), ("And what shape?", "a circle"))


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        ("Red.", ["red"], (100, 100, 100)),
        ("It is red", ["red"], (0, 100, 50)),
        ("reddish", ["red"], (0, 0, 0)),
        ("a big red bus", ["a red bus"], (0, 0, 600 / 7)),
        ("bus red", ["red bus"], (0, 0, 100)),
        ("the the the", ["the cat"], (0, 0, 40)),
        ("", ["red"], (0, 0, 0)),
        ("...", ["..."], (0, 0, 0)),
        ("blue", ["red", "Blue"], (100, 100, 100)),
        ("don't", ["dont"], (0, 0, 0)),
        ("红色的车", ["红色"], (0, 100, 200 * 2 / 6)),
        ("Ünïcode", ["ünïcode"], (100, 100, 100)),
    ],
)
def test_answers_in_words(answer: str, truths: list[str], expected: tuple[float, float, float]) -> None:
    assert (equals(answer, truths), contains(answer, truths), token_f1(answer, truths)) == pytest.approx(expected)


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_and_whole_for_equal_words(one: str, other: str) -> None:
    assert token_f1(one, [other]) == token_f1(other, [one]) <= 100
    assert token_f1(one, [one]) == (100.0 if words(one) else 0.0)


def test_answers_get_as_many_tokens_as_the_longest_true_one() -> None:
    """A free-form answer that is cut short would be scored as a wrong one."""

    def task(kind: str, *truths: Any) -> Task:
        return Task(kind, KINDS[kind], [Question("k", "?", truth, tuple) for truth in truths])

    def length(text: str) -> int:
        return len(text.split())

    long = " ".join(["word"] * 50)
    assert answer_tokens(task("vqa", "red", ["a", long]), Settings(), " ###", length) == 51
    assert answer_tokens(task("vqa", "red"), Settings(), " ###", length) == 20
    assert answer_tokens(task("caption", ["red"]), Settings(), " ###", length) == 60
    assert answer_tokens(task("vqa", long), Settings(max_new_tokens=7), " ###", length) == 7
    assert answer_tokens(task("vqa", long * 100), Settings(), " ###", length) == 1024


def test_results_record_the_wording(exported: Path, tmp_path: Path, shard: Callable, capsys: Any) -> None:
    shards = shard(RECORDS["conversation"], RECORDS["vqa"], ({"caption": "a bus"}, 1))
    options = ["--model", str(exported), "--shards", shards, "--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    (result,) = scores("vqa", options)
    assert result["questions"] == 5 and {"strict", "contains", "f1", "compat"} <= result.keys()
    assert result["wording"] == [
        CAPTION,
        "[vqa] Based on the image, respond to this question with a short answer: {}",
        "{}",
    ]
    assert result["decoding"]["add_bos_token"] is True
    (given,) = scores("vqa", [*options, "--instruction", "Say: {}", "--no-add-bos-token", "--fresh"])
    assert given["wording"] == ["Say: {}"] and given["decoding"]["add_bos_token"] is False
    assert "[INST] Say: {} [/INST]" in (tmp_path / "out/results.md").read_text()
    capsys.readouterr()
    assert scores("vqa", [*options, "--show-prompt"]) == []
    assert f"[INST] {TAG} What colour?  [/INST]" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="words of published benchmarks are fixed"):
        scores("vqa", ["--model", str(exported), "--benchmarks", "gqa", "--instruction", "{}"])
