"""The verb `convert`: weights of any layout as safetensors in the layout that is wanted."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.weights.paths import refuse_existing, require_path

if TYPE_CHECKING:
    import torch

    from tinygptv_ds.weights.detect import Opened
    from tinygptv_ds.weights.source import Source

# The files of a tokenizer, copied as they are because older code reads the older ones.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="FILE_OR_DIR",
        help="Phi-2 in any of its layouts, eva_vit_g.pth, a BLIP-2 file or folder, MiniGPT-4's projection, trained "
        "weights of TinyGPT-V in any form, a run, an adapter, or a checkpoint of a run or of DeepSpeed",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the file (Phi: folder) to write")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of all weights (default: unchanged)")
    parser.add_argument(
        "--layout",
        choices=["fused", "split"],
        help="Phi: one query_key_value, as TinyGPT-V has it, or separate q, k and v, as transformers has them "
        "(default: fused)",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="EVA ViT: interpolate its position embeddings to this size"
    )


def run(args: argparse.Namespace) -> None:
    """Convert the weights."""
    require_path(args.source)
    refuse_existing(args.out)

    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.weights.detect import open_any
    from tinygptv_ds.weights.kinds import KINDS

    opened = open_any(args.source)
    _check_options(args, opened)
    source = _checked(opened)
    dtype = DTYPES.get(args.dtype)
    if opened.kind == "phi":
        _write_phi(opened, source, args.out, args.layout or "fused", dtype)
    else:
        _write_file(opened, source, args.out, args.image_size, dtype)
    print(
        f"{args.source}: {KINDS[opened.kind]}, {len(source.weights)} tensors converted, {len(source.ignored)} ignored\n"
        f"{args.out}: written"
    )


def _check_options(args: argparse.Namespace, opened: Opened) -> None:
    if args.layout and opened.kind != "phi":
        raise ConfigError(f"--layout is for Phi; {args.source} is of another kind, so leave it out")
    if args.image_size and opened.kind != "eva_vit":
        raise ConfigError(f"--image-size is for an EVA ViT; {args.source} is of another kind, so leave it out")
    if opened.kind == "model":
        raise ConfigError(
            f"{args.source} is already a whole model; export its run with another --dtype, or with --to trained"
        )


def _checked(opened: Opened) -> Source:
    """Return the weights under canonical names, checked to be complete.

    Raises:
        WeightsError: anything is missing, unknown or of another shape.
    """
    from tinygptv_ds.weights.detect import canonical_source
    from tinygptv_ds.weights.layouts.expected_shapes import expected_shapes, in_order
    from tinygptv_ds.weights.layouts.phi2 import check_config, phi_config
    from tinygptv_ds.weights.source import Source, check_weights
    from tinygptv_ds.weights.trained import init_from_of, trained_source, whole_source

    config = phi_config(_phi_folder(opened)) if opened.kind == "phi" else None
    source = canonical_source(opened, 1 if config is None else config.num_attention_heads)
    if opened.kind in ("trained", "adapter") and not opened.of_one_stage:
        source = trained_source(opened)
    if opened.of_one_stage:
        source = whole_source(opened, init_from_of(opened))
    expected = expected_shapes(opened.kind, source)
    check_weights(expected, source, f"`tinygptv-ds inspect {opened.path}` lists what is there")
    if config is not None:
        check_config(config, expected, _phi_folder(opened) / "config.json")
    ordered = {name: source.weights[name] for name in in_order(source.weights, expected)}
    return Source(source.path, ordered, source.ignored)


def _phi_folder(opened: Opened) -> Path:
    """Return the folder of the config.json of Phi's weights."""
    return opened.path if opened.path.is_dir() else opened.path.parent


def _write_file(opened: Opened, source: Source, out: Path, image_size: int | None, dtype: torch.dtype | None) -> None:
    from tinygptv_ds.files import whole_file
    from tinygptv_ds.weights.layouts.eva import PREFIX, resized
    from tinygptv_ds.weights.safetensors_writer import write_file

    weights = source.weights
    if opened.kind == "eva_vit":
        weights = weights if image_size is None else resized(weights, image_size, source.path)
        weights = {name.removeprefix(PREFIX): stored for name, stored in weights.items()}
    with whole_file(out) as partial:
        write_file(partial, weights, dtype=dtype)


def _write_phi(opened: Opened, source: Source, out: Path, layout: str, dtype: torch.dtype | None) -> None:
    from tinygptv_ds.files import whole_folder
    from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS, phi_config, save_config, to_layout
    from tinygptv_ds.weights.safetensors_writer import stored_dtype, write_weights

    folder = _phi_folder(opened)
    config = phi_config(folder)
    config.qk_layernorm = any(map(ADDED_NORMS.fullmatch, source.weights))
    with whole_folder(out) as partial:
        write_weights(partial, to_layout(source.weights, config.num_attention_heads, layout), dtype=dtype)
        save_config(config, partial, stored_dtype(next(iter(source.weights.values())), dtype))
        for name in _TOKENIZER:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
