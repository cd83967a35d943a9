"""Held-out shards, as `prepare` writes them: questions, expressions and captions that no training has used.

A question is asked in the words of its record, which are those of training: an entry of its instruction pool (always
the same one), or the bare question. Of a conversation every question is asked, after the true answers to those before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tinygptv_ds.data.shards.cache import ShardCache, count_samples
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.errors import DataError
from tinygptv_ds.evaluation.answer_scores import SHORT_ANSWER, gqa_hit
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, strict_and_compat
from tinygptv_ds.evaluation.benchmarks.refer import LOCATE
from tinygptv_ds.evaluation.box_scores import HIT_IOU, clean_box_answer, integers, is_well_formed, parse_box
from tinygptv_ds.evaluation.caption_metrics import caption_scores
from tinygptv_ds.evaluation.text_scores import contains, equals, token_f1
from tinygptv_ds.log import LOGGER
from tinygptv_ds.processing.boxes import iou
from tinygptv_ds.processing.image import WHITE, plain_image
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, load_prompts, render

CAPTION = "[caption] Briefly describe this image."
_ASKED_WITH = {"vqa": SHORT_ANSWER, "refer": LOCATE, "caption": CAPTION}  # of the pools with these names


def _truths(question: Question) -> Sequence[str]:
    return [question.truth] if isinstance(question.truth, str) else question.truth


def _overlap(question: Question, text: str) -> float:
    box, truths = parse_box(text), [parse_box(truth) for truth in _truths(question)]
    return max((iou(box, truth) for truth in truths if box and truth), default=0.0)


def _hit(question: Question, text: str, *, compat: bool) -> float:
    too_many = compat and len(integers(clean_box_answer(text))) > 4
    return 100.0 * (_overlap(question, text) > HIT_IOU and not too_many)


def _holds_label(question: Question, text: str) -> float:
    return 100.0 * any(gqa_hit(text, truth.lower(), compat=True) for truth in _truths(question))


KINDS = {
    "vqa": Benchmark(
        rules={
            "strict": lambda question, text: equals(text, _truths(question)),
            "contains": lambda question, text: contains(text, _truths(question)),
            "f1": lambda question, text: token_f1(text, _truths(question)),
            "compat": _holds_label,
        },
        held_out=True,
    ),
    "refer": Benchmark(
        rules={**strict_and_compat(_hit), "iou": _overlap},
        parsable=lambda question, text: is_well_formed(clean_box_answer(text)),
        held_out=True,
    ),
    "caption": Benchmark(
        rules={},
        corpus_scores=caption_scores,
        corpus_names=("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4"),
        max_new_tokens=60,
        held_out=True,
    ),
}


@dataclass(frozen=True)
class _Turn:
    """One question of a sample as it is asked, with the true answers."""

    text: str
    truths: tuple[str, ...]


def read_held_out(kind: str, shards: str, limit: int | None = None, instruction: str | None = None) -> list[Question]:
    """Read the questions or captions of shards, in stored order.

    Samples whose true answer is empty, which training leaves out, are left out and counted in the log.

    Args:
        kind: vqa for answers in words, refer for boxes, caption for captions.
        shards: a folder, glob or brace pattern.
        limit: read only the first questions, up to this number.
        instruction: asked with instead of the record's own wording, with `{}` for the stored question, if there is any.

    Raises:
        DataError: no shards, no question in them, or a sample that cannot be scored as `kind`.
    """
    cache = ShardCache()
    reader = ShardReader(cache=cache)
    tars = expand_shards(shards)
    places = [(tar, i) for tar, n in zip(tars, count_samples(tars, cache), strict=True) for i in range(n)]
    empty: list[str] = []
    found = (question for tar, index in places for question in _questions(kind, instruction, reader, tar, index, empty))
    questions = list(islice(found, limit))
    if empty:
        LOGGER.warning("%s: %d question(s) without a true answer are left out, e.g. %s", shards, len(empty), empty[0])
    if not questions:
        raise DataError(f"{shards}: no question in {len(places)} sample(s)")
    return questions


def _questions(
    kind: str, instruction: str | None, reader: ShardReader, tar: Shard, index: int, empty: list[str]
) -> Iterator[Question]:
    """Yield the questions of one sample; the keys of those with an empty true answer are added to `empty`."""
    sample = reader.read(tar, index)  # with its images, whose number is certain only once they are read
    key, record, images = sample.key, sample.record, len(sample.images)
    try:
        turns = _turns(kind, record, images)
    except DataError as error:
        raise DataError(f"{tar}: sample {key}: {error}") from None
    bare = "caption" in record and instruction is None
    own = "" if "caption" in record else _pool_entry(record)
    around = own if instruction is None else instruction
    history: list[tuple[str, str]] = []
    count = 0 if record.get("raw") else images
    for number, turn in enumerate(turns):
        text = around.replace("{}", turn.text, 1)
        count += turn.text.count(IMAGE_PLACEHOLDER)
        place = f"{tar.name}/{key}" if len(turns) == 1 else f"{tar.name}/{key}/{number + 1}"
        if any(truth.strip() for truth in turn.truths):
            yield Question(
                key=place,
                text=text,
                truth=turn.truths[0] if len(turn.truths) == 1 and kind != "caption" else list(turn.truths),
                images=_images(reader, tar, index, count),
                image_count=count,
                metadata=record if len(turns) == 1 else {**record, "question_type": f"turn {number + 1}"},
                history=tuple(history),
                padded=not record.get("raw"),
                instruction=around,
                bare=bare,
            )
        else:
            empty.append(place)
        history.append((text, turn.truths[0]))


def _images(reader: ShardReader, tar: Shard, index: int, count: int) -> Callable[[], Sequence[Path | bytes]]:
    """Return what reads the images upright and on white, which own data is trained as."""
    return lambda: tuple(plain_image(image, WHITE)[1] for image in reader.read(tar, index).images[:count])


def _pool_entry(record: dict[str, Any]) -> str:
    """Return the entry of the record's instruction pool that it is asked with; "{}" without a pool."""
    pool = record.get("pool") if "conversation" not in record else None
    if pool is None:
        return "{}"
    return _ASKED_WITH.get(pool) or load_prompts()[pool][0]


