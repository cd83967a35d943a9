"""The parts of the model that a recipe may name, for what is trained and at which learning rate."""

from __future__ import annotations

from collections.abc import Iterable

from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import require, shown

PARTS = {
    "projections": "the two linear layers between Q-Former and Phi",
    "norms": "the weights of Phi's norms",
    "lora": "LoRA's A and B",
    "qformer": "the Q-Former and its query tokens",
    "vit": "the ViT and the norm after it",
    "llm": "all of Phi but LoRA",
}


def check_parts(where: str, parts: Iterable[str]) -> None:
    """Check names of parts of the model; `where` is the key for the message."""
    for part in parts:
        require(part in PARTS, f"{where}: {shown(part)} is no part of the model{nearest(str(part), PARTS)}")
