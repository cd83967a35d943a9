"""Which parameters a stage trains, by name, and AdamW's parameter groups. No torch."""

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
_PHI_LINEAR = re.compile(
    r"language_model\.model\.layers\.\d+\.(self_attn\.(query_key_value|dense)|mlp\.fc[12])\.weight"
)
_VIT_LINEAR = re.compile(r"visual_encoder\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight")


def vision(name: str) -> bool:
    """Return whether a parameter comes before the projections: ViT, its norm, query tokens, Q-Former."""
    return vit(name) or qformer(name)


def projections(name: str) -> bool:
    """Return whether a parameter is of the two linear layers between Q-Former and Phi."""
    return name.startswith(("llama_proj.", "llama_proj2."))


def norms(name: str) -> bool:
    """Return whether a parameter is the weight, not the bias, of one of Phi's norms, as the original trains them."""
    return _NORM_WEIGHTS.fullmatch(name) is not None


def needs_images(name: str) -> bool:
    """Return whether a parameter has a gradient only where there are images: all that comes before Phi."""
    return vision(name) or projections(name)


def lora(name: str) -> bool:
    """Return whether a parameter is LoRA's A or B."""
    return ".lora_A." in name or ".lora_B." in name


def qformer(name: str) -> bool:
    """Return whether a parameter is of the Q-Former or its query tokens."""
    return name.startswith(("qformer.", "query_tokens"))


def vit(name: str) -> bool:
    """Return whether a parameter is of the ViT or the norm after it."""
    return name.startswith(("visual_encoder.", "ln_vision."))


def llm(name: str) -> bool:
    """Return whether a parameter is of Phi, its norms included, but not of LoRA."""
    return name.startswith("language_model.") and not lora(name)


def quantizable(name: str, *, vision: bool, phi: bool = True) -> bool:
    """Return whether a parameter is the weight of a linear layer in a block of Phi, or with `vision` of the ViT.

    These are what `model.frozen_bits`, `model.fp8` and inference in 8 or 4 bit quantize; without `phi` the ViT's alone.
    """
    of_phi = phi and _PHI_LINEAR.fullmatch(name) is not None
    return of_phi or (vision and _VIT_LINEAR.fullmatch(name) is not None)


# By their names in a recipe; a parameter of several parts counts for the first.
PARTS: dict[str, Part] = {
    "projections": projections,
    "norms": norms,
    "lora": lora,
    "qformer": qformer,
    "vit": vit,
    "llm": llm,
}


def part_of(name: str) -> str | None:
    """Return the first of `PARTS` that a parameter belongs to, None for one that is not the model's."""
    return next((part for part, belongs in PARTS.items() if belongs(name)), None)


def always_fp32(name: str) -> bool:
    """Return whether a parameter is kept in fp32 even where it is frozen: trained ones of the stages, norms' biases."""
    # Weight and bias of a norm must have one dtype.
    return is_trainable(name) or norms(re.sub(r"\.bias$", ".weight", name))


def is_trainable(name: str) -> bool:
    """Return whether the published stages train a parameter: projections, norm weights and LoRA."""
    return projections(name) or norms(name) or lora(name)


def train_only(model: nn.Module, *parts: Part, override: Sequence[str] | None = None) -> list[str]:
    """Freeze all parameters but those of the given parts; return the trained names in model order.

    Args:
        model: the model.
        parts: the parts that the published stage trains.
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
    """Copy the parameters that the published stages train and this run does not: its result contains them, too."""
    frozen = ((name, p) for name, p in model.named_parameters() if is_trainable(name) and not p.requires_grad)
    return {name: p.detach().clone() for name, p in frozen}


def decays(name: str, dimensions: int) -> bool:
    """Return whether a parameter has weight decay.

    As in the original, tensors of fewer than two dimensions, or with "bias", "ln" or "bn" in the name, have none.
    """
    return dimensions >= 2 and not any(part in name for part in ("bias", "ln", "bn"))


def weight_decay_groups(
    model: nn.Module, weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict]:
    """Return AdamW's parameter groups: for each learning-rate factor with and without weight decay, of Phi and before.

    Args:
        model: the model.
        weight_decay: the value for those that have it.
        lr_scale: learning-rate factors by name of `PARTS`, 1 where none is given.

    Returns:
        the groups, those of Phi first; besides torch's keys each has its factor as `lr_scale`, and `needs_images`,
        whether only images give it a gradient.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = not decays(name, len(getattr(parameter, "ds_shape", parameter.shape)))
            groups.setdefault((needs_images(name), -_scale(name, lr_scale), plain), []).append(parameter)
    return [
        {
            "params": groups[of_images, scale, plain],
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": -scale,
            "needs_images": of_images,
        }
        for of_images, scale, plain in sorted(groups)
    ]


def _scale(name: str, lr_scale: Mapping[str, float] | None) -> float:
    part = part_of(name)
    return 1.0 if lr_scale is None or part is None else float(lr_scale.get(part, 1.0))
