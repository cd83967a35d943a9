"""The verb `train`: a stage, started by DeepSpeed's launcher as `launch/stageN.sh` starts it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tinygptv_ds.resources import project_root

STAGES = ("stage1", "stage2", "stage3", "stage4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage; everything after it is passed on."""
    parser.add_argument("stage", choices=STAGES, help="the stage to train")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="options of the stage and of DeepSpeed's launcher, in any order (train stage1 --help lists them)",
    )


def run(args: argparse.Namespace) -> None:
    """Replace this process by the launch script, so that signals and the exit code are its own."""
    # The launcher and the ranks must use this very Python, also where its folder is not on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    script = project_root() / "launch/start.sh"
    os.execvpe("bash", ["bash", str(script), args.stage, *args.options], {**os.environ, "PATH": path})
