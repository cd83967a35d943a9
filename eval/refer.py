"""Boxes for referring expressions on held-out pictures: python eval/refer.py --model RUN --shards PATH."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.common import Question, ask, parser, read_questions, save_json
from tinygptv_ds.cli import run_command
from tinygptv_ds.infer.boxes import iou, parse_box

INSTRUCTION = "[refer] give me the location of {}"


def score(questions: Sequence[Question], given: Sequence[str]) -> dict:
    """Mean IoU and share of IoU above 0.5; a malformed answer counts as 0."""
    predictions, overlaps = [], []
    for question, answer in zip(questions, given, strict=True):
        box, truth = parse_box(answer), parse_box(question.truth)
        overlaps.append(iou(box, truth) if box and truth else 0.0)
        predictions.append(
            {
                "key": question.key,
                "phrase": question.text,
                "answer": answer,
                "truth": question.truth,
                "iou": overlaps[-1],
            }
        )
    return {
        "iou": sum(overlaps) / max(len(overlaps), 1),
        "accuracy": sum(overlap > 0.5 for overlap in overlaps) / max(len(overlaps), 1),
        "questions": len(overlaps),
        "malformed": sum(parse_box(answer) is None for answer in given),
        "predictions": predictions,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Score and print."""
    args = parser(__doc__).parse_args(argv)
    run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    args.desc = "refer"
    questions = read_questions(args.shards, args.limit)
    result = score(questions, ask(args, questions, INSTRUCTION))
    print(
        f"mean IoU {result['iou']:.3f}, {100 * result['accuracy']:.1f} % above 0.5, of {result['questions']} phrases "
        f"({result['malformed']} malformed answers)"
    )
    if args.json:
        save_json(args.json, result)


if __name__ == "__main__":
    main()
