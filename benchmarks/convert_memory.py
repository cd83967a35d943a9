"""Peak memory and speed of loading, converting and exporting random weights of the published size.

Each operation runs in its own process; its peak is the largest resident set, with Python and the libraries included.
The limit for converting Phi-2 and for assembling the whole model is 1.3 times the size of the output.

    python benchmarks/convert_memory.py [--dir FOLDER] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.made_up import SIZES, make_weights
from tinygptv_ds.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.3
# VmHWM, because a child process inherits ru_maxrss from its parent.
MEASURE = """
import json, sys, time
sys.path.insert(0, {root!r})
began = time.perf_counter()
{code}
seconds = time.perf_counter() - began
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([1024 * peak, seconds]))
"""
BUILD = """
import torch
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.weights.assemble import build_model
recipe = load_recipe({recipe!r})
model = build_model(recipe.model, recipe.text, frozen_dtype=torch.bfloat16)
assert sum(p.numel() for p in model.parameters()) > 0
"""
VERB = "from tinygptv_ds.cli import main\nmain({argv!r})"


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        name: name of the operation.
        output: bytes of the result, in memory or on disk.
        peak: bytes of the largest resident set.
        seconds: wall-clock time.
    """

    name: str
    output: int
    peak: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Return the peak divided by the output."""
        return self.peak / self.output


def main(argv: Sequence[str] | None = None) -> None:
    """Make the weights, measure every operation, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="folder for the weights, 45 GB (default: a temporary folder)")
    parser.add_argument("--size", choices=list(SIZES), default="published", help="tiny: only to try the script")
    parser.add_argument("--only", default="", metavar="TEXT", help="only operations with TEXT in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rows = measure_all(Path(folder), args.size, args.only)
    if args.json:
        figures = {"machine": platform.platform(), "size": args.size, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_all(folder: Path, size: str, only: str = "") -> list[Row]:
    """Measure every operation with `only` in its name and print it; its output is removed before the next one."""
    print(f"making weights of the {size} size in {folder}", flush=True)
    made = make_weights(folder, size)
    recipe = ["--recipe", str(made.recipe)]
    nothing = measure("import torch, transformers, tinygptv_ds.weights.resolve")
    print(f"\n{'operation':46} {'output':>9} {'peak':>9} {'peak/output':>11} {'seconds':>8}")
    print(f"{'(only the libraries)':46} {'':>9} {nothing[0] / 1e9:>6.2f} GB", flush=True)
    phi, phi_bin, trained = str(made.phi), str(made.phi_bin), str(made.trained)
    verbs = {
        "convert Phi-2, split fp16 -> fused bf16": ["convert", phi, "--dtype", "bf16"],
        "convert Phi-2, split fp16 -> fused fp32": ["convert", phi, "--dtype", "fp32"],
        "convert Phi-2, remote code .bin -> split": ["convert", phi_bin, "--layout", "split"],
        "convert eva_vit_g.pth to 448 pixels": ["convert", str(made.eva_vit), "--image-size", str(made.larger)],
        "export hf, LoRA merged, bf16": ["export", trained, *recipe],
        "export hf, LoRA kept, fp32": ["export", trained, *recipe, "--keep-lora", "--dtype", "fp32"],
        "export phi, split bf16": ["export", trained, *recipe, "--to", "phi"],
        "export trained, fp32": ["export", trained, *recipe, "--to", "trained"],
    }
    rows = []
    for name, argv in verbs.items():
        if only not in name:
            continue
        out = folder / "out"
        peak, seconds = measure(VERB.format(argv=[*argv, "--out", str(out)]))
        rows.append(Row(name, size_on_disk(out), peak, seconds))
        show(rows[-1])
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    if only in (name := "build_model of stage 4, frozen bf16"):
        peak, seconds = measure(BUILD.format(recipe=str(made.recipe)))
        rows.append(Row(name, made.model_bytes, peak, seconds))
        show(rows[-1])
    return rows


def measure(code: str) -> tuple[int, float]:
    """Return peak bytes and seconds of Python code that runs in its own process."""
    script = MEASURE.format(root=str(ROOT), code=code)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{code}\nended with {done.returncode}:\n{done.stderr}")
    peak, seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return peak, seconds


def show(row: Row) -> None:
    """Print one line of the table."""
    print(
        f"{row.name:46} {row.output / 1e9:>6.2f} GB {row.peak / 1e9:>6.2f} GB {row.ratio:>11.2f} {row.seconds:>8.0f}",
        flush=True,
    )


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    began = time.perf_counter()
    run_command(main)
    print(f"{time.perf_counter() - began:.0f} s in all")
