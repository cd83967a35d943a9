"""`python -m tinygptv_ds export`: a run's trained weights in the form that is wanted.

| form | what it is |
|---|---|
| hf | the whole model as a folder that transformers loads |
| adapter | what was trained alone, to be put on the same base again |
| original | a `.pth` that the original's code loads |
| phi | the language model alone, with LoRA merged |
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.weights.paths import refuse_existing, require_path

FORMS = ("hf", "adapter", "original", "phi")
_WHOLE = ("hf", "phi")  # written in bf16 unless told otherwise; what is small stays as it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "trained",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a finished run directory or its model/, a checkpoint of a run or of DeepSpeed's, an adapter, or a .pth "
        "of the original's",
    )
    parser.add_argument(
        "--to",
        choices=FORMS,
        default="hf",
        help="hf: a folder for transformers' from_pretrained; adapter: what was trained alone; original: a .pth for "
        "the original's code; phi: the language model alone, LoRA merged (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the folder (original: file) to write")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="of all weights (default: bf16; adapter and original: as they are)",
    )
    parser.add_argument("--keep-lora", action="store_true", help="hf: keep LoRA apart instead of merging it")
    parser.add_argument(
        "--layout",
        choices=["fused", "split"],
        default="split",
        help="phi: query_key_value in one, as the original's code wants it, or q, k and v apart, as transformers has "
        "them (default: %(default)s)",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="hf: results that eval/ has written with --json, for the model card",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="the stage's YAML, which names the base weights (default: the run's own; for the original's files the "
        "published recipe of their stage)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of that recipe, e.g. --set model.phi=weights/phi-2; may be given any number of times",
    )


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    require_path(args.trained)
    refuse_existing(args.out)
    _check_options(args)
    if args.recipe is not None:
        load_recipe(args.recipe, args.set)  # mistakes in it show before torch is loaded

    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.weights.export.adapter import export_adapter
    from tinygptv_ds.weights.export.hf import export_hf
    from tinygptv_ds.weights.export.original import export_original
    from tinygptv_ds.weights.export.phi import export_phi
    from tinygptv_ds.weights.resolve import resolve, resolve_trained

    dtype = DTYPES["bf16"] if args.dtype is None and args.to in _WHOLE else DTYPES.get(args.dtype)
    if args.to == "original":
        opened, trained = resolve_trained(args.trained, args.recipe, args.set)
        export_original(opened, trained, args.out, dtype=dtype)
        print(f"{args.out}: name it as `ckpt` in a configuration of the original's")
        return
    resolved = resolve(args.trained, args.recipe, args.set)
    if args.to == "hf":
        export_hf(resolved, args.out, dtype=dtype, merge=not args.keep_lora, scores=args.scores)
        print(f"{args.out}: load it with TinyGPTVForConditionalGeneration.from_pretrained")
    elif args.to == "adapter":
        export_adapter(resolved, args.out, dtype=dtype)
        print(f"{args.out}: name it as model.init_from of a recipe, or as the model of eval/, on the same base weights")
    else:
        export_phi(resolved, args.out, layout=args.layout, dtype=dtype)
        print(f"{args.out}: name it as model.phi of a recipe; its README.md says what else can load it")


def _check_options(args: argparse.Namespace) -> None:
    """An option of another form would be without effect."""
    only = {"--keep-lora": (args.keep_lora, "hf"), "--scores": (args.scores, "hf")}
    only["--layout fused"] = (args.layout == "fused", "phi")
    for option, (given, form) in only.items():
        if given and args.to != form:
            raise ConfigError(f"{option} is for --to {form}; leave it out with --to {args.to}")
    missing = [str(path) for path in args.scores if not path.is_file()]
    if missing:
        raise ConfigError(f"--scores: {', '.join(missing)} not there; eval/ writes such a file with --json FILE")
