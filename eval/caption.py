"""CIDEr and BLEU of captions of held-out shards: python eval/caption.py --model M --shards PATH.

The packages that compute them: pip install -r requirements-eval.txt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.common import evaluate, parser
from tinygptv_ds.cli import run_command
from tinygptv_ds.evaluation.benchmarks.held_out import CAPTION

LENGTH = 60  # tokens; captions are longer than the answers of the other scripts


def scores(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The results, as they are written."""
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(max_new_tokens=LENGTH)
    options.add_argument("--instruction", help=f"the words to ask with (default: {CAPTION!r})")
    return evaluate(options.parse_args(argv), "caption")


def main(argv: Sequence[str] | None = None) -> None:
    """Score and print."""
    run_command(lambda: scores(argv))


if __name__ == "__main__":
    main()
