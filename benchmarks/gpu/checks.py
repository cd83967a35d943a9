"""The checking process: the machine, the attention backends, and the whole tiny model packed and padded."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.attention import compare_backends, compare_packed_with_padded
from benchmarks.gpu.machine import ceilings, describe_machine, this_device
from benchmarks.gpu.plan import SIZES
from benchmarks.gpu.results import add
from tinygptv_ds.cli import run_command


def main() -> None:
    """Run every check; each appends its results when it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = this_device()
    add(args.out, "machine", describe_machine(device))
    add(args.out, "ceilings", ceilings(device))
    compare_backends(device, args.size, args.out)
    compare_packed_with_padded(device, args.out)


if __name__ == "__main__":
    run_command(main)
