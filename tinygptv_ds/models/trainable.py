"""What a stage trains, by name, and AdamW's parameter groups."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from tinygptv_ds.errors import ConfigError

Part = Callable[[str], bool]

_NORM_WEIGHTS = re.compile(
    r"language_model\.model\.(layers\.\d+\.(self_attn\.(q|k)_layernorm|input_layernorm|post_layernorm)"
    r"|final_layernorm)\.weight"
)


def vision(name: str) -> bool:
    """What looks at a picture before the projections: ViT, its norm, query tokens and Q-Former. No stage trains it."""
    return name.startswith(("visual_encoder.", "ln_vision.", "query_tokens", "qformer."))


def projections(name: str) -> bool:
    """The two linear layers between Q-Former and Phi."""
    return name.startswith(("llama_proj.", "llama_proj2."))


def norms(name: str) -> bool:
    """The weights, not the biases, of all of Phi's norms, as in the original."""
    return _NORM_WEIGHTS.fullmatch(name) is not None


def lora(name: str) -> bool:
    """LoRA's A and B."""
    return ".lora_A." in name or ".lora_B." in name


def learnt(name: str) -> bool:
    """All that the published stages train: projections, norm weights and LoRA."""
    return projections(name) or norms(name) or lora(name)


def train_only(model: nn.Module, *parts: Part) -> list[str]:
    """Freeze everything but the parts given; returns the trained names in model order.

    Raises:
        ConfigError: a part matches nothing (LoRA asked for in a model with `lora_r: 0`).
    """
    matched = dict.fromkeys(parts, False)
    trained = []
    for name, parameter in model.named_parameters():
        hits = [part for part in parts if part(name)]
        parameter.requires_grad_(bool(hits))
        matched.update(dict.fromkeys(hits, True))
        if hits:
            trained.append(name)
    empty = [part.__name__ for part, hit in matched.items() if not hit]
    if empty:
        raise ConfigError(
            f"this stage trains {', '.join(empty)}, of which the model has none; for lora set model.lora_r above 0"
        )
    return trained


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups of trained parameters, split as the original does.

    No decay for tensors of fewer than two dimensions or whose name contains "bias", "ln" or "bn".
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            plain = plain or any(part in name for part in ("bias", "ln", "bn"))
            (no_decay if plain else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
