"""The command ``preview``: a page of samples as the model will see them, in the order in which training sees them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.config.load import add_recipe_arguments, load_recipe
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.config.paths import check_ending
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.checks.image_tokens import PUBLISHED, image_tokens
from tinygptv_ds.data.stream.availability import absent, options_without
from tinygptv_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tinygptv_ds.data.loader.sample import Tokens

COUNT = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``preview``."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("preview.html"),
        metavar="FILE",
        help="the page, one self-contained HTML file (default: %(default)s)",
    )
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--start-step", type=int, default=0, metavar="S", help="the first step (default: 0)")
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="these datasets alone")
    parser.add_argument(
        "--queries",
        type=int,
        metavar="N",
        help="tokens of an image (default: those of the Q-Former's weights, or 32, the published ones, where there are "
        "no weights)",
    )


def run(args: argparse.Namespace) -> None:
    """Run ``preview``.

    Raises:
        ConfigError: the recipe or an option is wrong, or the tokenizer is missing.
        DataError: shards are missing.
    """
    recipe = load_recipe(args.recipe, args.set)
    _check(args, recipe)

    from tinygptv_ds.data.checks.preview_html import write_html  # the tokenizer imports torch
    from tinygptv_ds.data.checks.preview_samples import previews
    from tinygptv_ds.data.stream.plan import open_stream

    tokens = _open_tokens(recipe, args.queries or image_tokens(recipe.model.qformer) or PUBLISHED)
    stream = open_stream(recipe)
    shown = list(previews(stream, tokens, first_step=args.start_step, number=args.count, datasets=args.dataset))
    title = f"Stage {recipe.stage}: {args.count} samples from step {args.start_step}"
    write_html(args.out, shown, title=title, recipe=recipe, source=str(args.recipe))
    skipped = sum(preview.skipped is not None for preview in shown)
    print(f"{args.out}: {len(shown)} samples" + (f", {skipped} of which training leaves out" if skipped else ""))


def _check(args: argparse.Namespace, recipe: Recipe) -> None:
    """Check the options and that the shards are there, before any sample is read."""
    check_ending("--out", args.out, ".html")
    if args.count < 1 or args.start_step < 0 or (args.queries is not None and args.queries < 1):
        raise ConfigError("--count and --queries must be at least 1, --start-step at least 0")
    names = [section.name for section in recipe.data.used]
    for name in args.dataset:
        if name not in names:
            raise ConfigError(f"--dataset {name}: the recipe uses no such dataset{nearest(name, names)}")
    away = {section: problem for section, problem in absent(recipe.data).items() if section in recipe.data.used}
    if away:
        options = options_without(recipe.data, {*away, *recipe.data.validation})
        others = f"\nTo see the datasets that are there: {options[0]}" if options else ""
        raise DataError("\n".join(away.values()) + others)


def _open_tokens(recipe: Recipe, queries: int) -> Tokens:
    """Load the tokenizer next to Phi's weights; images get an id that no word has."""
    from transformers import AutoTokenizer

    from tinygptv_ds.data.loader.sample import Tokens
    from tinygptv_ds.processing.sequence import ImageTokens

    folder = recipe.model.phi
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = f"holds no tokenizer ({str(error).splitlines()[0]})" if Path(folder).is_dir() else "does not exist"
        raise ConfigError(
            f"model.phi: {folder} {reason}. Phi-2's tokenizer is enough for this: 'hf download microsoft/phi-2 "
            f'--include "*.json" "*.txt" --local-dir {folder}\'. Or --set model.phi=PATH'
        ) from None
    return Tokens(tokenizer, recipe.text, ImageTokens(-1, queries), recipe.model.image_size)
