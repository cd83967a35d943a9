"""Scores of short answers, on published benchmarks or held-out shards.

    deepspeed eval/vqa.py --model M --benchmarks gqa,vsr,iconvqa,vizwiz,hm,okvqa --root DIR
    python eval/vqa.py --model M --shards PATH

docs/evaluation.md has the layout of DIR and what the scores are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.common import evaluate, parser
from tinygptv_ds.cli import run_command

BENCHMARKS = ("gqa", "vsr", "iconvqa", "vizwiz", "hm", "okvqa")


def scores(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The results, as they are written."""
    return evaluate(parser(__doc__.splitlines()[0], BENCHMARKS).parse_args(argv), "vqa", BENCHMARKS)


def main(argv: Sequence[str] | None = None) -> None:
    """Score and print."""
    run_command(lambda: scores(argv))


if __name__ == "__main__":
    main()
