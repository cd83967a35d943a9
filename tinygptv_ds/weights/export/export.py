"""The verb `export`: a run's trained weights in the form that is wanted.

| form | content |
|---|---|
| hf | the whole model as a folder that transformers loads |
| adapter | LoRA, projections and norms as an adapter in peft's format |
| trained | the trained weights alone, to be loaded on the same base weights |
| original | a `.pth` that the original's code loads |
| phi | the language model alone, with LoRA merged |
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.weights.paths import refuse_existing, require_path

if TYPE_CHECKING:
    import torch

    from tinygptv_ds.weights.export.hf import LoRAForm

FORMS = ("hf", "adapter", "trained", "original", "phi")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument(
        "trained",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a finished run directory or its model/, a checkpoint of a run or of DeepSpeed, an adapter (also one of "
        "peft), or a .pth of the original's",
    )
    parser.add_argument(
        "--to",
        choices=FORMS,
        default="hf",
        help="hf: a folder for transformers' from_pretrained; adapter: LoRA, projections and norms in peft's format; "
        "trained: the trained weights alone; original: a .pth for the original's code; phi: the language model alone, "
        "LoRA merged (default: "
        "%(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the folder (original: file) to write")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="of all weights (default: bf16; adapter, trained and original: unchanged)",
    )
    lora = parser.add_mutually_exclusive_group()
    lora.add_argument("--keep-lora", action="store_true", help="hf: keep LoRA apart instead of merging it")
    lora.add_argument(
        "--drop-lora", action="store_true", help="hf: leave LoRA out: the base model that an adapter of peft belongs to"
    )
    parser.add_argument(
        "--layout",
        choices=["fused", "split"],
        default="split",
        help="phi: one query_key_value, as the original's code has it, or separate q, k and v, as transformers has "
        "them (default: %(default)s)",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="hf: results that evaluation has written with --json, for the model card (default: those that the run "
        "has written after its last step)",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="hf: the license of the weights in the model card, as the Hub names it (default: bsd-3-clause, as the "
        "published TinyGPT-V has)",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="hf: also upload the folder to this repository of the Hugging Face Hub, e.g. USER/NAME, with the token of "
        "HF_TOKEN or hf auth login",
    )
    parser.add_argument("--private", action="store_true", help="create that repository as a private one")
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
    """Export the weights."""
    require_path(args.trained)
    refuse_existing(args.out)
    _check_options(args)
    if args.recipe is not None:
        load_recipe(args.recipe, args.set)  # reports mistakes in it before torch is loaded

    if args.push_to_hub:
        from tinygptv_ds.weights.export.hub import check_upload

        check_upload(args.push_to_hub)

    from tinygptv_ds.dtypes import DTYPES

    dtype = None if args.dtype is None else DTYPES[args.dtype]
    if args.to == "original":
        _export_original(args, dtype)
    elif args.to in ("adapter", "trained"):
        _export_trained(args, dtype)
    else:
        _export_whole(args, DTYPES["bf16"] if dtype is None else dtype)


def _export_original(args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    from tinygptv_ds.weights.export.original import export_original
    from tinygptv_ds.weights.resolve import resolve_trained

    opened, trained = resolve_trained(args.trained, args.recipe, args.set)
    export_original(opened, trained, args.out, dtype=dtype)
    print(f"{args.out}: name it as `ckpt` in a configuration of the original's code")


def _export_trained(args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """Export to "adapter" or "trained"."""
    from tinygptv_ds.weights.export.trained import export_trained
    from tinygptv_ds.weights.resolve import resolve

    resolved = resolve(args.trained, args.recipe, args.set)
    if args.to == "trained":
        export_trained(resolved, args.out, dtype=dtype)
        print(f"{args.out}: name it as model.init_from of a recipe, or as the model to evaluate or chat with")
        return
    from tinygptv_ds.weights.export.adapter import export_adapter  # peft takes a second to import

    export_adapter(resolved, args.out, dtype=dtype)
    print(
        f"{args.out}: chat with it, name it as model.init_from of a recipe, or load it with "
        "PeftModel.from_pretrained on the model exported with --drop-lora"
    )


def _export_whole(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Export to "hf" or "phi"."""
    from tinygptv_ds.weights.export.hf import export_hf
    from tinygptv_ds.weights.export.phi import export_phi
    from tinygptv_ds.weights.resolve import resolve

    resolved = resolve(args.trained, args.recipe, args.set)
    if args.to == "hf":
        lora: LoRAForm = "kept" if args.keep_lora else "dropped" if args.drop_lora else "merged"
        card = {} if args.license is None else {"license_id": args.license}
        export_hf(resolved, args.out, dtype=dtype, lora=lora, scores=args.scores, **card)
        print(f"{args.out}: load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)")
        if args.push_to_hub:
            from tinygptv_ds.weights.export.hub import push_to_hub

            print(f"{push_to_hub(args.out, args.push_to_hub, private=args.private)}: uploaded")
    else:
        export_phi(resolved, args.out, layout=args.layout, dtype=dtype)
        print(f"{args.out}: name it as model.phi of a recipe; its README.md lists what else can load it")


def _check_options(args: argparse.Namespace) -> None:
    """Refuse an option of another form, which would have no effect."""
    only = {
        "--keep-lora": (args.keep_lora, "hf"),
        "--drop-lora": (args.drop_lora, "hf"),
        "--scores": (args.scores, "hf"),
        "--license": (args.license, "hf"),
        "--push-to-hub": (args.push_to_hub, "hf"),
    }
    only["--layout fused"] = (args.layout == "fused", "phi")
    for option, (given, form) in only.items():
        if given and args.to != form:
            raise ConfigError(f"{option} is for --to {form}; leave it out with --to {args.to}")
    if args.private and not args.push_to_hub:
        raise ConfigError("--private is for --push-to-hub REPO; leave it out")
    missing = [str(path) for path in args.scores if not path.is_file()]
    if missing:
        raise ConfigError(f"--scores: no such file: {', '.join(missing)}; evaluation writes one with --json FILE")
