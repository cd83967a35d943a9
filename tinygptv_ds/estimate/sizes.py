"""How large the parts of a recipe's model are, from its configuration alone. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinygptv_ds.config.recipe import PARTS, Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.flops import phi_linears

PUBLISHED_PARTS = {1: ("projections", "norms"), 2: ("projections", "norms", "lora")}


@dataclass(frozen=True)
class Transformer:
    """Width, MLP width and number of blocks of one of the model's three transformers."""

    width: int
    mlp: int
    layers: int


@dataclass(frozen=True)
class Sizes:
    """The sizes that parameters, operations and memory follow from; the defaults are the published ones.

    Attributes:
        vit: EVA ViT-g.
        qformer: the Q-Former; it looks at the image in every second block.
        phi: Phi-2.
        image_size: pixels.
        patch: pixels.
        queries: rows of an image in the sequence.
        proj_hidden: width between the projections.
        head_dim: of Phi.
        vocabulary: of Phi.
        lora_r: LoRA's rank.
        lora_targets: layers that have it.
    """

    vit: Transformer = Transformer(1408, 6144, 39)
    qformer: Transformer = Transformer(768, 3072, 12)
    phi: Transformer = Transformer(2560, 10240, 32)
    image_size: int = 224
    patch: int = 14
    queries: int = 32
    proj_hidden: int = 4096
    head_dim: int = 80
    vocabulary: int = 51200
    lora_r: int = 0
    lora_targets: tuple[str, ...] = ("query_key_value", "dense")

    @property
    def patches(self) -> int:
        """Rows of an image in the ViT, the class token included."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def crossings(self) -> int:
        """Blocks of the Q-Former that look at the image."""
        return -(-self.qformer.layers // 2)

    @property
    def phi_linears(self) -> dict[str, tuple[int, int]]:
        """Widths in and out of the linear layers of one of Phi's blocks."""
        return phi_linears(self.phi.width, self.phi.mlp)

    def as_config(self) -> SimpleNamespace:
        """The vision path's sizes under the names of a `TinyGPTVConfig`."""
        vit, qformer = self.vit, self.qformer
        return SimpleNamespace(
            vision_config=SimpleNamespace(
                image_size=self.image_size,
                patch_size=self.patch,
                hidden_size=vit.width,
                intermediate_size=vit.mlp,
                num_hidden_layers=vit.layers,
            ),
            qformer_config=SimpleNamespace(
                hidden_size=qformer.width,
                intermediate_size=qformer.mlp,
                num_hidden_layers=qformer.layers,
                encoder_hidden_size=vit.width,
                cross_attention_frequency=2,
            ),
            num_query_tokens=self.queries,
        )


def sizes_of(recipe: Recipe) -> tuple[Sizes, str]:
    """The sizes of a recipe's model, and a sentence that says where they come from.

    Raises:
        ConfigError: Phi's config.json is there and cannot be read.
    """
    model = recipe.model
    base = Sizes()
    sizes = replace(
        base,
        vit=replace(base.vit, layers=model.eva_vit_depth),
        image_size=model.image_size,
        proj_hidden=model.proj_hidden_size,
        lora_r=model.lora_r,
        lora_targets=tuple(model.lora_targets),
    )
    path = Path(model.phi) / "config.json"
    if not path.is_file():
        return sizes, f"published sizes of Phi-2, ViT and Q-Former ({path} is not there)"
    phi = _read(path)
    try:
        width, heads = phi["hidden_size"], phi["num_attention_heads"]
        sizes = replace(
            sizes,
            phi=Transformer(width, phi["intermediate_size"], phi["num_hidden_layers"]),
            head_dim=width // heads,
            vocabulary=phi["vocab_size"],
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} does not tell Phi's sizes: {error}") from None
    return sizes, f"sizes of Phi from {path}, published sizes of ViT and Q-Former"


def trained_parts(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe trains, by the names of `config.schema.PARTS`."""
    if recipe.model.train is not None:
        chosen = set(recipe.model.train) | ({"norms"} if "llm" in recipe.model.train else set())
        return tuple(part for part in PARTS if part in chosen)
    parts = PUBLISHED_PARTS.get(recipe.stage, PUBLISHED_PARTS[2])
    return (*parts, "lora") if recipe.stage == 1 and recipe.model.lora_r else parts


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
