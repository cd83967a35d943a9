"""Everything that the outputs of a frozen vision path depend on, in a form that can be written down and compared."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.models.parameters import vision
from tinygptv_ds.models.tinygptv import IMAGE_MEAN, IMAGE_STD, TinyGPTVForConditionalGeneration


def vision_facts(model: TinyGPTVForConditionalGeneration, precision: str) -> dict[str, Any]:
    """Sizes, transform, precision and the hash of the weights as they are used, plain values all.

    Args:
        model: with its vision path in memory, in the dtype that it computes in; not yet under DeepSpeed.
        precision: "fp32", "bf16" or "fp16", what matrix products run in.
    """
    config = model.config
    return {
        "dtype": precision,
        "image_size": config.vision_config.image_size,
        "decoding": "exact",
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "vit_heads": config.vision_config.num_attention_heads,
        "qformer_heads": config.qformer_config.num_attention_heads,
        "queries": config.num_query_tokens,
        "width": config.qformer_config.hidden_size,
        "weights": _hash({name: p for name, p in model.named_parameters() if vision(name)}),
    }


def _hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
