"""The command ``check-data``: which of a recipe's data is there and readable, and in which mixture it trains.

torch is not imported. The exit code is 0 if everything that the recipe names can train, 1 if something is missing or
broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tinygptv_ds.config.load import add_recipe_arguments, load_recipe
from tinygptv_ds.data.checks.check_report import report
from tinygptv_ds.data.checks.dataset_check import Scope
from tinygptv_ds.data.checks.recipe_check import check_data
from tinygptv_ds.data.shards.cache import open_cache
from tinygptv_ds.data.stream.sample_counts import local_sample_counts
from tinygptv_ds.distributed import cores_per_rank, ranks_from_env
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import whole_file
from tinygptv_ds.train.recipe_warnings import recipe_warnings

SAMPLES = 300
INCOMPLETE = 1  # the exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``check-data``."""
    parser.epilog = (
        "Exit code 0: everything that the recipe names can train; 1: something is missing or broken, or more samples "
        "than data.max_skipped_share would drop out; 2: the recipe or the command line is wrong."
    )
    add_recipe_arguments(parser)
    parser.add_argument("--root", type=Path, metavar="DIR", help="search it for the own files of missing datasets")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help="samples to check in each dataset, spread over its shards (default: %(default)s)",
    )
    amount.add_argument("--all", action="store_true", help="check every sample")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: 1; with --all one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")


def run(args: argparse.Namespace) -> None:
    """Run ``check-data``: print the report and exit with its code."""
    if args.samples < 1 or (args.workers is not None and args.workers < 1):
        raise ConfigError("--samples and --workers must be at least 1")
    if args.root and not args.root.is_dir():
        raise ConfigError(f"--root {args.root}: no such folder")
    recipe = load_recipe(args.recipe, args.set)
    workers = args.workers or (cores_per_rank(ranks_from_env()) if args.all else 1)
    limit, cache = None if args.all else args.samples, open_cache(recipe.data)
    scope = Scope(recipe.seed, limit, workers, args.root, cache, tuple(recipe.data.allow_pipe))
    check = check_data(recipe, scope)
    print(report(check, recipe, str(args.recipe)))
    for warning in recipe_warnings(recipe, local_sample_counts(recipe)):
        print(f"\nwarning: {warning}")
    if args.json:
        with whole_file(args.json) as partial:
            partial.write_text(json.dumps(asdict(check), indent=1) + "\n", encoding="utf-8")
    if not check.complete:
        sys.exit(INCOMPLETE)
