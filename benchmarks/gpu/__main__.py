"""Attention, and training steps of the published size with random weights, measured on this machine's GPUs.

Prints one table and writes it, with all figures, to a folder. `benchmarks/gpu.sh` finds Python and missing packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.plan import CHECKS, groups, obstacle
from benchmarks.gpu.report import Report
from benchmarks.gpu.run import Launcher, run_checks, run_group
from tinygptv_ds.cli import run_command
from tinygptv_ds.errors import ConfigError

# Import name -> package. The steps need only these packages of requirements.txt.
NEEDED = {
    "torch": "torch",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "timm": "timm",
    "tensorboard": "tensorboard",
    "yaml": "pyyaml",
    "braceexpand": "braceexpand",
    "hjson": "hjson",
    "cpuinfo": "py-cpuinfo",
    "pydantic": "pydantic",
    "psutil": "psutil",
    "einops": "einops",
    "msgpack": "msgpack",
    "tqdm": "tqdm",
    "PIL": "pillow",
}
OLDEST = {"torch": (2, 11), "deepspeed": (0, 19, 8), "transformers": (5, 17)}  # oldest versions that were tried


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as much as the time allows."""
    args = _parser().parse_args(argv)
    check_packages()
    if "RANK" in os.environ:
        raise ConfigError("start this without a launcher: it starts its own ranks, one on each of --gpus")
    gpus = _gpus() if args.gpus is None else args.gpus
    size = "tiny" if args.tiny or not gpus else "published"
    if size == "tiny":
        print("the tiny model: shows that every part runs; its figures mean nothing", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_bytes(b"")
    ranks = max(1, gpus)
    report = Report(args.out, {"size": size, "gpus": gpus})
    launch = Launcher(args.out, args.minutes, ranks)
    options = ["--size", size, "--steps", str(args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate([None, *groups()]):
            name = CHECKS if part is None else part.name
            if args.only and not any(word.lower() in name.lower() for word in args.only):
                continue
            if part is not None and not (args.only or args.all or part.by_default):
                continue
            possible = part is None or any(obstacle(case, size) is None for case in part.cases)
            if possible and not launch.has_time():
                report.left_out(name, f"{launch.left:.0f} s were left of {args.minutes:g} minutes")
                continue
            print(f"{name} ...", flush=True)
            own = Path(folder) / str(number)
            own.mkdir()
            if part is None:
                run_checks(launch, size, report.running_file(), report)
            else:
                run_group(launch, part, options, own, report)
    report.write()
    print("\n" + report.text() + f"\n{args.out}/gpu.json has all figures, log.txt the output of the processes")
    if not report.is_good:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="folder for gpu.json, table.md and log.txt"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="time limit; parts that do not fit are left out and reported (default: %(default)g)",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs for the steps (default: all)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each case (default: %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORDS",
        help=f"parts with these words in their names, e.g. {CHECKS} or 'ZeRO-3, bf16' (default: all)",
    )
    parser.add_argument("--all", action="store_true", help="ZeRO-3 and fp16, too")
    parser.add_argument(
        "--tiny",
        "--dry-run",
        action="store_true",
        help="use a tiny model, to see that every part runs (the default without a GPU)",
    )
    return parser


def check_packages() -> None:
    """Check that all packages that the processes import are installed.

    Raises:
        ConfigError: packages are missing or too old.
    """
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{sys.executable} has no {', '.join(missing)}. Install requirements.txt; for a machine without a network "
            "collect wheels elsewhere (bash benchmarks/gpu_wheels.sh DIR) and name them here: --wheels DIR"
        )
    for name, oldest in OLDEST.items():
        found = metadata.version(name)
        if tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split("+")[0].split(".")[:3]) < oldest:
            raise ConfigError(f"{name} {found} is too old: {'.'.join(map(str, oldest))} is the oldest that was tried")


def _gpus() -> int:
    """Return the number of GPUs that torch sees, from another process, so that this one takes none of their memory."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"torch cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    run_command(main)
