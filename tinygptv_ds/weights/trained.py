"""What a stage trained: a run's `model/` folder written, and trained weights of any form checked against a model.

Trained weights are read from run directories and their `model/`, checkpoints of this program and of DeepSpeed, exported
models with LoRA kept, adapters of this program and of peft, MiniGPT-4's projection, and the original's own
`checkpoint_N.pth` and released files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.files import sha256, whole_folder
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import is_trainable, lora, norms, projections
from tinygptv_ds.weights.detect import RECIPE, WEIGHTS, Opened, open_any
from tinygptv_ds.weights.io import Stored, in_memory, listing, read_json
from tinygptv_ds.weights.kinds import KINDS
from tinygptv_ds.weights.layouts.tinygptv import original_source
from tinygptv_ds.weights.peft_adapter import (
    ADAPTER_CONFIG,
    PeftAdapter,
    check_adapter_layers,
    is_adapter,
    read_adapter,
)
from tinygptv_ds.weights.provenance import write_provenance
from tinygptv_ds.weights.safetensors_writer import write_file
from tinygptv_ds.weights.source import Source, check_weights, lora_rank

PARTS = {
    "llama_proj": lambda name: name.startswith("llama_proj."),
    "llama_proj2": lambda name: name.startswith("llama_proj2."),
    "norms": norms,
    "lora": lora,
}
_ABSENT = {
    "llama_proj": "first projection, so it is not a complete file of TinyGPT-V: name the whole checkpoint",
    "llama_proj2": "second projection, so it is not a complete file of TinyGPT-V: name the whole checkpoint",
    "norms": "trained norms, without which Phi answers 'the the the'; a file with LoRA alone, as peft saves it by "
    "default, is not enough: name the whole checkpoint",
    "lora": "LoRA: it is of stage 1, or of a run without LoRA; name the weights of the stage before this one",
}


def save_trained(state: Mapping[str, Tensor], config: TinyGPTVConfig, out: Path, provenance: Mapping[str, Any]) -> None:
    """Write a run's `model/` folder, complete or not at all; an existing one is replaced.

    Args:
        state: the trained weights by canonical name; stored in fp32.
        config: the model's.
        out: the folder; it gets `trained.safetensors`, `config.json` and `provenance.json`.
        provenance: from `provenance_of`; the hash of the weights and the versions are added.
    """
    weights = {name: in_memory(tensor.detach().cpu()) for name, tensor in state.items()}
    with whole_folder(out) as partial:
        write_model(partial, weights, config, provenance, dtype=torch.float32)


def write_model(
    folder: Path,
    weights: Mapping[str, Stored],
    config: TinyGPTVConfig,
    notes: Mapping[str, Any],
    *,
    dtype: torch.dtype | None,
) -> None:
    """Write the three files of `save_trained` into an existing folder; `dtype` None keeps each weight's own."""
    write_file(folder / WEIGHTS, weights, dtype=dtype)
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    write_provenance(folder, {**notes, "sha256": {WEIGHTS: sha256(folder / WEIGHTS)}})


def fitting_source(
    model: nn.Module, path: Path, allow_missing: Collection[str] = (), base: Path | None = None
) -> Source:
    """Return trained weights that fit a model, checked by name and shape but not read yet.

    Projections, norms and, if the model has it, LoRA must all be there; other weights (the Q-Former that the first
    release had trained) are taken where the file has them.

    Args:
        model: the model, which may be on the meta device.
        path: anything that `open_any` opens.
        allow_missing: names of `PARTS` that the file may lack.
        base: where the model's Phi comes from. If that is `path`, an exported model whose LoRA is merged into its Phi
            will do, since nothing of it is lost.

    Raises:
        WeightsError: a key is missing, unknown or of another shape, or LoRA does not fit the model's.
    """
    opened = open_any(Path(path))
    start = opened.path
    if opened.folder is not None and is_adapter(opened.folder):
        start = read_adapter(opened.folder, original_source(opened.stored, start).weights).base_folder or start
    merged_in_base = base is not None and base.resolve() == start.resolve()
    source = whole_source(opened, init_from_of(opened), merged_in_base=merged_in_base)
    check_fit(model, opened, source, allow_missing)
    return source


def check_fit(model: nn.Module, opened: Opened, source: Source, allow_missing: Collection[str] = ()) -> None:
    """Check that trained weights belong to this model; arguments and errors as of `fitting_source`."""
    config = getattr(model, "config", None)
    if config is not None and config.lora_r:
        _check_lora_scale(config, opened)
    _check_trained({name: tuple(p.shape) for name, p in model.named_parameters()}, source, allow_missing)


