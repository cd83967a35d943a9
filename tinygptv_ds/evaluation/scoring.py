"""From answers to scores: the rules of a benchmark over all its questions. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tinygptv_ds.evaluation.answer_scores import as_decoded, clean_answer
from tinygptv_ds.evaluation.benchmarks.question import Answer, Question, Task


def score(task: Task, answers: Sequence[Answer], end: str) -> dict[str, Any]:
    """All that is to be told of a task's answers, plain values as of JSON.

    Args:
        task: benchmark and questions.
        answers: one for each question: the text as generated, or the losses of its choices.
        end: what ends an answer.

    Returns:
        The scores by rule, "strict" and "compat" in per cent; `questions`, `empty_answers`, `unparsable_answers`; the
        strict score `by_type`, where questions have a type; and every one of the `predictions`.
    """
    rows = [_row(task, question, answer, end) for question, answer in zip(task.questions, answers, strict=True)]
    result: dict[str, Any] = {rule: _mean(row[rule] for row in rows) for rule in task.benchmark.rules}
    if task.benchmark.over_all is not None:
        result |= task.benchmark.over_all(task.questions, [row["answer"] for row in rows])
    result["questions"] = len(rows)
    result["empty_answers"] = sum(clean_answer(row["answer"]) == "" for row in rows)
    result["unparsable_answers"] = sum(not row.pop("parsable") for row in rows)
    by_type = _by_type(task.questions, rows)
    return result | ({"by_type": by_type} if by_type else {}) | {"predictions": rows}


def scalars(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """The numbers of a result under their TensorBoard names, `eval/NAME/strict` and so on."""
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    return {f"eval/{name}/{key}": float(value) for key, value in numbers.items() if key not in ("questions", "step")}


def _row(task: Task, question: Question, answer: Answer, end: str) -> dict[str, Any]:
    """One prediction."""
    benchmark = task.benchmark
    stopped, whole, raw = answer, answer, {"losses": answer}
    if isinstance(answer, str):
        whole = as_decoded(answer)
        stopped, raw = whole.partition(end)[0].strip(), {"raw": answer}
    row = {"key": question.key, "question": question.text, "answer": benchmark.shown(question, stopped), **raw}
    points = {
        rule: points(question, whole if rule.startswith("compat") else stopped)
        for rule, points in benchmark.rules.items()
    }
    return row | {"truth": question.truth, **points, "parsable": benchmark.parsable(question, stopped)}


def _by_type(questions: Sequence[Question], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for question, row in zip(questions, rows, strict=True):
        if "question_type" in question.facts and "strict" in row:
            kinds[question.facts["question_type"]].append(row["strict"])
    return {kind: fmean(points) for kind, points in sorted(kinds.items())}


def _mean(points: Any) -> float:
    found = list(points)
    return fmean(found) if found else 0.0