def _turns(kind: str, record: dict[str, Any], images: int) -> list[_Turn]:
    """Return the questions of a record as training words them, without an instruction and image tags.

    Raises:
        DataError: training could not use the record either, or it does not fit `kind`.
    """
    if "caption" in record:
        captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise DataError("field 'caption' must be a string or a list of strings")
        turns = [_Turn("", tuple(captions))]
    elif "conversation" in record:
        render(record, images, lambda _: 0)  # raises what training would
        rendered = render(record, images, lambda _: 0, place_images=False)
        turns = [_Turn(question or "", (answer,)) for question, answer in rendered.turns]
    else:
        render(record, images, lambda _: 0)
        count = len(record["answer"]) if isinstance(record.get("answer"), list) else 1
        answers = [_single(record, images, number) for number in range(count)]
        turns = [_Turn(answers[0][0], tuple(dict.fromkeys(answer for _, answer in answers)))]
    if kind == "refer" and not all(parse_box(truth) for turn in turns for truth in turn.truths):
        raise DataError(
            f"its answer {turns[0].truths[0]!r} is no box such as {{<10><20><30><40>}}; answers in words are scored by "
            "vqa"
        )
    if kind == "caption" and "conversation" in record:
        raise DataError("it is a conversation, not a caption; conversations are scored by vqa")
    return turns


def _single(record: dict[str, Any], images: int, number: int) -> tuple[str, str]:
    """Return the question of a single-turn record without its instruction, and its answer of this number."""
    chosen = iter((0, 0, number))  # of the texts, the pool (of one entry) and the answers
    bare = {**record, "pool": None}
    ((question, answer),) = render(bare, images, lambda _: next(chosen), place_images=False).turns
    return question or "", answer
