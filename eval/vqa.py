"""Score short answers, on published benchmarks or held-out shards.

    deepspeed eval/vqa.py --model M --benchmarks gqa,vsr,iconvqa,vizwiz,hm,okvqa --root DIR
    python eval/vqa.py --model M --shards PATH

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
    scores("vqa", argv)


if __name__ == "__main__":
    run_command(main)
