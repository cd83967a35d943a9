"""The weights that a fine-tuning starts from: what they are, and the sections of a recipe that continue them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.resources import project_root
from tinygptv_ds.weights.recipe_files import HOW_TO_GET_WEIGHTS

if TYPE_CHECKING:
    from tinygptv_ds.weights.detect import Opened

_PARTS = {
    "phi": ("Phi", ("phi-2", "phi")),
    "eva_vit": ("EVA ViT", ("eva_vit_g.pth",)),
    "qformer": ("Q-Former of BLIP-2", ("blip2_pretrained_flant5xxl.pth",)),
}
_KINDS = {"phi": "phi", "eva_vit": "eva_vit", "qformer": "blip2"}  # of weights/detect.py


@dataclass(frozen=True)
class Start:
    """What a fine-tuning continues.

    Attributes:
        path: the weights, as given.
        stage: the stage that trained them, 3 or 4; earlier ones count as 4, whose template they learn.
        model: the model section that builds on them.
        text: the template and limits that they were trained with.
        width: Phi's width.
        queries: tokens of an image.
        template: the weights' own template, which may be another than that of `text`.
        base: base weights that the verbs need as options, as `model.KEY=PATH`; empty where the weights name them.
        recipe: the recipe that the verbs need to open the weights, or None.
        whole: whether it is an exported model, which holds everything.
        dtype: of the weights, if all are alike: "fp32", "bf16" or "fp16".
        what: a phrase that describes it.
    """

    path: Path
    stage: int
    model: ModelSection
    text: TextSection
    width: int
    queries: int
    template: str | None
    base: tuple[str, ...]
    recipe: Path | None
    whole: bool
    dtype: str
    what: str


def open_start(path: Path, base: Path | None, recipe: Path | None) -> Start:
    """Find out what the weights are, and check every name and shape of them and of their base weights.

    Args:
        path: an exported folder, a run, a checkpoint, an adapter or a file of the original's.
        base: folder of the base weights; None: those that the weights name, then `weights/`, then the folder of `path`.
        recipe: the recipe that trained them, for files that do not show their stage.

    Raises:
        WeightsError: they are not whole, not TinyGPT-V's, or base weights are missing.
        ConfigError: `recipe` cannot be read, or is of another stage.
    """
    from tinygptv_ds.weights.detect import open_any
    from tinygptv_ds.weights.kinds import KINDS

    try:
        opened = open_any(path)
    except WeightsError as error:
        raise WeightsError(f"--from {error}") from None
    if opened.kind not in ("trained", "model"):
        raise WeightsError(
            f"--from {path}: {KINDS[opened.kind]} alone, from which no fine-tuning can start. Name trained weights of "
            "TinyGPT-V: a released .pth (hf download Tyrannosaurus/TinyGPT-V), a run, or an exported folder"
            + (f"; the place of {path} is --base" if opened.kind in _KINDS.values() else "")
        )
    return _exported(path, opened) if opened.kind == "model" else _trained(path, opened, base, recipe)


def _exported(path: Path, opened: Opened) -> Start:
    """Build on an exported folder alone: it includes the base models."""
    from tinygptv_ds.models.configuration import TinyGPTVConfig
    from tinygptv_ds.weights.trained import trained_source

    trained_source(opened, merged_in_base=True)  # refuses a folder without its LoRA
    config = TinyGPTVConfig.from_pretrained(path)
    noted = opened.notes.get("recipe")
    noted = noted if isinstance(noted, dict) else {}
    merged = config.lora_r == 0
    lora = noted.get("model", {}) if merged else {}  # a new one has the rank of the one before
    place = str(path)
    model = ModelSection(
        phi=place,
        eva_vit=place,
        qformer=place,
        init_from=place,
        allow_missing=["lora"] if merged else [],
        image_size=config.vision_config.image_size,
        eva_vit_depth=config.vision_config.num_hidden_layers,
        eva_vit_heads=config.vision_config.num_attention_heads,
        qformer_heads=config.qformer_config.num_attention_heads,
        proj_hidden_size=config.proj_hidden_size,
        lora_r=config.lora_r or lora.get("lora_r") or 64,
        lora_alpha=lora.get("lora_alpha") or config.lora_alpha,
        lora_targets=list(config.lora_targets),
    )
    text = _noted_text(noted) or load_recipe(project_root() / "stages/stage4.yaml").text
    text = dataclasses.replace(
        text, prompts=None, prompt_per="sample", prompt_template=config.prompt_template, end_sym=config.end_sym
    )
    dtypes = {str(stored.dtype).removeprefix("torch.") for stored in opened.stored.values()}
    short = {"float32": "fp32", "float16": "fp16"}.get(dtypes.pop() if len(dtypes) == 1 else "", "bf16")
    stage = opened.notes.get("stage")
    return Start(
        path=path,
        stage=stage if stage in (3, 4) else 4,
        model=model,
        text=text,
        width=config.text_config.hidden_size,
        queries=config.num_query_tokens,
        template=config.prompt_template,
        base=(),
        recipe=None,
        whole=True,
        dtype=short,
        what="an exported model, " + ("LoRA merged: a new one is trained" if merged else "whose LoRA is continued"),
    )


def _noted_text(noted: dict[str, Any]) -> TextSection | None:
    """Return the text section of the recipe in an export's notes, which may be of another version."""
    fields = {field.name for field in dataclasses.fields(TextSection)}
    text = noted.get("text")
    return TextSection(**{key: text[key] for key in text if key in fields}) if isinstance(text, dict) else None


