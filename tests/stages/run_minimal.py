"""stages/minimal.py with other constants, from a JSON file; rank 0 writes the losses next to it."""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch

MINIMAL = Path(__file__).parents[2] / "stages/minimal.py"


def main(argv: Sequence[str]) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build that training does not need
    constants = Path(argv[0])
    spec = importlib.util.spec_from_file_location("minimal", MINIMAL)
    minimal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimal)
    for name, value in json.loads(constants.read_text()).items():
        assert hasattr(minimal, name), name
        setattr(minimal, name, value)
    minimal.FROZEN_DTYPE, minimal.OUT = torch.float32, constants.parent
    losses = minimal.main()
    if os.environ["RANK"] == "0":
        (constants.parent / "losses.json").write_text(json.dumps(losses))
