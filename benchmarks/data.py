"""Samples per second and core from shards to training batches, by several methods.

    python benchmarks/data.py [--seconds S] [--rounds N] [--quick] [--json FILE]

The methods take turns, round by round, in one process on one core; each figure is the best of its rounds, in CPU time.
Dataloader workers are measured afterwards in wall-clock time, which needs an idle machine.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torchvision import transforms
from transformers import PreTrainedTokenizerFast

from benchmarks.photos import write_photos
from tinygptv_ds.cli import run_command
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.shards.index import build_index, sample_count
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.writer import add_sample, open_tar
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.features.format import FeatureNotes, FeatureShape, source_of, tar_name, write_notes
from tinygptv_ds.processing.image import IMAGE_MEAN, IMAGE_STD, to_pixels
from tinygptv_ds.processing.sequence import ImageTokens

SOURCES = ((640, 480), (224, 224))
TARGETS = (224, 448)
BATCH = 16
NAME = "photos"  # name of the dataset
SHAPE = FeatureShape("bf16", 32, 768)  # output of the published Q-Former
ORIGINAL, WEBDATASET, DECODE = "original's transform", "webdataset, the same transform", "JPEG decode alone"
PIXELS, EXACT, FAST = "exact, from memory to pixels", "exact, from shards to batches", "fast, from shards to batches"
FEATURES = "features, from shards to batches"

# An endless stream that processes samples; each item is the number of samples that it processed.
SampleStream = Iterator[int]


@dataclass(frozen=True)
class Row:
    """One method at one pair of sizes.

    Attributes:
        way: name of the method.
        source: width and height of the JPEGs.
        target: side of the result in pixels.
        workers: dataloader workers; 0: all in one process.
        rate: samples per second in the best round.
        rounds: samples per second in every round.
    """

    way: str
    source: tuple[int, int]
    target: int
    workers: int
    rate: float
    rounds: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    """Make the shards, measure every method, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of each method in each round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a moment of each, only to try the script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    seconds, rounds, images = (0.01, 1, 4) if args.quick else (args.seconds, args.rounds, 64)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for source, target in itertools.product(SOURCES, TARGETS):
            shards = Path(folder, "x".join(map(str, source)))
            if not shards.exists():
                write_photos(shards, source, images)
            rows += show(measure_one_core(shards, source, target, seconds, rounds))
        for workers in (1, 2):
            rows.append(measure_workers(Path(folder, "640x480"), workers, seconds, rounds))
            print(
                f"{EXACT}, 640 x 480 -> 224, {workers} dataloader worker(s): {rows[-1].rate:.0f} samples/s", flush=True
            )
    if args.json:
        figures = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_one_core(shards: Path, source: tuple[int, int], target: int, seconds: float, rounds: int) -> list[Row]:
    """Measure every method in this process, in turns."""
    torch.set_num_threads(1)
    encoded = read_images(shards)
    ways = {
        ORIGINAL: original(encoded, target),
        WEBDATASET: plain_webdataset(shards, target),
        PIXELS: each(encoded, lambda jpeg: to_pixels(jpeg, target)),
        EXACT: loader(shards, target, "exact"),
        FAST: loader(shards, target, "fast"),
        FEATURES: loader(shards, target, "exact", features=random_features(shards)),
        DECODE: each(encoded, simplejpeg.decode_jpeg),
    }
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for stream in ways.values():
        next(stream)
    for _ in range(rounds):
        for way, stream in ways.items():
            rates[way].append(rate(stream, seconds, time.process_time))
    os.sched_setaffinity(0, cores)
    return [Row(way, source, target, 0, max(r), r) for way, r in rates.items()]


def measure_workers(shards: Path, workers: int, seconds: float, rounds: int) -> Row:
    """Measure the loader with dataloader workers at 224 pixels; they start before the clock does."""
    stream = loader(shards, 224, "exact", workers)
    for _ in range(8 * workers):  # skip what the workers loaded before the clock starts
        next(stream)
    rates = [rate(stream, seconds, time.perf_counter) for _ in range(rounds)]
    return Row(EXACT, (640, 480), 224, workers, max(rates), rates)


def rate(stream: SampleStream, seconds: float, clock: Callable[[], float]) -> float:
    """Return samples per second of the clock, over at least `seconds`."""
    began, done = clock(), 0
    while (spent := clock() - began) < seconds:
        done += next(stream)
    return done / spent


