"""One recipe under every engine set-up that runs without a GPU: the losses of each, side by side.

The tiny model of the tests, with images, text alone and two images mixed, so that ranks often have unlike batches.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
DIVIDED = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"  # else a tiny model stays whole
IN_FP32 = "deepspeed.torch_autocast.enabled=false"


@dataclass(frozen=True)
class Setup:
    """A row of the table.

    Attributes:
        name: what it is called there.
        precision: "fp32" or "bf16"; rows of one precision are compared with the first of it.
        ranks: processes.
        json_file: of ds_configs/.
        changes: for `--set`.
    """

    name: str
    precision: str
    ranks: int
    json_file: str
    changes: tuple[str, ...] = ()


def _stage(number: int) -> str:
    return f"deepspeed.zero_optimization.stage={number}"


SETUPS = (
    Setup("ZeRO-2", "fp32", 1, "cpu"),
    Setup("ZeRO-1", "fp32", 2, "cpu", (_stage(1),)),
    Setup("ZeRO-2", "fp32", 2, "cpu"),
    Setup("ZeRO-3", "fp32", 2, "cpu", (_stage(3), DIVIDED)),
    Setup("ZeRO-3, CPU offload", "fp32", 2, "zero3_offload", (DIVIDED, IN_FP32)),
    Setup("ZeRO-2", "bf16", 1, "zero2_bf16"),
    Setup("ZeRO-1", "bf16", 2, "zero1_bf16"),
    Setup("ZeRO-2", "bf16", 2, "zero2_bf16"),
    Setup("ZeRO-3", "bf16", 2, "zero3_bf16", (DIVIDED,)),
    Setup("ZeRO-3, CPU offload", "bf16", 2, "zero3_offload", (DIVIDED,)),
    Setup("ZeRO-3, all in bf16", "bf16", 2, "cpu", (_stage(3), DIVIDED, "deepspeed.bf16.enabled=true")),
)


def main() -> None:
    """Run every set-up and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = mixed_recipe(Path(folder))
        losses = [_losses(setup, recipe, Path(folder) / str(number)) for number, setup in enumerate(SETUPS)]
    print("\n".join(table(losses)))
    if args.json:
        rows = [{**vars(setup), "losses": row} for setup, row in zip(SETUPS, losses, strict=True)]
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(losses: list[list[float]]) -> list[str]:
    """Markdown: a row for each set-up, with the largest difference from the first of its precision and from fp32."""
    steps = " | ".join(f"step {step + 1}" for step in range(STEPS))
    lines = [f"| | ranks | set-up | {steps} | from its first | from fp32 |", f"|{'-|' * (STEPS + 5)}"]
    firsts: dict[str, list[float]] = {}
    for setup, row in zip(SETUPS, losses, strict=True):
        own, fp32 = firsts.setdefault(setup.precision, row), firsts["fp32"]
        cells = " | ".join(f"{loss:.6f}" for loss in row)
        lines.append(
            f"| {setup.precision} | {setup.ranks} | {setup.name} | {cells} | {_apart(row, own):.1e} | "
            f"{_apart(row, fp32):.1e} |"
        )
    return lines


def _apart(row: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(row, other, strict=True))


def mixed_recipe(folder: Path) -> Path:
    """Write the tiny model's weights, shards of four kinds, and the recipe that trains on them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import tiny

    weights = tiny.save_weights(folder / "weights")
    shards = {
        kind: tiny.write_shards(folder / kind, tiny.samples(kind, 12)) for kind in ("vqa", "text", "chat", "pair")
    }
    raw = tiny.recipe(weights, shards, train__steps_per_epoch=STEPS, train__sample_count=0)
    raw["data"]["datasets"][1]["weight"] = 5
    return tiny.write_recipe(folder / "recipe.yaml", raw)


def _losses(setup: Setup, recipe: Path, run_dir: Path) -> list[float]:
    run(setup, recipe, run_dir)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def run(
    setup: Setup,
    recipe: Path,
    run_dir: Path,
    *,
    script: str = "stages/stage4.py",
    before: Sequence[str] = (),
    told: Mapping[str, str] | None = None,
) -> None:
    """Train under a set-up, started by DeepSpeed's launcher.

    Args:
        setup: which.
        recipe: its YAML.
        run_dir: the run directory.
        script: stage 4's, or one that runs it.
        before: a command that the launcher is started by.
        told: further environment variables.
    """
    start = ["deepspeed", "--num_gpus", str(setup.ranks), "--master_port", str(_free_port()), script]
    given = ["--recipe", str(recipe), "--run-dir", str(run_dir)]
    given += ["--deepspeed_config", f"ds_configs/{setup.json_file}.json"]
    changes = [part for change in setup.changes for part in ("--set", change)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*before, *start, *given, *changes]
    done = subprocess.run(command, cwd=ROOT, env=env | dict(told or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{setup.precision}, {setup.name}, {setup.ranks} rank(s) failed:\n{done.stdout}{done.stderr}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
