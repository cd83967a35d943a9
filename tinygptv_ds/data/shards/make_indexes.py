"""`tinygptv-ds index`: make the indexes of local shards ahead of time, to be copied along with the tars."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygptv_ds.data.shards.index import sample_counts
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="a folder, wildcard or brace pattern of tars")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> None:
    """Index the shards that have no up-to-date index, and print how many shards and samples there are.

    Raises:
        ConfigError: a URL is given, or `--workers` is below 1.
        DataError: a tar is missing or not a tar, or its folder cannot be written.
    """
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {args.workers}")
    tars: list[Path] = []
    for shard in expand_shards(args.shards):
        if not isinstance(shard, Path):
            raise ConfigError(f"{shard}: indexes are made where the tars are files; copy the .idx files later")
        tars.append(shard)
    samples = sum(sample_counts(tars, args.workers))
    without = [tar for tar in tars if not tar.with_name(f"{tar.name}.idx").is_file()]
    if without:
        raise DataError(
            f"{without[0]} and {len(without) - 1} more: their folder cannot be written, so the indexes went to this "
            "user's cache only; run this where the folder can be written"
        )
    shards = "1 shard" if len(tars) == 1 else f"{len(tars):,} shards"
    print(f"{shards} with {samples:,} samples; indexes are next to the tars")
