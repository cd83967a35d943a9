"""What a stage trained, in whatever form it comes, under canonical names and loaded into a model.

Taken are run directories and their `model/`, checkpoints of ours and of DeepSpeed's, exported models with LoRA kept,
adapters, MiniGPT-4's projection, and the original's own `checkpoint_N.pth` and released files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import learnt, lora, norms
from tinygptv_ds.weights.detect import KINDS, RECIPE, Opened, open_any
from tinygptv_ds.weights.io import read_json
from tinygptv_ds.weights.layouts.original import original_source
from tinygptv_ds.weights.source import Source, check_weights, copy_weights

PARTS = {
    "llama_proj": lambda name: name.startswith("llama_proj."),
    "llama_proj2": lambda name: name.startswith("llama_proj2."),
    "norms": norms,
    "lora": lora,
}
_ABSENT = {
    "llama_proj": "first projection; it is no whole file of TinyGPT-V: name the whole checkpoint",
    "llama_proj2": "second projection; it is no whole file of TinyGPT-V: name the whole checkpoint",
    "norms": "trained norms, without which Phi answers 'the the the'; a file with LoRA alone, as peft saves it, is not "
    "enough: name the whole checkpoint",
    "lora": "LoRA: it is of stage 1, or of a run without; name the weights of the stage before this one",
}


def load_trained(model: nn.Module | Mapping[str, Tensor], path: Path, allow_missing: Collection[str] = ()) -> set[str]:
    """Copy the trained weights of an earlier stage into a model.

    Projections, norms and, where the model has it, LoRA must all be there; other weights (the Q-Former that the first
    release had trained) are taken where they are.

    Args:
        model: the model, or its parameters by canonical name.
        path: anything that `open_any` opens.
        allow_missing: of `PARTS`, those that the file may be without; they keep the values that they have.

    Returns:
        The canonical names that were loaded.

    Raises:
        WeightsError: a key is missing, unknown or of another shape, or LoRA does not fit the model's.
    """
    source = fitting_source(model, path, allow_missing)
    copy_weights(_parameters(model), source.weights)
    return set(source.weights)


def fitting_source(model: nn.Module | Mapping[str, Tensor], path: Path, allow_missing: Collection[str] = ()) -> Source:
    """The weights that `load_trained` would load, checked against the model but not read yet."""
    opened = open_any(Path(path))
    source = whole_source(opened, init_from_of(opened))
    check_fit(model, opened, source, allow_missing)
    return source


def check_fit(
    model: nn.Module | Mapping[str, Tensor], opened: Opened, source: Source, allow_missing: Collection[str] = ()
) -> None:
    """See that trained weights are those of this model; arguments and errors as of `load_trained`."""
    config = getattr(model, "config", None)
    if config is not None and config.lora_r:
        _check_lora_scale(config, opened)
    _check_trained({name: tuple(target.shape) for name, target in _parameters(model).items()}, source, allow_missing)


def trained_source(opened: Opened) -> Source:
    """Trained weights under canonical names.

    Raises:
        WeightsError: the file holds something else, or a model whose LoRA is merged into its base.
    """
    if opened.kind not in ("trained", "projection", "model"):
        place = {"phi": "phi", "eva_vit": "eva_vit", "blip2": "qformer"}[opened.kind]
        raise WeightsError(
            f"{opened.path} is a base model ({KINDS[opened.kind]}), not what TinyGPT-V has trained; its place is "
            f"model.{place}"
        )
    source = original_source(opened.stored, opened.path)
    if opened.kind != "model":
        return Source(opened.path, source.weights, [*source.ignored, *opened.ignored])
    if opened.notes.get("lora") == "merged":
        raise WeightsError(
            f"{opened.path} is an exported model with LoRA merged into its base, from which a stage cannot go on; name "
            "the run that it comes from, or export it with --to adapter or --keep-lora"
        )
    adjacent = set(opened.notes.get("frozen_updates", ()))
    wanted = {name for name in source.weights if learnt(name) or name in adjacent}
    base = sorted(source.weights.keys() - wanted)
    return Source(opened.path, {n: t for n, t in source.weights.items() if n in wanted}, base)


def whole_source(opened: Opened, init_from: str | None) -> Source:
    """As `trained_source`, and for a checkpoint what `init_from` held besides: still part of the model.

    Args:
        opened: where the weights lie.
        init_from: what the stage began from, by its recipe.

    Raises:
        WeightsError: as of `trained_source`, or `init_from` is no longer there.
    """
    source = trained_source(opened)
    if not opened.of_one_stage or init_from is None:
        return source
    try:
        before = open_any(Path(init_from))
        carried = whole_source(before, init_from_of(before))
    except WeightsError as error:
        raise WeightsError(
            f"{opened.path} began from {init_from}, which may hold more than this stage trains: {error}. Put it back, "
            "or say where it is with --set model.init_from=PATH (null if it was without a Q-Former)"
        ) from None
    added = {name: stored for name, stored in carried.weights.items() if name not in source.weights}
    return Source(source.path, added | source.weights, source.ignored)


def adjacent_recipe(opened: Opened, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe of the run that a checkpoint lies in, with `overrides` as of `--set`; None where there is none.

    Raises:
        ConfigError: recipe.yaml is damaged.
    """
    if not opened.of_one_stage or opened.folder is None or not (opened.folder / RECIPE).is_file():
        return None
    return load_recipe(opened.folder / RECIPE, overrides)


