"""Kernels, bytes and operations of a training step of the published size, counted without a GPU.

Prints the table of the current code and its differences from the committed `ledger.json`, which `--write` replaces.

    python benchmarks/ledger.py [--write]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.operations.table import CASES, LEDGER, changes, count_all, markdown, name_of, read, write


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="benchmarks/ledger.py", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"replace {LEDGER.name}")
    args = parser.parse_args()
    table = count_all()
    print("\n".join(markdown(table)))
    if args.write:
        write(table)
    else:
        different = [line for case in CASES for line in changes(case, table["cases"][name_of(case)], read())]
        print("\n".join(different) or f"as in {LEDGER.name}")


if __name__ == "__main__":
    main()
