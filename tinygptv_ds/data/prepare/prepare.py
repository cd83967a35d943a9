"""The command ``prepare``: make shards of a dataset's own files; unusable entries are counted and listed."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinygptv_ds.data.prepare.held_out import HELD_OUT, TRAIN, Split, parse_amount, split_by_image
from tinygptv_ds.data.prepare.prepare_report import PrepareReport, file_state
from tinygptv_ds.data.prepare.shard_task import Chunk, make_shard
from tinygptv_ds.data.prepare.stored_images import Encoding
from tinygptv_ds.data.prepare.workspace import finish, finished, workspace
from tinygptv_ds.data.process_pool import WorkerPool, run_tasks
from tinygptv_ds.data.sets import DATASETS, OTHER_LAYOUTS, full_name, how_to_get
from tinygptv_ds.data.sets.caption_folder import folder_state
from tinygptv_ds.data.sets.common import Entry, PreparedSample
from tinygptv_ds.data.sets.own_entries import parse_columns
from tinygptv_ds.errors import DataError
from tinygptv_ds.processes import usable_cores

SAMPLES_PER_SHARD = 10_000
DIGITS_TRAIN, DIGITS_TEST = 2_000, 500  # samples of each embedded dataset
AS_THEY_ARE = Encoding()
_WORTH_A_PROCESS = 2_000  # samples of the embedded datasets, which take no less time than starting a process
_SHOWN = 300  # characters of the reason why an entry was skipped
_HELD_BYTES = 1 << 27  # of images in one chunk of entries, where the entries hold them (parquet, base64)
REMEDY = "use fewer --workers. Finished shards are kept, the same command resumes from them"


def prepare(
    name: str,
    root: Path,
    out: Path,
    *,
    annotations: Path | None = None,
    image_root: Path | None = None,
    columns: dict[str, str] | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    limit: int | None = None,
    encoding: Encoding = AS_THEY_ARE,
    workers: int = 1,
) -> PrepareReport:
    """Write dataset `name` from the files below `root` as shards into `out`; only the first `limit` entries if given.

    `annotations` and `image_root` are where a user's own files are, if not in `root`; `columns` renames their keys
    (`parse_columns`); their images are stored upright on white unless `encoding` says otherwise. The shards do not
    depend on the number of `workers`.

    Raises DataError if files are missing, nothing could be used, or `out` holds something else.
    """
    source = _Source.of(name, root, annotations, image_root, columns, limit)
    return write_samples(
        source.samples,
        out,
        samples_per_shard=samples_per_shard,
        total=limit,
        settings=source.settings,
        encoding=_own_background(name, encoding),
        workers=workers,
    )


def prepare_split(
    name: str,
    root: Path,
    out: Path,
    held_out: float | int,
    *,
    annotations: Path | None = None,
    image_root: Path | None = None,
    columns: dict[str, str] | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    limit: int | None = None,
    encoding: Encoding = AS_THEY_ARE,
    workers: int = 1,
) -> dict[str, PrepareReport]:
    """Write dataset `name` as `prepare` does, in two parts that share no image: ``out/train`` and ``out/held_out``.

    `held_out` is a share of the samples (below 1) or a number of them; see `split_by_image`. The reports are named
    ``train`` and ``held_out``; entries that give no sample are counted by the former. Raises DataError as `prepare`,
    and if there is too little to split.
    """
    if any((out / file).exists() for file in ("report.json", ".preparing")):
        raise DataError(f"{out}: holds shards made without --held-out; remove it or choose another folder")
    source = _Source.of(name, root, annotations, image_root, columns, limit)
    split = cache(lambda: split_by_image(source.samples, image_root or root, held_out))  # only if it is needed
    return {
        side: write_samples(
            _Lazy(partial(_side, split, source.samples, side)),
            out / side,
            samples_per_shard=samples_per_shard,
            total=None,
            settings={**source.settings, "held_out": held_out, "side": side},
            encoding=_own_background(name, encoding),
            workers=workers,
        )
        for side in (TRAIN, HELD_OUT)
    }


def _own_background(name: str, encoding: Encoding) -> Encoding:
    """Return `encoding` with a white background for a user's own data; published datasets stay as in the original."""
    if encoding.background is None and DATASETS[full_name(name)].any_keys:
        return replace(encoding, background="white")
    return encoding


def _side(split: Callable[[], Split], samples: Iterable[Entry], side: str) -> Iterator[Entry]:
    return split().choose(samples, side)


