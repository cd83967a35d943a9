"""Held-out shards, as `prepare` writes them: questions, expressions and captions that no training has used."""

from __future__ import annotations

from tinygptv_ds.data.shards.cache import ShardCache, count_samples
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.reader import ShardReader, parse_record
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.errors import DataError
from tinygptv_ds.evaluation.answer_scores import SHORT_ANSWER, gqa_hit
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, strict_and_compat
from tinygptv_ds.evaluation.benchmarks.refer import LOCATE
from tinygptv_ds.evaluation.box_scores import HIT_IOU, clean_box_answer, integers, is_well_formed, parse_box
from tinygptv_ds.evaluation.caption_metrics import caption_scores
from tinygptv_ds.processing.boxes import iou

CAPTION = "[caption] Briefly describe this image."  # one of those that training draws from


def without_marks(answer: str) -> str:
    """Return the answer in lower case, without surrounding punctuation."""
    return answer.lower().strip(" .,!?:;\"'")


def _equal(question: Question, text: str) -> float:
    answer = without_marks(text)
    return 100.0 * (answer != "" and answer == without_marks(question.truth))


def _overlap(question: Question, text: str) -> float:
    box, truth = parse_box(text), parse_box(question.truth)
    return iou(box, truth) if box and truth else 0.0


def _hit(question: Question, text: str, *, compat: bool) -> float:
    too_many = compat and len(integers(clean_box_answer(text))) > 4
    return 100.0 * (_overlap(question, text) > HIT_IOU and not too_many)


KINDS = {
    "vqa": Benchmark(
        rules={
            "strict": _equal,
            "compat": lambda question, text: 100.0 * gqa_hit(text, question.truth.lower(), compat=True),
        }
    ),
    "refer": Benchmark(
        rules={**strict_and_compat(_hit), "iou": _overlap},
        parsable=lambda question, text: is_well_formed(clean_box_answer(text)),
    ),
    "caption": Benchmark(rules={}, corpus_scores=caption_scores),
}
_WORDS = {"vqa": SHORT_ANSWER, "refer": LOCATE, "caption": CAPTION}


def read_held_out(kind: str, shards: str, limit: int | None = None, instruction: str | None = None) -> list[Question]:
    """Read single-turn questions or captions from shards, in stored order.

    Args:
        kind: vqa, refer or caption.
        shards: a folder, glob or brace pattern.
        limit: read only the first questions, up to this number.
        instruction: the instruction, with `{}` for the stored text, if there is any; None: the default of `kind`.

    Raises:
        DataError: no shards, or a sample that holds no single question or caption.
    """
    cache = ShardCache()
    reader = ShardReader(cache=cache)
    tars = expand_shards(shards)
    places = [(tar, i) for tar, n in zip(tars, count_samples(tars, cache), strict=True) for i in range(n)]
    words = instruction or _WORDS[kind]
    return [_question(kind, words, reader, tar, index) for tar, index in places[:limit]]


def _question(kind: str, instruction: str, reader: ShardReader, tar: Shard, index: int) -> Question:
    key, stored, images = reader.stored(tar, index)
    record = {} if stored is None else parse_record(stored, f"{tar}: sample {key}")
    fields = ("caption", "caption") if kind == "caption" and "caption" in record else ("text", "answer")
    words, truth = (record.get(field) for field in fields)
    if kind == "caption":
        truths = [truth] if isinstance(truth, str) else truth
        if not isinstance(truths, list) or not truths or not all(isinstance(each, str) for each in truths):
            raise DataError(f"{tar}: sample {key} holds no caption")
        words, truth = "", truths
    elif not isinstance(words, str) or not isinstance(truth, str):
        raise DataError(f"{tar}: sample {key} holds no single question with one answer")
    return Question(
        key=f"{tar.name}/{key}",
        text=instruction.replace("{}", words, 1),
        truth=truth,
        images=lambda: reader.read(tar, index).images,
        image_count=images,
        metadata=record,
    )