def trained_source(opened: Opened, *, merged_in_base: bool = False) -> Source:
    """Return the trained weights that a file or folder holds under canonical names.

    Args:
        opened: the file or folder.
        merged_in_base: whether the model's Phi is this exported one, so that LoRA merged into it is there.

    Raises:
        WeightsError: it holds something else, or a model whose LoRA is merged into a base that is not used.
    """
    if opened.kind not in ("trained", "projection", "model", "adapter"):
        place = {"phi": "phi", "eva_vit": "eva_vit", "blip2": "qformer"}[opened.kind]
        raise WeightsError(
            f"{opened.path} is a base model ({KINDS[opened.kind]}), not trained weights of TinyGPT-V; its place is "
            f"model.{place}"
        )
    source = original_source(opened.stored, opened.path, opened.ignored)
    if opened.folder is not None and is_adapter(opened.folder):
        return _with_base(read_adapter(opened.folder, source.weights), source, merged_in_base=merged_in_base)
    if opened.kind != "model":
        return source
    lora_form = opened.notes.get("lora")
    if lora_form == "dropped" or (lora_form == "merged" and not merged_in_base):
        what = "LoRA merged into its base" if lora_form == "merged" else "LoRA left out"
        itself = (
            "; or let model.phi, model.eva_vit and model.qformer name this folder, too, with "
            "model.allow_missing=[lora], as `tinygptv-ds finetune` does"
        )
        raise WeightsError(
            f"{opened.path} is an exported model with {what}, from which a stage cannot start; name the run that it "
            f"comes from, or export it with --to trained or --keep-lora{itself if lora_form == 'merged' else ''}"
        )
    frozen_updates = set(opened.notes.get("frozen_updates", ()))
    wanted = {name for name in source.weights if is_trainable(name) or name in frozen_updates}
    base = sorted(source.weights.keys() - wanted)
    return Source(opened.path, {n: t for n, t in source.weights.items() if n in wanted}, base)


def _with_base(adapter: PeftAdapter, source: Source, *, merged_in_base: bool) -> Source:
    """Return an adapter's weights and, from the exported model that it was trained on, projections and norms.

    Raises:
        WeightsError: its LoRA is not of the plain kind that a stage trains, or on other layers.
    """
    check_adapter_layers(adapter)
    elsewhere = [layer for layer in adapter.layers if not layer.startswith("language_model.")]
    if adapter.alpha is None or elsewhere:
        what = adapter.variant + (f" on {listing(elsewhere)}" if elsewhere else "")
        raise WeightsError(
            f"{adapter.folder}: a stage trains plain LoRA of one rank and one scale on Phi's layers, not {what}. "
            "The adapter is for answering: `tinygptv-ds chat MODEL --adapter DIR`; to train on, merge it into its "
            "model with peft's merge_and_unload"
        )
    folder = adapter.base_folder
    if folder is None or (folder / ADAPTER_CONFIG).is_file() or any(map(projections, source.weights)):
        return source
    base = open_any(folder)
    if base.kind != "model" or (base.notes.get("lora") == "merged" and not merged_in_base):
        return source
    trained = original_source(base.stored, base.path).weights
    added = {n: t for n, t in trained.items() if is_trainable(n) and not lora(n) and n not in source.weights}
    return Source(source.path, {**added, **source.weights}, source.ignored)


def whole_source(opened: Opened, init_from: str | None, *, merged_in_base: bool = False) -> Source:
    """Return what `trained_source` does and, for a checkpoint, what only `init_from` held: also part of the model.

    Args:
        opened: the file or folder.
        init_from: what the stage started from, by its recipe.
        merged_in_base: as of `trained_source`.

    Raises:
        WeightsError: as of `trained_source`, or `init_from` is no longer there.
    """
    source = trained_source(opened, merged_in_base=merged_in_base)
    if not opened.of_one_stage or init_from is None:
        return source
    try:
        before = open_any(Path(init_from))
        # The run has started from it, so its Phi was the right one.
        carried = whole_source(before, init_from_of(before), merged_in_base=True)
    except WeightsError as error:
        raise WeightsError(
            f"{opened.path} started from {init_from}, which may hold more than this stage trains: {error}. Put it "
            "back, or give its new place with --set model.init_from=PATH (null if it had no Q-Former)"
        ) from None
    added = {name: stored for name, stored in carried.weights.items() if name not in source.weights}
    return Source(source.path, added | source.weights, source.ignored)


