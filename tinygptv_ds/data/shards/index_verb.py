"""`python -m tinygptv_ds index`: the indexes of local shards made ahead of time, to be stored next to the tars."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygptv_ds.data.shards.index import sample_counts
from tinygptv_ds.data.shards.writer import expand_shards
from tinygptv_ds.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="a folder, wildcard or brace pattern of tars")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> None:
    """Index what has no index that fits, and say how much there is.

    Raises:
        ConfigError: a URL, or no sensible number of workers.
        DataError: a tar is missing or none, or its folder cannot be written.
    """
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {args.workers}")
    tars = expand_shards(args.shards)
    remote = [shard for shard in tars if not isinstance(shard, Path)]
    if remote:
        raise ConfigError(f"{remote[0]}: indexes are made where the tars are files; copy the .idx files later")
    samples = sum(sample_counts(tars, args.workers))
    lost = [tar for tar in tars if not tar.with_name(f"{tar.name}.idx").is_file()]
    if lost:
        raise DataError(
            f"{lost[0]} and {len(lost) - 1} more: their folder cannot be written, so that the indexes went to this "
            "user's cache alone; run this where the folder can be written"
        )
    print(f"{len(tars)} shards with {samples:,} samples, each with its index next to it")
