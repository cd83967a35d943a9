"""Losses of one recipe under every engine set-up that runs without a GPU.

The tests' tiny model trains on samples without, with one and with two images, so that ranks often have different kinds
of batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.distributed import free_port

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
DIVIDED = (
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"  # otherwise the tiny model would stay whole
)
IN_FP32 = "deepspeed.torch_autocast.enabled=false"


@dataclass(frozen=True)
class Setup:
    """A row of the table.

    Attributes:
        name: its name in the table.
        precision: "fp32" or "bf16"; rows are compared with the first row of their precision.
        ranks: number of processes.
        json_file: name of a file in ds_configs/, without its suffix.
        changes: changes to the recipe for `--set`.
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = mixed_recipe(Path(folder))
        losses = [_losses(setup, recipe, Path(folder) / str(number)) for number, setup in enumerate(SETUPS)]
    print("\n".join(table(losses)))
    if args.json:
        rows = [{**vars(setup), "losses": row} for setup, row in zip(SETUPS, losses, strict=True)]
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(losses: list[list[float]]) -> list[str]:
    """Return a Markdown table: losses, and their largest difference from the first of the precision and from fp32."""
    steps = " | ".join(f"step {step + 1}" for step in range(STEPS))
    lines = [f"| | ranks | set-up | {steps} | from its first | from fp32 |", f"|{'-|' * (STEPS + 5)}"]
    firsts: dict[str, list[float]] = {}
    for setup, row in zip(SETUPS, losses, strict=True):
        own, fp32 = firsts.setdefault(setup.precision, row), firsts["fp32"]
        cells = " | ".join(f"{loss:.6f}" for loss in row)
        lines.append(
            f"| {setup.precision} | {setup.ranks} | {setup.name} | {cells} | {_largest_difference(row, own):.1e} | "
            f"{_largest_difference(row, fp32):.1e} |"
        )
    return lines


def _largest_difference(row: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(row, other, strict=True))


def mixed_recipe(folder: Path) -> Path:
    """Write the tiny model's weights, shards of four kinds, and a recipe that trains on them; return its path."""
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
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> None:
    """Train under a set-up, started by DeepSpeed's launcher.

    Args:
        setup: the set-up.
        recipe: the recipe's YAML file.
        run_dir: the run directory.
        script: stage 4's script, or one that runs it.
        prefix: a command that starts the launcher.
        env: additional environment variables.
    """
    start = ["deepspeed", "--num_gpus", str(setup.ranks), "--master_port", str(free_port()), script]
    given = ["--recipe", str(recipe), "--run-dir", str(run_dir)]
    given += ["--deepspeed_config", f"ds_configs/{setup.json_file}.json"]
    changes = [part for change in setup.changes for part in ("--set", change)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    on_cpu = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*prefix, *start, *given, *changes]
    done = subprocess.run(command, cwd=ROOT, env=on_cpu | dict(env or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{setup.precision}, {setup.name}, {setup.ranks} rank(s) failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