def each(encoded: Sequence[bytes], function: Callable[[bytes], object]) -> SampleStream:
    """Yield endlessly, after each call of a function on the next encoded image."""
    for jpeg in itertools.cycle(encoded):
        function(jpeg)
        yield 1


def original_transform(target: int) -> Callable[[Image.Image], torch.Tensor]:
    """Return the original's transform: bicubic resize to a square, conversion to floats, normalization."""
    return transforms.Compose(
        [
            transforms.Resize((target, target), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(IMAGE_MEAN, IMAGE_STD),
        ]
    )


def original(encoded: Sequence[bytes], target: int) -> SampleStream:
    """Decode with Pillow and transform, from memory: without reading, text and batches."""
    transform = original_transform(target)
    return each(encoded, lambda jpeg: transform(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def plain_webdataset(shards: Path, target: int) -> SampleStream:
    """Run a usual pipeline: images and captions from the tars, the transform, batches."""
    tars = [str(tar) for tar in sorted(shards.glob("*.tar"))]
    pipeline = webdataset.WebDataset(tars, shardshuffle=False).decode("pilrgb").to_tuple("jpg", "json")
    pipeline = pipeline.map_tuple(original_transform(target)).repeat().batched(BATCH)
    for images, _ in pipeline:
        yield len(images)


def random_features(shards: Path) -> Path:
    """Write random features of the published size for the images of `shards`, as the verb `features` does."""
    root = shards.with_name(f"{shards.name}-features")
    folder = root / NAME
    if folder.exists():
        return root
    folder.mkdir(parents=True)
    sources, reader, rng = sorted(shards.glob("*.tar")), ShardReader(), np.random.default_rng(0)
    for number, source in enumerate(sources):
        with (folder / tar_name(number)).open("wb") as file, open_tar(file) as writer:
            for index in range(sample_count(source)):
                key, record, _ = reader.stored(source, index)
                assert record is not None  # written by this benchmark
                add_sample(writer, key, {"json": record, "bf16": rng.bytes(SHAPE.nbytes)})
        build_index(folder / tar_name(number))
    made_with = {"dtype": SHAPE.dtype, "queries": SHAPE.queries, "width": SHAPE.width}
    sizes = [(folder / tar_name(number)).stat().st_size for number in range(len(sources))]
    write_notes(folder, FeatureNotes(made_with, [source_of(s, sample_count(s)) for s in sources], sizes))
    return root


def loader(shards: Path, target: int, decoding: str, workers: int = 0, features: Path | None = None) -> SampleStream:
    """Run the training loader as stage 1 does: order, reading, tokens, pixels or features, packed batches."""
    data = {"datasets": [{"name": NAME, "shards": str(shards)}], "decoding": decoding}
    raw = {
        "stage": 1,
        "model": {"phi": "none", "eva_vit": "none", "qformer": "none", "image_size": target},
        "data": data | ({"features": str(features)} if features else {}),
        "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
        "train": {"batch_size": BATCH, "micro_batch_size": BATCH},
    }
    recipe = build_recipe(raw, "benchmark")
    tokens = Tokens(small_tokenizer(), recipe.text, ImageTokens(51199, 32), target, recipe.data.decoding)
    dataset = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)
    for loaded in load_steps(dataset, first=0, last=1_000_000, num_workers=workers, pin_memory=False):
        yield len(loaded[0].batch.sample_ids)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer like Phi's, with a small vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["a photo of the old temple", "people in front of the water"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.add_special_tokens(dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))
    return tokenizer


def read_images(shards: Path) -> list[bytes]:
    """Return the JPEGs of all samples."""
    tars = sorted(shards.glob("*.tar"))
    return [ShardReader().read(tar, index).images[0] for tar in tars for index in range(sample_count(tar))]


def show(rows: list[Row]) -> list[Row]:
    """Print rows as one table, and return them."""
    rates = {row.way: row.rate for row in rows}
    width, height = rows[0].source
    print(f"\n{f'{width} x {height} -> {rows[0].target}':32} {'samples/s':>9} {'x original':>10} {'% of decode':>11}")
    for row in rows:
        print(f"{row.way:32} {row.rate:9.0f} {row.rate / rates[ORIGINAL]:10.2f} {100 * row.rate / rates[DECODE]:11.0f}")
    print(flush=True)
    return rows


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in cpu if line.startswith("model name")), "unknown")
    packages = ("torch", "torchvision", "pillow", "simplejpeg", "numba", "webdataset")
    return {
        "platform": platform.platform(),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    run_command(main)
