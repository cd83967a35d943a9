"""Compute CIDEr and BLEU of captions of held-out shards: python eval/caption.py --model M --shards PATH.

The packages that compute them: pip install -r requirements-eval.txt
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.cli import run_command
from tinygptv_ds.evaluation.cli import scores


def main(argv: Sequence[str] | None = None) -> None:
    """Score and print."""
    scores("caption", argv)


if __name__ == "__main__":
    run_command(main)
