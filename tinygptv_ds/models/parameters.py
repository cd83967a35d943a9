"""What a stage trains, by name, and AdamW's parameter groups. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tinygptv_ds.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Part = Callable[[str], bool]

_NORM_WEIGHTS = re.compile(
    r"language_model\.model\.(layers\.\d+\.(self_attn\.(q|k)_layernorm|input_layernorm|post_layernorm)"
    r"|final_layernorm)\.weight"
)


def vision(name: str) -> bool:
    """What looks at an image before the projections: ViT, its norm, query tokens and Q-Former."""
    return vit(name) or qformer(name)


def projections(name: str) -> bool:
    """The two linear layers between Q-Former and Phi."""
    return name.startswith(("llama_proj.", "llama_proj2."))


def norms(name: str) -> bool:
    """The weights, not the biases, of all of Phi's norms, as in the original."""
    return _NORM_WEIGHTS.fullmatch(name) is not None


def lora(name: str) -> bool:
    """LoRA's A and B."""
    return ".lora_A." in name or ".lora_B." in name


def qformer(name: str) -> bool:
    """The Q-Former and its query tokens."""
    return name.startswith(("qformer.", "query_tokens"))


def vit(name: str) -> bool:
    """The ViT and the norm after it."""
    return name.startswith(("visual_encoder.", "ln_vision."))


def llm(name: str) -> bool:
    """All of Phi, its norms included, but LoRA."""
    return name.startswith("language_model.") and not lora(name)


# By their names in a recipe; where a parameter is of several, the first counts.
PARTS: dict[str, Part] = {
    "projections": projections,
    "norms": norms,
    "lora": lora,
    "qformer": qformer,
    "vit": vit,
    "llm": llm,
}


def part_of(name: str) -> str | None:
    """The first of `PARTS` that a parameter belongs to; None: it is none of the model's."""
    return next((part for part, belongs in PARTS.items() if belongs(name)), None)


def always_fp32(name: str) -> bool:
    """What lies in fp32 whether it is trained or not: what the published stages train, and these norms' biases."""
    return is_trainable(name) or norms(re.sub(r"\.bias$", ".weight", name))  # a norm's two have to be of one dtype


def is_trainable(name: str) -> bool:
    """All that the published stages train: projections, norm weights and LoRA."""
    return projections(name) or norms(name) or lora(name)


def train_only(model: nn.Module, *parts: Part, override: Sequence[str] | None = None) -> list[str]:
    """Freeze everything but the parts given; returns the trained names in model order.

    Args:
        model: the model.
        parts: what the stage trains as published.
        override: names of `PARTS` to train instead, from a recipe's `model.train`.

    Raises:
        ConfigError: a part matches nothing (LoRA asked for in a model with `lora_r: 0`).
    """
    if override is not None:
        parts = tuple(PARTS[name] for name in override)
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


def frozen_trainables(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what the published stages train and this run does not: part of its result all the same."""
    frozen = ((name, p) for name, p in model.named_parameters() if is_trainable(name) and not p.requires_grad)
    return {name: p.detach().clone() for name, p in frozen}


def decays(name: str, dimensions: int) -> bool:
    """Whether a parameter has weight decay.

    Without are, as in the original, tensors of fewer than two dimensions or whose name contains "bias", "ln" or "bn".
    """
    return dimensions >= 2 and not any(part in name for part in ("bias", "ln", "bn"))


def weight_decay_groups(
    model: nn.Module, weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict]:
    """AdamW's groups of trained parameters: for each factor on the rate those with weight decay and those without.

    Args:
        model: the model.
        weight_decay: of those that have it.
        lr_scale: factors by name of `PARTS`; 1 where none is given. Each group notes its own as `lr_scale`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = not decays(name, len(getattr(parameter, "ds_shape", parameter.shape)))
            groups.setdefault((_scale(name, lr_scale), plain), []).append(parameter)
    return [
        {"params": groups[scale, plain], "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale}
        for scale, plain in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def _scale(name: str, lr_scale: Mapping[str, float] | None) -> float:
    return 1.0 if lr_scale is None else float(lr_scale.get(part_of(name), 1.0))
