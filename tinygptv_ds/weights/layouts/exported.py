"""An exported model in the place of a base model: its Phi, its ViT or its Q-Former, out of the folder of all weights.

A recipe may thus name the same exported folder as `model.phi`, `model.eva_vit` and `model.qformer`, so that a model
can be fine-tuned from its folder alone, without the files that it was once assembled from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tinygptv_ds.models.parameters import lora
from tinygptv_ds.weights.io import Stored

_PARTS = ("language_model.", "visual_encoder.", "qformer.")


def is_exported(names: Iterable[str]) -> bool:
    """Return whether these are the canonical names of a whole model."""
    found = {prefix for name in names for prefix in _PARTS if name.startswith(prefix)}
    return len(found) == len(_PARTS)


def part_of_exported(stored: Mapping[str, Stored], prefix: str) -> Mapping[str, Stored]:
    """Return one part of an exported model under the names that its own files have; other weights as they are.

    LoRA is left out: it belongs to the trained weights, which `model.init_from` takes from the same folder.

    Args:
        stored: the tensors of a file or folder.
        prefix: what the part's names begin with in a whole model: "language_model." or "visual_encoder.".
    """
    if not is_exported(stored):
        return stored
    return {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix) and not lora(name)}


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an exported model's config.json says of its Phi; another configuration as it is."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
