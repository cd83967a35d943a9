"""The options that name a model and how it is loaded, checked before torch is imported."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.infer.templates import check_template

if TYPE_CHECKING:
    from tinygptv_ds.infer.answerer import Answerer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, in what precision, where, asked in which template."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="an exported folder, a run, or trained weights")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="(default: what the machine computes in)")
    parser.add_argument("--bits", type=int, choices=[16, 8, 4], default=16, help="of Phi's weights (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--template", help="A, B, C, training, or a text with {} (default: what the checkpoint says)")
    parser.add_argument("--recipe", type=Path, help="for trained weights that do not tell where their base lies")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of that recipe")


def add_address_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Where to listen."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 to be reached from elsewhere (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=port, help="(default: %(default)s)")


def check_arguments(args: argparse.Namespace, *packages: str) -> None:
    """What can be wrong without a look at the model.

    Args:
        args: with both groups of options.
        packages: that have to be installed beside requirements.txt.

    Raises:
        ConfigError: anything.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed: pip install -r requirements-app.txt")
    if not args.model.exists():
        raise ConfigError(f"no model at {args.model}: give an exported folder, a run directory, or trained weights")
    if not 0 < args.port < 65536:
        raise ConfigError(f"--port must lie in 1 to 65535, not {args.port}")
    check_template(args.template)


def open_answerer(args: argparse.Namespace, name: str | None = None) -> Answerer:
    """Load the model that the options name.

    Args:
        args: with `add_model_arguments`.
        name: of the model (default: of its folder or file).

    Raises:
        WeightsError: there is no model.
        ConfigError: it cannot be had in this way.
    """
    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.infer.answerer import Answerer
    from tinygptv_ds.infer.loading import load_model
    from tinygptv_ds.infer.templates import choose_template

    model, processor = load_model(
        args.model,
        DTYPES[args.dtype] if args.dtype else None,
        bits=args.bits,
        device=args.device,
        recipe=args.recipe,
        overrides=args.set,
    )
    template = choose_template(args.template, processor.prompt_template, processor.end_sym)
    return Answerer(model, processor, template, name or args.model.resolve().name)