def init_from_of(opened: Opened) -> str | None:
    """What the stage of a checkpoint began from, by the recipe next to it."""
    recipe = adjacent_recipe(opened)
    return None if recipe is None else recipe.model.init_from


def frozen_updates(source: Source) -> list[str]:
    """What trained weights hold of the parts that come from the base models otherwise: they replace theirs."""
    return [name for name in source.weights if not learnt(name)]


def lora_rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """LoRA's rank from the shapes of its A matrices; 0 without any."""
    return max((shape[0] for name, shape in shapes.items() if ".lora_A." in name), default=0)


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else model


def _check_trained(shapes: Mapping[str, tuple[int, ...]], source: Source, allow_missing: Collection[str]) -> None:
    given = source.weights.keys()
    _check_lora_rank(shapes, source)
    required: set[str] = set()
    for part, belongs in PARTS.items():
        wanted = set(filter(belongs, shapes))
        if wanted and not any(map(belongs, given)):
            if part not in allow_missing:
                raise WeightsError(_without(part, source))
            LOGGER.info("%s holds no %s, which starts afresh", source.path, part)
            continue
        required |= wanted
    check_weights(
        {name: shape for name, shape in shapes.items() if name in required or name in given},
        source,
        _likely_cause(source, shapes),
    )


def _without(part: str, source: Source) -> str:
    if source.weights.keys() <= {"llama_proj.weight", "llama_proj.bias"}:
        told = "llama_proj alone, as MiniGPT-4's files do: a start for stage 1, in which all else starts afresh"
        return f"{source.path} holds {told} (--set 'model.allow_missing=[llama_proj2, norms, lora]')"
    return (
        f"{source.path} holds no {_ABSENT[part]}, or let that part start from its initial values with "
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
    """Why these weights may not fit, by the names that do not."""
    unknown = [name for name in source.weights if name not in shapes]
    first = source.weights.get("llama_proj.weight")
    if any(".lora_magnitude" in name for name in unknown):
        return "The LoRA is of the kind DoRA, which the model has not"
    if any(f".{letter}_proj.lora_" in name for name in unknown for letter in "qkv"):
        return (
            "LoRA was trained on split q/k/v projections, each with an A of its own; TinyGPT-V has one on the fused "
            "query_key_value. Merge it into that model's weights instead"
        )
    if first is not None and first.shape[0] == 5120 != shapes.get("llama_proj.weight", (0,))[0]:
        return "This is the projection of MiniGPT-4's 13B model; take that of Vicuna-7B, which is 4096 wide"
    return (
        "Trained weights go with the Phi, Q-Former, proj_hidden_size and lora_targets that they were trained with: "
        "point model.* at the same ones, or init_from at another run"
    )


def _check_lora_scale(config: TinyGPTVConfig, opened: Opened) -> None:
    """Weights trained under another alpha would be applied with another strength."""
    trained = _trained_alpha(opened)
    if trained is not None and trained != config.lora_alpha:
        raise WeightsError(
            f"{opened.path} was trained with lora_alpha {trained}, the model has {config.lora_alpha}; "
            f"set model.lora_alpha={trained}"
        )


def _trained_alpha(opened: Opened) -> float | None:
    """The alpha that a run's own files note; the original's checkpoints do not tell it reliably."""
    if opened.folder is not None and (opened.folder / "config.json").is_file():
        config = read_json(opened.folder / "config.json")
        return config.get("lora_alpha") if config.get("lora_r") else None
    recipe = adjacent_recipe(opened)
    return recipe.model.lora_alpha if recipe is not None and recipe.model.lora_r else None
