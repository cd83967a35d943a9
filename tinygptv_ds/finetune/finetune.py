"""The verb `finetune`: from a user's own data and a model's weights to a fine-tuned model and its score.

Every part is another verb, printed as a command that can be pasted; this package decides in which order they run and
with which options. `OUT` is the exported model, `OUT.finetune` holds the rest: shards, recipe, run, scores, journal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.files import fingerprint_differences, write_atomically
from tinygptv_ds.finetune.inputs import require_new_or_ours, source_of, state_of
from tinygptv_ds.finetune.phases import Progress
from tinygptv_ds.finetune.report import print_end, print_plan

LEAST_SAMPLES = 10
_WIDE = 1024  # a Phi from this width on is too much for a CPU, in practice
_SHARE, _MANY, _MANY_ENTRIES = "0.1", "500", 5_000  # held out: a tenth, or 500 of more than 5,000 entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `finetune`."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="annotations as JSON, JSON lines, a table or parquet, or a folder of images with captions, or of shards",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images (default: that of --data)")
    parser.add_argument(
        "--from",
        dest="weights",
        type=Path,
        required=True,
        metavar="WEIGHTS",
        help="what to fine-tune: a released .pth, a run directory, a checkpoint, an adapter, or an exported folder",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the folder of Phi-2, eva_vit_g.pth and BLIP-2's file, for weights that need them (default: where the "
        "weights say, then weights/, then next to the weights)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the fine-tuned model")
    parser.add_argument(
        "--format", metavar="NAME", help="how `prepare` reads the data, as its first argument (default: recognized)"
    )
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="read the key or column THEIRS of the data as OURS, as `prepare --columns`",
    )
    parser.add_argument(
        "--held-out",
        metavar="AMOUNT",
        help="share (0.1) or number of the samples that are kept for validation and scores (default: 0.1, or 500 of "
        "more than 5,000)",
    )
    parser.add_argument("--num-gpus", type=int, metavar="N", help="use so many GPUs (default: all that there are)")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="the recipe that trained the weights, if they do not show their stage",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe that is written, e.g. --set train.epochs=3; none is needed",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare the data, write the recipe, print the cost and what would run, and stop",
    )


def run(args: argparse.Namespace) -> None:
    """Carry out `finetune`.

    Raises:
        TinyGPTVError: an input is wrong or has changed, or a verb failed, whose own message is above.
        Stopped: a signal ended it; the same command continues.
    """
    work = args.out.with_name(f"{args.out.name}.finetune")
    require_new_or_ours(args.out, work)
    source = source_of(args.data, args.images, args.format, args.columns)
    if source.entries is not None and source.entries < LEAST_SAMPLES:
        raise DataError(f"--data {args.data}: {_too_few(source.entries)}")
    held_out = args.held_out or (_MANY if (source.entries or 0) > _MANY_ENTRIES else _SHARE)
    inputs = _inputs(args, held_out)
    _check_unchanged(work, args.out, inputs)

    from tinygptv_ds.finetune.devices import find_devices  # torch is imported from here on
    from tinygptv_ds.finetune.job import Job
    from tinygptv_ds.finetune.start import open_start

    devices = find_devices(args.num_gpus)
    start = open_start(args.weights, args.base, args.recipe)
    progress = Progress(work)
    try:
        write_atomically(work / "inputs.json", json.dumps(inputs, indent=1).encode())
        job = Job(args.out, work, source, held_out, start, devices, tuple(args.set))
        print(f"from  {start.path}: {start.what}\non    {devices}\nwork  {work}", flush=True)
        if devices.gib is None and start.width >= _WIDE:
            print("note: no GPU is seen; on a CPU, the published size takes minutes a step and some 20 GB of memory")
        for phase in job.data_phases():
            progress.run(phase)
        data = job.data()
        if data.samples + data.held_out_samples < LEAST_SAMPLES:
            raise DataError(f"{work}/data: {_too_few(data.samples + data.held_out_samples)}")
        written = job.write_recipe(data, progress)
        planned = job.phases(data, written)
        for phase in planned.before:
            progress.run(phase)
        print_plan(written.recipe, data, planned.after)
        if args.dry_run:
            print(f"\nThis was a dry run: {job.recipe_path} is written, nothing is trained.")
            return
        for phase in planned.after:
            progress.run(phase)
        print_end(job, data, progress)
    finally:
        progress.close()


def _inputs(args: argparse.Namespace, held_out: str) -> dict[str, Any]:
    """Return what the prepared data and the scores depend on, by option; the recipe's own values are not among it."""
    given = {name: getattr(args, name) for name in ("images", "base", "recipe")}
    return {
        "--data": state_of(args.data),
        "--from": state_of(args.weights),
        **{f"--{name}": None if path is None else str(path.resolve()) for name, path in given.items()},
        "--format": args.format,
        "--columns": args.columns,
        "--held-out": held_out,
    }


def _check_unchanged(work: Path, out: Path, inputs: dict[str, Any]) -> None:
    """Check that the work that is there was begun with the same inputs.

    Raises:
        ConfigError: names every input that has changed.
    """
    noted = work / "inputs.json"
    if not noted.is_file():
        return
    changed = fingerprint_differences(
        json.loads(noted.read_text(encoding="utf-8")), inputs, recorded_in="when it was begun", current_in="now"
    )
    if changed:
        lines = "".join(f"\n  - {line}" for line in changed.values())
        raise ConfigError(
            f"{work} was begun with other inputs:{lines}\nTo begin again, choose another --out, or remove {work}"
            + (f" and {out}" if out.exists() else "")
        )


def _too_few(count: int) -> str:
    return (
        f"{count} sample(s), of which some must be held out: a fine-tuning needs {LEAST_SAMPLES} at the very least, "
        "and a few hundred to be worth it"
    )