def _trained(path: Path, opened: Opened, base: Path | None, recipe: Path | None) -> Start:
    """Build on trained weights that need separate base weights."""
    from tinygptv_ds.weights.resolve import resolve

    changes = tuple(f"model.{part}={place}" for part, place in _base_weights(path, opened, base).items())
    resolved = resolve(path, recipe, changes)
    found = resolved.recipe
    # A checkpoint of a run continues what its run started from; the others hold all that was trained.
    has_lora = found.model.lora_r > 0 and any(".lora_A." in name for name in resolved.trained.weights)
    stage = found.stage if found.stage in (3, 4) else 4
    published = load_recipe(project_root() / f"stages/stage{stage}.yaml")
    model = dataclasses.replace(
        found.model,
        init_from=str(path),
        allow_missing=[] if has_lora else ["lora"],
        train=None,
        lora_r=found.model.lora_r or published.model.lora_r,
        lora_alpha=found.model.lora_alpha if has_lora else published.model.lora_alpha,
        gradient_checkpointing=False,
    )
    text = found.text if found.text.prompt_template is not None else published.text
    return Start(
        path=path,
        stage=stage,
        model=model,
        text=dataclasses.replace(text, prompts=None),
        width=resolved.config.text_config.hidden_size,
        queries=resolved.config.num_query_tokens,
        template=found.text.prompt_template,
        base=changes,
        recipe=recipe,
        whole=False,
        dtype="bf16",
        what=f"{opened.container}, stage {found.stage}, "
        + ("whose LoRA is continued" if has_lora else "without LoRA: a new one is trained"),
    )


def _base_weights(path: Path, opened: Opened, base: Path | None) -> dict[str, Path]:
    """Return the base weights that are found in a folder, by part; empty where the weights themselves name theirs.

    Raises:
        WeightsError: some are in no folder that was searched.
    """
    noted = opened.notes.get("base") or {}
    named = {part: Path(note["path"]) for part, note in noted.items() if isinstance(note, dict) and "path" in note}
    if base is None and named.keys() == _PARTS.keys() and all(place.exists() for place in named.values()):
        return {}
    if base is None and opened.of_one_stage:
        return {}  # its run's recipe names them
    if base is not None and not base.is_dir():
        raise WeightsError(f"--base {base}: no such folder; it holds Phi-2, eva_vit_g.pth and BLIP-2's file")
    searched = [base] if base is not None else [Path("weights"), path.resolve().parent]
    found: dict[str, Path] = {}
    for folder in searched:
        found = _parts_in(folder) | found
    missing = [part for part in _PARTS if part not in found]
    if missing:
        lines = [f"  - {_PARTS[part][0]}: {HOW_TO_GET_WEIGHTS[part]}" for part in missing]
        places = ", ".join(str(folder) for folder in searched)
        raise WeightsError(
            f"--from {path} needs base weights, of which {len(missing)} are not in {places}:\n"
            + "\n".join(lines)
            + "\nPut them into one folder and name it with --base"
        )
    return {part: found[part] for part in _PARTS}


def _parts_in(folder: Path) -> dict[str, Path]:
    """Return what a folder holds of the base weights: by the usual names, then by content."""
    found: dict[str, Path] = {}
    for part, (_, names) in _PARTS.items():
        there = [folder / name for name in names if (folder / name).exists()]
        if there:
            found[part] = there[0]
    if len(found) == len(_PARTS) or not folder.is_dir():
        return found
    for place in sorted(folder.iterdir()):
        kind = _part_of(place) if place not in found.values() else None
        if kind is not None:
            found.setdefault(kind, place)
    if "phi" not in found and _part_of(folder) == "phi":
        found["phi"] = folder
    return found


def _part_of(place: Path) -> str | None:
    """Return the part that a file or folder is, or None."""
    from tinygptv_ds.weights.detect import open_any

    readable = (place / "config.json").is_file() or place.suffix in (".pth", ".pt", ".safetensors", ".bin")
    if not readable:
        return None
    try:
        kind = open_any(place).kind
    except WeightsError:
        return None
    return next((part for part, of in _KINDS.items() if of == kind), None)
