"""Whether the model's blocks can be compiled: what of a recipe is in the way, and what this machine lacks."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from tinygptv_ds.config.deepspeed_rules import COMPILED_ZERO_3


def compile_obstacle(zero_stage: int, frozen_bits: int | None) -> str | None:
    """Return why the blocks cannot be compiled on any machine; None where they can.

    Args:
        zero_stage: DeepSpeed's ZeRO stage.
        frozen_bits: `model.frozen_bits`.
    """
    if zero_stage == 3:
        return COMPILED_ZERO_3
    if frozen_bits is not None:
        return "bitsandbytes dequantizes the weights of model.frozen_bits in calls that cannot be compiled"
    return None


def missing_compiler(device: str) -> str | None:
    """Return what torch.compile lacks on this machine, with the remedy; None where it lacks nothing.

    Triton builds the launchers of its GPU kernels in C, and torch's CPU kernels are C++; both need Python's headers.

    Args:
        device: type of the device to compile for, "cuda" or "cpu".
    """
    if device == "cuda" and find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    language, variable, usual = ("C", "CC", ("gcc", "clang")) if device == "cuda" else ("C++", "CXX", ("g++",))
    names = (os.environ[variable].split()[0],) if os.environ.get(variable, "").strip() else usual
    if not any(map(shutil.which, names)):
        return f"there is no {language} compiler (install {' or '.join(names)}, or name one in {variable})"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if headers.is_file() else f"Python's headers are missing ({headers}; install python3-dev)"