def recipe_of_run(opened: Opened, overrides: Sequence[str] = ()) -> Recipe | None:
    """Return the recipe of the run that a checkpoint belongs to, with `overrides` as of `--set`; None without one.

    Raises:
        ConfigError: recipe.yaml is damaged.
    """
    if not opened.of_one_stage or opened.folder is None or not (opened.folder / RECIPE).is_file():
        return None
    return load_recipe(opened.folder / RECIPE, overrides)


def init_from_of(opened: Opened) -> str | None:
    """Return what the stage of a checkpoint started from, by the recipe of its run."""
    recipe = recipe_of_run(opened)
    return None if recipe is None else recipe.model.init_from


def _check_trained(shapes: Mapping[str, tuple[int, ...]], source: Source, allow_missing: Collection[str]) -> None:
    given = source.weights.keys()
    _check_lora_rank(shapes, source)
    required: set[str] = set()
    for part, belongs in PARTS.items():
        wanted = set(filter(belongs, shapes))
        if wanted and not any(map(belongs, given)):
            if part not in allow_missing:
                raise WeightsError(_without(part, source))
            LOGGER.info("%s has no %s, which starts from initial values", source.path, part)
            continue
        required |= wanted
    check_weights(
        {name: shape for name, shape in shapes.items() if name in required or name in given},
        source,
        _likely_cause(source, shapes),
    )


def _without(part: str, source: Source) -> str:
    if source.weights.keys() <= {"llama_proj.weight", "llama_proj.bias"}:
        return (
            f"{source.path} holds llama_proj alone, as MiniGPT-4's files do; stage 1 can start from it, with initial "
            "values for the rest: --set 'model.allow_missing=[llama_proj2, norms, lora]'"
        )
    return (
        f"{source.path} holds no {_ABSENT[part]}, or let that part start from initial values with "
        f"--set 'model.allow_missing=[{part}]'"
    )


def _check_lora_rank(shapes: Mapping[str, tuple[int, ...]], source: Source) -> None:
    in_file, in_model = lora_rank(source.shapes), lora_rank(shapes)
    if in_file in (0, in_model):
        return
    has = f"model's is {in_model}" if in_model else "model has none (lora_r 0)"
    raise WeightsError(
        f"{source.path} holds LoRA of rank {in_file}, the {has}; set model.lora_r={in_file}, or start from "
        f"weights {'of that rank' if in_model else 'of a stage without LoRA'}"
    )


def _likely_cause(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return why these weights may not fit, judging by the names that do not."""
    unknown = [name for name in source.weights if name not in shapes]
    first = source.weights.get("llama_proj.weight")
    if any(".lora_magnitude" in name for name in unknown):
        return "The LoRA is DoRA, which this model does not have"
    if any(f".{letter}_proj.lora_" in name for name in unknown for letter in "qkv"):
        return (
            "LoRA was trained on split q/k/v projections, each with an A of its own; TinyGPT-V has one on the fused "
            "query_key_value. Merge it into that model's weights instead"
        )
    if first is not None and first.shape[0] == 5120 != shapes.get("llama_proj.weight", (0,))[0]:
        return "This is the projection of MiniGPT-4's 13B model; take that of Vicuna-7B, which is 4096 wide"
    return (
        "Trained weights fit the Phi, Q-Former, proj_hidden_size and lora_targets that they were trained with: "
        "point model.* at the same ones, or init_from at another run"
    )


def _check_lora_scale(config: TinyGPTVConfig, opened: Opened) -> None:
    """Check alpha: weights trained under another one would be applied with another strength."""
    trained = _trained_alpha(opened)
    if trained is not None and not math.isclose(trained, config.lora_alpha, rel_tol=1e-9):
        raise WeightsError(
            f"{opened.path} was trained with lora_alpha {trained}, the model has {config.lora_alpha}; "
            f"set model.lora_alpha={trained}"
        )


def _trained_alpha(opened: Opened) -> float | None:
    """Return the alpha that the files of a run or an adapter note; the original's checkpoints do not reliably."""
    if opened.folder is not None and is_adapter(opened.folder):
        return read_adapter(opened.folder, original_source(opened.stored, opened.path).weights).alpha
    if opened.folder is not None and (opened.folder / "config.json").is_file():
        config = read_json(opened.folder / "config.json")
        return config.get("lora_alpha") if config.get("lora_r") else None
    recipe = recipe_of_run(opened)
    return recipe.model.lora_alpha if recipe is not None and recipe.model.lora_r else None
