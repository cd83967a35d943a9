"""Accuracy of short answers on held-out questions: python eval/vqa.py --model RUN --shards PATH.

An answer counts when it equals the true one after the VQA clean-up of case and surrounding punctuation.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.common import Question, ask, parser, read_questions, save_json
from tinygptv_ds.cli import run_command

INSTRUCTION = "[vqa] Based on the image, respond to this question with a short answer: {}"


def score(questions: Sequence[Question], given: Sequence[str]) -> dict:
    """Accuracy over all and by `question_type`, with every prediction."""
    by_type: dict[str, list[bool]] = defaultdict(list)
    predictions = []
    for question, answer in zip(questions, given, strict=True):
        right = normalise(answer) == normalise(question.truth)
        by_type[question.record.get("question_type", "all")].append(right)
        predictions.append(
            {"key": question.key, "question": question.text, "answer": answer, "truth": question.truth, "right": right}
        )
    every = [right for group in by_type.values() for right in group]
    return {
        "accuracy": sum(every) / max(len(every), 1),
        "by_type": {name: sum(group) / len(group) for name, group in sorted(by_type.items())},
        "questions": len(every),
        "empty_answers": sum(not p["answer"] for p in predictions),
        "predictions": predictions,
    }


def normalise(answer: str) -> str:
    """Lower case, without punctuation around it."""
    return answer.lower().strip(" .,!?:;\"'")


def main(argv: Sequence[str] | None = None) -> None:
    """Score and print."""
    args = parser(__doc__.splitlines()[0]).parse_args(argv)
    run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    args.desc = "vqa"
    questions = read_questions(args.shards, args.limit)
    result = score(questions, ask(args, questions, INSTRUCTION))
    print(f"VQA accuracy {100 * result['accuracy']:.1f} % of {result['questions']} questions")
    for name, accuracy in result["by_type"].items():
        print(f"  {name}: {100 * accuracy:.1f} %")
    if args.json:
        save_json(args.json, result)


if __name__ == "__main__":
    main()
