"""From the answers to all questions of a benchmark to its scores. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tinygptv_ds.evaluation.answer_scores import as_decoded, clean_answer
from tinygptv_ds.evaluation.benchmarks.question import Answer, Question, Task


def score(task: Task, answers: Sequence[Answer], end: str) -> dict[str, Any]:
    """Score the answers to the questions of a task; the result holds plain values, as in JSON.

    Args:
        task: benchmark and questions.
        answers: one for each question: the text as generated, or the losses of its choices.
        end: what ends an answer.

    Returns:
        The scores by rule, "strict" and "compat" in per cent; `questions`, `empty_answers`, `unparsable_answers`; the
        strict score `by_type`, where questions have a type; and all `predictions`.
    """
    rows = [_row(task, question, answer, end) for question, answer in zip(task.questions, answers, strict=True)]
    result: dict[str, Any] = {rule: _mean(row[rule] for row in rows) for rule in task.benchmark.rules}
    if task.benchmark.corpus_scores is not None:
        result |= task.benchmark.corpus_scores(task.questions, [row["answer"] for row in rows])
    result["questions"] = len(rows)
    result["empty_answers"] = sum(clean_answer(row["answer"]) == "" for row in rows)
    result["unparsable_answers"] = sum(not row.pop("parsable") for row in rows)
    by_type = _by_type(task.questions, rows)
    return result | ({"by_type": by_type} if by_type else {}) | {"predictions": rows}


def scalars(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return the numbers of a result as metrics, e.g. `eval/NAME/strict`."""
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    return {f"eval/{name}/{key}": float(value) for key, value in numbers.items() if key not in ("questions", "step")}


def _row(task: Task, question: Question, answer: Answer, end: str) -> dict[str, Any]:
    """Return one prediction with its points."""
    benchmark = task.benchmark
    stopped, whole, raw = answer, answer, {"losses": answer}
    if isinstance(answer, str):
        # The original reads on after the end: a later `[/INST]` takes the place of the answer.
        whole, stopped, raw = as_decoded(answer), as_decoded(answer.partition(end)[0]), {"raw": answer}
    asked: dict[str, Any] = {"key": question.key, "question": question.text}
    if question.history:
        asked["history"] = question.history
    row = {**asked, "answer": benchmark.readable(question, stopped), **raw}
    points = {
        name: rule(question, whole if name.startswith("compat") else stopped) for name, rule in benchmark.rules.items()
    }
    return row | {"truth": question.truth, **points, "parsable": benchmark.parsable(question, stopped)}


def _by_type(questions: Sequence[Question], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    points: dict[str, list[float]] = defaultdict(list)
    for question, row in zip(questions, rows, strict=True):
        if "question_type" in question.metadata and "strict" in row:
            points[question.metadata["question_type"]].append(row["strict"])
    return {question_type: fmean(of_type) for question_type, of_type in sorted(points.items())}


def _mean(points: Iterable[float]) -> float:
    found = list(points)
    return fmean(found) if found else 0.0
