"""`tinygptv-ds features`: images through a frozen ViT and Q-Former once, for training from the outputs."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.config.load import add_recipe_arguments, load_recipe
from tinygptv_ds.config.quantization import check_bitsandbytes
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.background import background_of, reading_of
from tinygptv_ds.data.shards.cache import count_samples, open_cache
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.distributed import Ranks, barrier, cores_per_rank, process_group, ranks_from_env
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.features.format import (
    NOTES,
    FeatureNotes,
    differences,
    read_notes,
    source_of,
    tar_name,
    write_notes,
)
from tinygptv_ds.files import LockedError, lock_file
from tinygptv_ds.log import LOGGER, set_up_logging
from tinygptv_ds.weights.recipe_files import check_files

if TYPE_CHECKING:
    from tinygptv_ds.features.encode import Slot
    from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration


@dataclasses.dataclass(frozen=True)
class FeatureJob:
    """What one call of the command makes.

    Attributes:
        vision: ViT and Q-Former, on the device that computes.
        made_with: from `vision_fingerprint`.
        batch_size: samples that go through together.
        workers: processes that decode.
        ranks: who this process is; shards are dealt out by rank.
        data: the recipe's, for remote shards.
    """

    vision: TinyGPTVForConditionalGeneration
    made_with: dict[str, Any]
    batch_size: int
    workers: int
    ranks: Ranks
    data: DataSection

    @property
    def dtype(self) -> str:
        """What is computed in."""
        return self.made_with["dtype"]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.made_with["image_size"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.epilog = "On several GPUs: torchrun --nproc-per-node 8 -m tinygptv_ds features RECIPE --out DIR"
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets one folder for each dataset")
    parser.add_argument("--batch-size", type=int, default=32, help="samples at once (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="what the training will compute in; auto: bf16 on a GPU, fp32 without, as stages do by themselves",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write what is not there yet, and print what is there at the end."""
    if args.batch_size < 1 or args.workers < 0:
        raise ConfigError("--batch-size must be at least 1, and --workers not negative")
    recipe = load_recipe(args.recipe, args.set)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, features=None))
    check_files(recipe)
    if recipe.model.frozen_bits is not None and recipe.model.quantize_vision:
        check_bitsandbytes(recipe.model.frozen_bits)
    ranks = ranks_from_env()
    set_up_logging(ranks.rank)
    with process_group(ranks):
        work = _load_vision(recipe, args, ranks)
        for section in recipe.data.used:
            _make(section, args.out / section.name, work)
    if ranks.is_main:
        print(f"{args.out}: train from them with --set data.features={args.out}")


def _load_vision(recipe: Recipe, args: argparse.Namespace, ranks: Ranks) -> FeatureJob:
    import torch

    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.features.verify import vision_fingerprint
    from tinygptv_ds.models.fp8_linear import check_fp8_device
    from tinygptv_ds.weights.assemble import build_vision

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    if recipe.model.fp8 is not None:
        check_fp8_device(device)
    dtype = args.dtype if args.dtype != "auto" else "bf16" if on_gpu else "fp32"
    vision = build_vision(recipe.model, recipe.text, frozen_dtype=DTYPES[dtype])
    made_with = vision_fingerprint(vision, dtype)
    LOGGER.info("ViT and Q-Former on %s in %s, images of %d pixels", device, dtype, made_with["image_size"])
    workers = min(args.workers, cores_per_rank(ranks))
    vision.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method's parameters
    return FeatureJob(vision, made_with, args.batch_size, workers, ranks, recipe.data)


def _make(section: DatasetSection, folder: Path, work: FeatureJob) -> None:
    """Compute the features of one dataset. Finished shards of the same vision path and sources are kept."""
    sources = expand_shards(section.shards, allow_pipe=section.name in work.data.allow_pipe)
    counts = count_samples(sources, open_cache(work.data))
    tars = [folder / tar_name(number) for number in range(len(sources))]
    made_with = work.made_with | reading_of(section)
    notes = FeatureNotes(made_with, [source_of(*each) for each in zip(sources, counts, strict=True)], [])
    with _one_writer(folder, work.ranks):
        if work.ranks.is_main:
            _begin(folder, notes)
        barrier(work.ranks)
        mine = list(zip(sources, counts, tars, strict=True))[work.ranks.rank :: work.ranks.world_size]
        _encode(section, mine, work)
        barrier(work.ranks)
        if work.ranks.is_main:
            sizes = [tar.stat().st_size for tar in tars]
            write_notes(folder, dataclasses.replace(notes, shard_bytes=sizes))
            size = sum(sizes) / 1e9
            print(f"{section.name}: {sum(counts):,} samples in {len(tars)} shard(s), {size:.3g} GB", flush=True)


def _encode(section: DatasetSection, shards: list[tuple[Shard, int, Path]], work: FeatureJob) -> None:
    """Write the tars of this rank that are not there; each comes as (source, samples, tar)."""
    from tinygptv_ds.features.encode import ImageChunks, write_features

    left = [shard for shard in shards if not shard[2].is_file()]
    total, to_do = (sum(count for _, count, _ in part) for part in (shards, left))
    chunks = ImageChunks(
        [s for s, _, _ in left],
        [c for _, c, _ in left],
        work.batch_size,
        work.image_size,
        open_cache(work.data),
        background_of(section),
    )
    skipped: Counter[str] = Counter()
    hidden = None if work.ranks.is_main else True
    with tqdm(desc=section.name, total=total, initial=total - to_do, unit="sample", disable=hidden) as bar:

        def done(slots: list[Slot]) -> None:
            bar.update(len(slots))
            skipped.update(slot.skipped for slot in slots if slot.skipped is not None)

        write_features(work.vision, chunks, [t for _, _, t in left], dtype=work.dtype, workers=work.workers, done=done)
    for reason, count in sorted(skipped.items()):
        LOGGER.warning("%s: %d samples cannot be used (%s); training will leave them out", section.name, count, reason)


def _begin(folder: Path, notes: FeatureNotes) -> None:
    """See that what the folder holds is of the same work, and note what that is; a torn tar is made again.

    Raises:
        DataError: it holds features of another vision path or other shards.
    """
    if (folder / NOTES).exists() or any(folder.glob("*.tar")):
        there = read_notes(folder)
        differing = differences(there.made_with, notes.made_with)
        differing += [] if there.sources == notes.sources else ["the shards that they are made from"]
        if differing:
            raise DataError(
                f"{folder} holds features that differ in {', '.join(differing)}; remove it, or choose another --out"
            )
        for number, size in enumerate(there.shard_bytes):
            tar = folder / tar_name(number)
            if tar.is_file() and tar.stat().st_size != size:
                LOGGER.warning("%s is incomplete and is computed again", tar)
                tar.unlink()
    write_notes(folder, notes)


@contextmanager
def _one_writer(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder on rank 0 for this call of the command."""
    if not ranks.is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".writing"
    try:
        lock = lock_file(path)
    except (LockedError, OSError) as error:
        raise DataError(f"{folder}: another process is writing features into it; let it finish") from error
    with lock:
        yield
        path.unlink()
