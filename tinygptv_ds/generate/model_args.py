"""Options of the commands that answer questions: the model, its form and its template. No torch until it is loaded."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.template_names import check_template
from tinygptv_ds.processing.templates import choose_template
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER
from tinygptv_ds.weights.paths import require_path

if TYPE_CHECKING:
    from tinygptv_ds.generate.answerer import Answerer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, the form in which it is loaded, and the template."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="an exported folder, a finished run, an adapter, a checkpoint, or a released .pth",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--bits",
        type=int,
        choices=[16, 8, 4],
        default=16,
        help="bits of the weights of Phi's linear layers; 16: as --dtype (default: 16)",
    )
    group.add_argument(
        "--quantize-vision", action="store_true", help="with --bits 8 or 4: quantize the ViT's linear layers, too"
    )
    group.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="dtype of everything else (default: bf16 if the device computes in it)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument(
        "--merge-lora",
        action="store_true",
        help="merge LoRA into the weights if it is stored separately; slightly faster",
    )
    group.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter of peft for MODEL; its LoRA is merged")
    group.add_argument(
        "--recipe", type=Path, metavar="FILE", help="the stage's YAML, if MODEL does not name its base weights"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of that recipe (repeatable)"
    )
    group.add_argument(
        "--background",
        default="white",
        metavar="COLOR",
        help="images are turned upright by their EXIF orientation and placed on this color where they are transparent; "
        "none: neither, as in the original (default: %(default)s)",
    )
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--template",
        metavar="NAME",
        help="A (the original's demo of stages 1 to 3), B (its demo of stage 4), C or benchmark (its benchmarks), "
        "training (as MODEL was trained), or a text with {} for the question (default: training, and A where training "
        "used no template, as in stages 1 and 2)",
    )
    group.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        help="start prompts with the BOS token (default: with the training's template and with texts)",
    )
    group.add_argument(
        "--raw",
        action="store_true",
        help="<ImageHere> in a question places an image, and special tokens such as <|endoftext|> become tokens; by "
        "default all of them are words",
    )
    group.add_argument("--show-prompt", action="store_true", help="print the exact text of each prompt, and its length")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Check everything that can be checked without torch.

    Raises:
        TinyGPTVError: the model, the recipe, the template or the background does not exist.
    """
    require_path(args.model)
    if args.adapter is not None:
        require_path(args.adapter)
    if args.background != "white":
        from tinygptv_ds.processing.image import parse_background  # Pillow and numpy, which a mistake need not wait for

        parse_background(args.background)
    check_template(args.template, "--template")
    if args.recipe is not None:
        load_recipe(args.recipe, args.set)


def load_from(
    args: argparse.Namespace, *, device: str | None = None, name: str | None = None, show_prompts: bool = False
) -> Answerer:
    """Load the model that a command line names, with its template; raises as `load_model` does.

    Args:
        args: parsed by a parser with `add_model_arguments`, checked by `check_model_arguments`.
        device: used where `args` names none, for example each rank's GPU.
        name: the model's name for users and clients (default: the name of its folder or file).
        show_prompts: whether `Answerer.stream` prints each prompt.
    """
    from transformers.utils import logging

    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.generate.answerer import Answerer
    from tinygptv_ds.generate.load import load_model

    logging.disable_progress_bar()
    model, processor = load_model(
        args.model,
        DTYPES.get(args.dtype),
        bits=args.bits,
        device=args.device or device,
        merge=args.merge_lora,
        quantize_vision=args.quantize_vision,
        recipe=args.recipe,
        overrides=args.set,
        adapter=args.adapter,
    )
    template = choose_template(args.template, processor.prompt_template, processor.end_sym)
    if args.add_bos_token is not None:
        template = replace(template, add_bos_token=args.add_bos_token)
    if not args.raw:
        template = replace(template, plain=(IMAGE_PLACEHOLDER, *processor.tokenizer.all_special_tokens))
    return Answerer(model, processor, template, name or args.model.resolve().name, show_prompts)
