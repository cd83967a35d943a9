"""What rounding frozen weights and their inputs to fp8 changes, simulated on a CPU with the quick start's model.

Trains stage 4 of the quick start in 16 bit and with `model.fp8: vision` and `all`, on the same samples from the same
weights, and prints the mean losses of ten steps each; then the cosines of image features with those of 16 bit.

    bash launch/quickstart.sh                     # once, for the weights
    python benchmarks/fp8.py [--steps 60] [--images 128]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.weights.assemble import build_vision, model_config

CHOICES = ("null", "vision", "all")
_TOGETHER = 10  # steps whose losses are averaged


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("stages/tiny/stage4.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes to the recipe")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: %(default)s)")
    parser.add_argument("--images", type=int, default=128, help="images of the cosine (default: %(default)s)")
    args = parser.parse_args(argv)
    losses = {choice: train(args.recipe, args.set, choice, args.steps) for choice in CHOICES}
    print("\n".join(table(losses)))
    recipe = load_recipe(args.recipe, [*args.set, "model.fp8=vision"])
    found = cosines(recipe, args.images)
    print(f"\ncosine of {len(found)} images' features with 16 bit: mean {found.mean():.4f}, lowest {found.min():.4f}")


def train(recipe: Path, changes: Sequence[str], choice: str, steps: int) -> list[float]:
    """Return the loss of each step of a run on one rank in bf16."""
    settings = [
        *changes,
        f"model.fp8={choice}",
        f"train.steps_per_epoch={steps}",
        "train.epochs=1",
        "train.log_every=1",
    ]
    settings.append("train.validate_every=0")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tinygptv_ds", "train", "stage4", "--recipe", str(recipe), "--num-gpus", "1"]
        command += ["--deepspeed-config", "ds_configs/zero2_bf16.json", "--run-dir", folder]
        subprocess.run(
            [*command, *(part for each in settings for part in ("--set", each))], check=True, stdout=sys.stderr
        )
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [line["train/loss"] for line in lines if "train/loss" in line]


def table(losses: dict[str, list[float]]) -> Iterator[str]:
    """Yield a Markdown table of mean losses, and how far single steps are from those of 16 bit."""
    starts = range(0, len(losses["null"]), _TOGETHER)
    yield "| `model.fp8` | " + " | ".join(f"{start + 1} to {start + _TOGETHER}" for start in starts) + " | largest |"
    yield f"|{'-|' * (len(starts) + 2)}"
    for choice, found in losses.items():
        cells = " | ".join(f"{mean(found[start : start + _TOGETHER]):.4f}" for start in starts)
        largest = max(abs(one - other) for one, other in zip(found, losses["null"], strict=True))
        yield f"| `{choice}` | {cells} | {largest:.4f} |"


@torch.no_grad()
def cosines(recipe: Recipe, images: int) -> Tensor:
    """Return the mean cosine of each image's features with those of 16-bit weights, `[images]`."""
    tokens = open_tokens(recipe, model_config(recipe.model, recipe.text))
    batches = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)
    pixels = torch.cat(list(_pixels(batches, images)))[:images]
    found = [
        build_vision(section, recipe.text, frozen_dtype=torch.bfloat16).eval().encode_vision(pixels).float()
        for section in (replace(recipe.model, fp8=None), recipe.model)
    ]
    return cosine_similarity(found[0], found[1], dim=-1).mean(dim=-1)


def _pixels(batches: MicroBatches, images: int) -> Iterator[Tensor]:
    """Yield the images of one step after another, until there are enough."""
    seen = step = 0
    while seen < images:
        pixels = batches[step, 0].batch.pixel_values
        seen, step = seen + len(pixels), step + 1
        yield pixels


if __name__ == "__main__":
    main()
