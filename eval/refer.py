"""Score boxes for referring expressions, on RefCOCO, RefCOCO+, RefCOCOg or held-out shards.

    deepspeed eval/refer.py --model M --benchmarks refcoco,refcoco+,refcocog --root DIR [--splits val,testA]
    python eval/refer.py --model M --shards PATH

docs/evaluation.md has the layout of DIR and the definition of the scores.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.cli import run_command
from tinygptv_ds.evaluation.cli import scores


def main(argv: Sequence[str] | None = None) -> None:
    """Score and print."""
    scores("refer", argv)


if __name__ == "__main__":
    run_command(main)
