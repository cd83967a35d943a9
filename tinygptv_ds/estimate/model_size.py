"""A recipe's model: its configuration, what of it is trained, and its parameters on torch's meta device.

torch is imported inside the functions that need it: errors in a recipe are reported before that takes its seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygptv_ds.config.parts import PARTS
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.parameters import part_of, quantizable

if TYPE_CHECKING:
    from tinygptv_ds.models.configuration import TinyGPTVConfig

PUBLISHED_PARTS = {1: ("projections", "norms"), 2: ("projections", "norms", "lora")}
_PHI_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# For the order of the forward pass. A parameter of several parts counts for the first of `PARTS`: norms, not llm.
FORWARD_ORDER = ("vit", "qformer", "projections", "llm", "norms", "lora")

# Bytes of a quantized weight with its share of the scales, left out for fp8 (4 bytes for each row of over
# a thousand); see models/quantized_linear.py and models/fp8_linear.py.
BYTES_PER_WEIGHT = {"4 bit": 1 / 2 + 1 / 64 + 4 / (64 * 256), "8 bit": 1 + 4 / 256, "fp8": 1.0}


@dataclass(frozen=True)
class QuantizedWeights:
    """Frozen weights that are kept in fewer than 16 bit.

    Attributes:
        counts: number of weights by their form, a key of `BYTES_PER_WEIGHT`.
        largest: number of weights of the largest layer, which is restored to 16 bit where it is used.
    """

    counts: Mapping[str, int]
    largest: int

    @property
    def count(self) -> int:
        """Return the number of weights."""
        return sum(self.counts.values())

    @property
    def stored(self) -> float:
        """Return the bytes that they take."""
        return sum(BYTES_PER_WEIGHT[form] * count for form, count in self.counts.items())


def trained_parts(recipe: Recipe) -> tuple[str, ...]:
    """Return what a recipe trains, by the names of `config.parts.PARTS`."""
    if recipe.model.train is not None:
        chosen = set(recipe.model.train) | ({"norms"} if "llm" in recipe.model.train else set())
        return tuple(part for part in PARTS if part in chosen)
    parts = PUBLISHED_PARTS.get(recipe.stage, PUBLISHED_PARTS[2])
    return (*parts, "lora") if recipe.stage == 1 and recipe.model.lora_r else parts


def phi_sizes(recipe: Recipe) -> tuple[dict[str, int], str]:
    """Return the sizes in Phi's config.json, empty where there is no such file, and a phrase that names the source.

    Raises:
        ConfigError: the file is there and cannot be read, or lacks a size.
    """
    path = Path(recipe.model.phi) / "config.json"
    if not path.is_file():
        return {}, f"published sizes of Phi-2, ViT and Q-Former ({path} does not exist)"
    phi = _read_json(path)
    phi = phi.get("text_config", phi) if isinstance(phi, dict) else phi  # of an exported model
    missing = [name for name in _PHI_SIZES if not _is_size(phi, name)]
    if missing:
        raise ConfigError(
            f"{path}: {', '.join(missing)} must be given as positive whole numbers; fetch Phi's config.json again"
        )
    return {name: phi[name] for name in _PHI_SIZES}, f"sizes of Phi from {path}, published sizes of ViT and Q-Former"


def model_configuration(recipe: Recipe, phi: Mapping[str, int]) -> TinyGPTVConfig:
    """Return the model's configuration: published sizes, changed by the recipe and by Phi's sizes. Imports torch.

    Args:
        recipe: the recipe.
        phi: see `phi_sizes`.
    """
    from tinygptv_ds.models.configuration import PHI_2, TinyGPTVConfig

    model = recipe.model
    return TinyGPTVConfig(
        vision_config={"image_size": model.image_size, "num_hidden_layers": model.eva_vit_depth},
        text_config=PHI_2 | dict(phi),
        proj_hidden_size=model.proj_hidden_size,
        lora_r=model.lora_r,
        lora_targets=tuple(model.lora_targets),
    )


def parameter_shapes(config: TinyGPTVConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its canonical name, from the model on the meta device. Imports torch."""
    import torch

    from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def parameter_counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of parameters by part, in the order of the forward pass; `llm` is counted without `norms`."""
    counts = dict.fromkeys(FORWARD_ORDER, 0)
    for name, shape in shapes.items():
        part = part_of(name)
        if part is None:
            raise KeyError(f"{name} belongs to no part of the model")
        counts[part] += math.prod(shape)
    return counts


def quantized_weights(
    shapes: Mapping[str, tuple[int, ...]], bits: int | None, *, vision: bool, fp8: str | None = None
) -> QuantizedWeights | None:
    """Return what is kept in fewer than 16 bit, None where nothing is.

    Args:
        shapes: of all parameters by name.
        bits: `model.frozen_bits`.
        vision: `model.quantize_vision`.
        fp8: `model.fp8`.
    """
    sizes: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        if bits is not None and quantizable(name, vision=vision):
            sizes.setdefault(f"{bits} bit", []).append(math.prod(shape))
        elif fp8 is not None and quantizable(name, vision=True, phi=fp8 == "all"):
            sizes.setdefault("fp8", []).append(math.prod(shape))
    if not sizes:
        return None
    return QuantizedWeights({form: sum(each) for form, each in sizes.items()}, max(map(max, sizes.values())))


def trained_names(shapes: Mapping[str, tuple[int, ...]], trained: Collection[str]) -> list[str]:
    """Return the canonical names of the parameters of these parts."""
    return [name for name in shapes if part_of(name) in trained]


def _is_size(phi: Any, name: str) -> bool:
    value = phi.get(name) if isinstance(phi, dict) else None
    return type(value) is int and value > 0  # a bool is no size


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