def prepare_digits(
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    limit: int | None = None,
    seed: int = 0,
    encoding: Encoding = AS_THEY_ARE,
    workers: int = 1,
) -> dict[str, PrepareReport]:
    """Write the shards of the embedded datasets, ``out/<dataset>/<split>/00000.tar``. `limit` is per dataset.

    Each of these folders is made by one process; with several `workers`, several of them at a time.
    """
    from tinygptv_ds.data.sets.digits import DIGIT_SETS

    sizes = {"train": DIGITS_TRAIN, "test": DIGITS_TEST}
    if limit is not None:
        sizes = {split: min(size, limit) for split, size in sizes.items()}
    parts = [(name, split, size) for name in DIGIT_SETS for split, size in sizes.items()]
    make = partial(_digits_part, out, samples_per_shard=samples_per_shard, seed=seed, encoding=encoding)
    processes = min(workers, sum(size for _, _, size in parts) // _WORTH_A_PROCESS)
    if processes < 2:
        reports = [make(part, workers=workers) for part in parts]
    else:
        with WorkerPool(processes, remedy=REMEDY) as pool:
            made = pool.map(partial(make, progress=False), parts)
            reports = list(tqdm(made, desc=out.name, total=len(parts), unit="dataset", disable=None))
    return {f"{name}/{split}": report for (name, split, _), report in zip(parts, reports, strict=True)}


def _digits_part(
    out: Path,
    part: tuple[str, str, int],
    *,
    samples_per_shard: int,
    seed: int,
    encoding: Encoding,
    workers: int = 1,
    progress: bool = True,
) -> PrepareReport:
    """Write one of the folders of `prepare_digits`."""
    from tinygptv_ds.data.sets.digits import samples

    name, split, size = part
    return write_samples(
        samples(name, split, size, seed),
        out / name / split,
        samples_per_shard=samples_per_shard,
        total=size,
        settings={"dataset": name, "split": split, "size": size, "seed": seed},
        encoding=encoding,
        workers=workers,
        progress=progress,
    )


def write_samples(
    samples: Iterable[Entry],
    out: Path,
    *,
    samples_per_shard: int,
    total: int | None,
    settings: dict[str, Any],
    encoding: Encoding = AS_THEY_ARE,
    workers: int = 1,
    progress: bool = True,
) -> PrepareReport:
    """Write `samples` as shards with indexes and report.json; `total` is for the progress bar alone, which asks the
    samples too (`operator.length_hint`) and is left out where `progress` is False.

    Shard n holds what can be used of the n-th `samples_per_shard` entries, or of as many as hold 128 MiB of images
    themselves; where that is nothing, there is no shard n.
    A finished `out` with the same `settings` is reused without touching `samples`, an unfinished one is completed; the
    settings need not name the shards' size and the encoding. Raises DataError as `prepare`.
    """
    for option, value in (("samples-per-shard", samples_per_shard), ("workers", workers), ("limit", total)):
        if value is not None and value < 1:
            raise DataError(f"--{option} must be at least 1, not {value}")
    changed = {option: value for option, value in asdict(encoding).items() if value is not None}
    settings = {**settings, "samples_per_shard": samples_per_shard, **changed}
    settings = json.loads(json.dumps(settings))  # as it will be read back
    try:
        done = finished(out, settings)
        if done is not None:
            return done
        hidden = None if progress else True  # None: shown on a terminal
        with workspace(out, settings), tqdm(desc=out.name, total=total, unit="sample", disable=hidden) as bar:
            parts: list[Path] = []
            chunks = _unmade(samples, samples_per_shard, out, encoding, parts, bar)
            run_tasks(make_shard, chunks, workers, bar.update, remedy=REMEDY)
            return finish(out, settings, parts)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from error


def _unmade(
    samples: Iterable[Entry], size: int, out: Path, encoding: Encoding, parts: list[Path], bar: tqdm
) -> Iterator[Chunk]:
    """Yield the chunks of `size` entries that are not made yet; the parts of all chunks are appended to `parts`."""
    source, cut = iter(samples), 0
    while entries := tuple(_next_entries(source, size)):
        chunk = Chunk(len(parts), entries, out, encoding)
        parts.append(chunk.part)
        cut += len(entries)
        left = length_hint(source, -1)
        if left >= 0:
            bar.total = cut + left
        if not chunk.is_made():
            yield chunk
        elif not bar.disable:
            bar.n, bar.initial, bar.last_print_n = (n + len(entries) for n in (bar.n, bar.initial, bar.last_print_n))
    bar.total = cut


def _next_entries(source: Iterator[Entry], size: int) -> Iterator[Entry]:
    """Yield the next `size` entries, fewer if they hold so many bytes of images themselves that memory matters."""
    held = 0
    for entry in islice(source, size):
        yield entry
        if isinstance(entry, PreparedSample):
            held += sum(len(image) for image in entry.images if isinstance(image, bytes))
        if held >= _HELD_BYTES:
            return


def _sources(name: str, root: Path, annotations: Path | None = None, image_root: Path | None = None) -> list[Path]:
    """Return the annotation files, on whose state the shards depend. Raises DataError if anything is missing."""
    absent = next((path for path in (root, image_root) if path is not None and not path.is_dir()), None)
    if absent is not None:
        raise DataError(f"{absent}: is not a folder\n{how_to_get(name)}")
    if annotations is not None:
        if not annotations.is_file():
            raise DataError(f"{annotations}: no such file")
        return [annotations]
    present = {file: sorted(root.glob(file)) for file in (*DATASETS[name].files, *DATASETS[name].optional)}
    for file, others in OTHER_LAYOUTS.items():
        if present.get(file) == []:
            present[file] = next(filter(None, (sorted(root.glob(other)) for other in others)), [])
    missing = [file for file in DATASETS[name].files if not present[file]]
    if missing:
        raise DataError(f"{root}: not found: {', '.join(missing)}\n{how_to_get(name)}")
    return [path for found in present.values() for path in found if path.is_file()]


@dataclass(frozen=True)
class _Lazy:
    """Samples whose annotation files are read on iteration: not at all if the shards are already made."""

    read: Callable[[], Iterator[Entry]]
    limit: int | None = None

    def __iter__(self) -> Iterator[Entry]:
        return self.read() if self.limit is None else islice(self.read(), self.limit)


@dataclass(frozen=True)
class _Source:
    """A dataset's samples, and the settings on which its shards depend."""

    samples: _Lazy
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        name: str,
        root: Path,
        annotations: Path | None,
        image_root: Path | None,
        columns: dict[str, str] | None,
        limit: int | None,
    ) -> "_Source":
        """Check that the files of dataset `name` are there. Raises DataError with where to get them."""
        name = full_name(name)
        entry = DATASETS[name]
        if entry.samples is None:
            raise DataError(how_to_get(name))
        given = {"annotations": annotations, "image_root": image_root}
        places = {option: path for option, path in given.items() if path is not None}
        if places and not entry.own:
            option = next(iter(places)).replace("_", "-")
            raise DataError(f"{name} takes no --{option}, its files are below --root\n{how_to_get(name)}")
        if columns and not entry.any_keys:
            raise DataError(f"{name} takes no --columns, its keys are fixed")
        settings = {
            "dataset": name,
            "root": str(root.resolve()),
            **{option: str(path.resolve()) for option, path in places.items()},
            **({"columns": columns} if columns else {}),
            "limit": limit,
            "sources": {str(path): file_state(path) for path in _sources(name, root, **places)},
        }
        if entry.whole_folder and annotations is None:
            settings["files"] = folder_state(image_root or root)
        renamed = {"columns": columns} if columns else {}
        return cls(_Lazy(partial(entry.samples, root, **places, **renamed), limit), settings)


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prepare``."""
    parser.add_argument(
        "name",
        metavar="NAME",
        help="'digits' (embedded), a published dataset, or your own as llava, jsonl or caption-folder",
    )
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="folder with the dataset's own files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="your own JSON, JSON lines or table, if not in --root",
    )
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="the folder of your own images, if not --root")
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="read the key or column THEIRS of your own data as OURS (image, question, answer, caption, conversations, "
        "...), or ignore it where OURS is empty; several separated by commas",
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first entries")
    parser.add_argument(
        "--held-out",
        metavar="AMOUNT",
        help="hold out this share of the samples (0.1) or this many (500), by image: shards in OUT/train, OUT/held_out",
    )
    parser.add_argument(
        "--max-side", type=int, metavar="PIXELS", help="scale larger images down to this; others stay as they are"
    )
    parser.add_argument(
        "--jpeg-quality", type=int, metavar="Q", help="store every image as JPEG of this quality, 1 to 100"
    )
    parser.add_argument(
        "--background",
        metavar="COLOR",
        help="lay transparent images on this color and turn images upright; default: white for your own data, 'none' "
        "(drop alpha, ignore EXIF) for published datasets, as in the original",
    )
    cores = usable_cores()
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> None:
    """Run ``prepare`` and print one line for each dataset."""
    options = {
        "samples_per_shard": args.samples_per_shard,
        "limit": args.limit,
        "encoding": Encoding(args.max_side, args.jpeg_quality, args.background),
        "workers": args.workers,
    }
    places = {"annotations": args.annotations, "image_root": args.image_root}
    columns = parse_columns(args.columns)
    if args.name == "digits":
        if args.held_out is not None or args.columns:
            raise DataError("digits takes no --held-out and no --columns: it is made with test parts of its own")
        reports = prepare_digits(args.out, **options)
    elif args.held_out is not None:
        amount = parse_amount(args.held_out)
        parts = prepare_split(args.name, args.root, args.out, amount, **places, columns=columns, **options)
        reports = {f"{args.name}/{side}": parts[side] for side in (TRAIN, HELD_OUT)}
    else:
        reports = {args.name: prepare(args.name, args.root, args.out, **places, columns=columns, **options)}
    for name, report in reports.items():
        print(f"{name}: {report}" + (" (was already there)" if report.reused else ""))
        if report.skipped:
            for reason in sorted(report.skipped):
                example = next((entry for entry in report.skipped_entries if entry["reason"] == reason), None)
                if example is not None:
                    print(f"  {reason}, e.g. {example['detail'][:_SHOWN]}")
            print("  report.json next to the shards lists the skipped entries")
    if args.held_out is not None:
        print(f"no image is in both parts; train on {args.out / TRAIN}, evaluate on {args.out / HELD_OUT}")
