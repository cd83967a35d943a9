"""The command line of evaluations: `eval/vqa.py`, `eval/refer.py` and `eval/caption.py`. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygptv_ds.arguments import hyphenated
from tinygptv_ds.config.evaluation_section import SPLITS
from tinygptv_ds.evaluation.evaluate import evaluate


@dataclass(frozen=True)
class EvaluationKind:
    """A kind of evaluation, which has a command line of its own.

    Attributes:
        summary: what it does.
        benchmarks: the published benchmarks that it knows.
    """

    summary: str
    benchmarks: tuple[str, ...] = ()


EVALUATIONS = {
    "vqa": EvaluationKind(
        "score answers in words, on published benchmarks or held-out shards",
        ("gqa", "vsr", "iconvqa", "vizwiz", "hm", "okvqa"),
    ),
    "refer": EvaluationKind(
        "score boxes for referring expressions, on RefCOCO, RefCOCO+, RefCOCOg or held-out shards",
        ("refcoco", "refcoco+", "refcocog"),
    ),
    "caption": EvaluationKind("compute CIDEr and BLEU of captions of held-out shards"),
}


def scores(kind: str, argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run an evaluation as its command line says, and return the results on rank 0, nothing on the others.

    Raises:
        TinyGPTVError: options, files or weights that the user has to fix.
    """
    parser = argparse.ArgumentParser(
        description=f"{EVALUATIONS[kind].summary[0].upper()}{EVALUATIONS[kind].summary[1:]}.",
        epilog=f"On several GPUs: deepspeed eval/{kind}.py ... or torchrun --nproc-per-node 8 eval/{kind}.py ...",
    )
    add_options(parser, kind)
    return evaluate(
        parser.parse_args(hyphenated(sys.argv[1:] if argv is None else argv)), kind, EVALUATIONS[kind].benchmarks
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all kinds of evaluations as subcommands, for `run`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in EVALUATIONS.items():
        description = f"{kind.summary[0].upper()}{kind.summary[1:]}."
        add_options(kinds.add_parser(name, help=kind.summary, description=description), name)


def run(args: argparse.Namespace) -> None:
    """Run the evaluation of a command line with `add_arguments`."""
    evaluate(args, args.kind, EVALUATIONS[args.kind].benchmarks)


def add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the options of one kind of evaluation."""
    benchmarks = EVALUATIONS[kind].benchmarks
    parser.add_argument("--model", type=Path, required=True, help="an exported folder, a run, a checkpoint or a file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", help="a folder, glob or brace pattern of held-out shards")
    if benchmarks:
        source.add_argument("--benchmarks", metavar="NAME,...", help=f"of {', '.join(benchmarks)}")
        parser.add_argument(
            "--root", type=Path, default=Path(), help="the folder with the benchmarks' files (default: the current one)"
        )
    if any(SPLITS[name] for name in benchmarks):
        parser.add_argument("--splits", metavar="NAME,...", help="only these splits (default: all of each benchmark)")
    if kind == "refer":
        parser.add_argument(
            "--res",
            type=int,
            default=100,
            metavar="N",
            help="the number in a box's answer that means the whole width or height (default: 100, as trained)",
        )
    parser.add_argument(
        "--instruction",
        help="for shards: the words to ask with, with {} for the stored question (default: as each record was trained)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another place of a benchmark's files (gqa.images=FOLDER) or of base weights (model.phi=FOLDER)",
    )
    parser.add_argument("--limit", type=int, help="only the first N questions of each")
    parser.add_argument(
        "--template",
        help="benchmark (the published scripts' own), training (the model's), A, B, C (see docs/use/inference.md), or "
        "a text with {} for the question (default: benchmark, and training for shards)",
    )
    parser.add_argument("--show-prompt", action="store_true", help="print the first prompt of each, and exit")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="maximum length of an answer (default: 20 as published, 60 for captions; for shards at least what the "
        "longest true answer takes)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="questions per batch of a rank (default: 32)")
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 on a GPU, else fp32"
    )
    parser.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start prompts with the BOS token, as in training (default: for shards, but not in the templates A and C)",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="the stage's YAML, for weights that do not name their base weights"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="answers and results (default: runs/eval/MODEL)")
    parser.add_argument(
        "--fresh", action="store_true", help="remove answers of an earlier evaluation instead of resuming from them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result of a single benchmark here, too")
    parser.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="folder for the scores (default: that of the model's run, if it has one)",
    )
    parser.add_argument("--step", type=int, help="step of the scores on TensorBoard (default: the model's)")
    parser.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by the launcher
