"""`python -m tinygptv_ds export`: a run's trained weights on their base, as one folder that transformers loads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "trained", type=Path, metavar="RUN_OR_MODEL", help="a finished run directory, or its model/ folder"
    )
    parser.add_argument("--to", choices=["hf"], default="hf", help="hf: a folder for transformers' from_pretrained")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of all weights (default: %(default)s)")
    parser.add_argument("--keep-lora", action="store_true", help="keep LoRA apart instead of merging it")


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    import torch

    export_hf(args.trained, args.out, dtype=getattr(torch, DTYPES[args.dtype]), merge_lora=not args.keep_lora)
    print(f"{args.out}: load it with TinyGPTVForConditionalGeneration.from_pretrained")


def export_hf(trained: Path, out: Path, *, dtype: torch.dtype, merge_lora: bool = True) -> None:
    """Write a self-contained folder: configuration, safetensors, tokenizer; complete or not at all.

    Args:
        trained: a run directory or its `model/`; its provenance.json says where the base weights lie.
        out: the folder, for `TinyGPTVForConditionalGeneration.from_pretrained`; must not exist yet, or be empty.
        dtype: of all weights.
        merge_lora: merge LoRA into the weights that it adapts.

    Raises:
        WeightsError: base or trained weights are missing or do not fit, or `out` is in use.
    """
    from tinygptv_ds.convert.merge import merge_lora as merge
    from tinygptv_ds.convert.trained import PROVENANCE, trained_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is already there; choose another --out, or remove it")
    model, tokenizer = _assembled(trained, dtype)
    if merge_lora:
        merge(model)
    model.to(dtype)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.copy(trained_file(trained).with_name(PROVENANCE), partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)


def load_run(trained: Path, *, dtype: torch.dtype) -> tuple[TinyGPTVForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model of a run on its base weights, all in one dtype, and its tokenizer.

    Args:
        trained: a run directory or its `model/`; its provenance.json says where the base weights lie.
        dtype: of all weights.

    Raises:
        WeightsError: base or trained weights are missing or do not fit.
    """
    model, tokenizer = _assembled(trained, dtype)
    return model.to(dtype), tokenizer


def _assembled(
    trained: Path, frozen_dtype: torch.dtype
) -> tuple[TinyGPTVForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model of a run with what was trained in fp32, so that LoRA is not rounded before it is merged."""
    from tinygptv_ds.convert.assemble import assemble, load_tokenizer
    from tinygptv_ds.convert.trained import trained_file
    from tinygptv_ds.models.configuration import TinyGPTVConfig

    folder = trained_file(trained).parent
    base = _base_paths(folder)
    model = assemble(TinyGPTVConfig.from_pretrained(folder), base, folder, frozen_dtype=frozen_dtype)
    return model, load_tokenizer(base["phi"])


def _base_paths(folder: Path) -> dict[str, Path]:
    """Where the base weights lie that a run was trained on.

    Raises:
        WeightsError: provenance.json does not tell, or something is no longer there.
    """
    from tinygptv_ds.convert.files import read_json
    from tinygptv_ds.convert.trained import BASE_PARTS, PROVENANCE

    base = read_json(folder / PROVENANCE).get("base") or {}
    untold = [part for part in BASE_PARTS if "path" not in (base.get(part) or {})]
    if untold:
        raise WeightsError(f"{folder / PROVENANCE} does not say where {', '.join(untold)} lies; add its path there")
    paths = {part: Path(base[part]["path"]) for part in BASE_PARTS}
    missing = [f"{part} ({path})" for part, path in paths.items() if not path.exists()]
    if missing:
        raise WeightsError(
            f"the base weights of {folder} are gone: {', '.join(missing)}; "
            f"put them back, or correct the path in {PROVENANCE}"
        )
    return paths
