"""Training from features is allowed only with features that this very vision path would have computed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.config.data_section import DataSection
from tinygptv_ds.data.loader.background import reading_of
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.features.format import SIXTEEN_BIT, refuse_stale
from tinygptv_ds.models.frozen_linear import quantized_buffers
from tinygptv_ds.models.parameters import vision
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.image import IMAGE_MEAN, IMAGE_STD


def check_features(model: TinyGPTVForConditionalGeneration, data: DataSection, precision: str) -> None:
    """Compare the model's vision path with what the features of `data.features` were made with, if any are named.

    To be called on all ranks, before DeepSpeed partitions the weights.

    Raises:
        ConfigError: the vision path is trained, so features would be wrong after the first step.
        DataError: features are stale; names the differences and how to make them again.
    """
    if data.features is None:
        return
    if not model.vision_is_frozen:
        raise ConfigError(
            "data.features is set, but the ViT or the Q-Former is trained, whose outputs change with every step; set "
            "data.features to null, or freeze them"
        )
    current = vision_fingerprint(model, precision)
    for section in data.used:
        refuse_stale(Path(data.features) / section.name, current | reading_of(section))


def vision_fingerprint(model: TinyGPTVForConditionalGeneration, precision: str) -> dict[str, Any]:
    """Return everything that the outputs of a frozen vision path depend on, as plain values.

    These are sizes, transform, precision, and the hash of the weights as they are used.

    Args:
        model: its vision path in memory, in the dtype that it computes in; not yet partitioned by DeepSpeed.
        precision: "fp32", "bf16" or "fp16", of matrix products.
    """
    config = model.config
    sixteen_bit = {} if precision == "fp32" else {SIXTEEN_BIT: "ViT outside autocast"}
    return sixteen_bit | {
        "dtype": precision,
        "image_size": config.vision_config.image_size,
        "decoding": "exact",
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "vit_heads": config.vision_config.num_attention_heads,
        "qformer_heads": config.qformer_config.num_attention_heads,
        "queries": config.num_query_tokens,
        "width": config.qformer_config.hidden_size,
        "weights": _hash({name: t for name, t in _tensors(model).items() if vision(name)}),
    }


def _tensors(model: TinyGPTVForConditionalGeneration) -> dict[str, Tensor]:
    """Return the weights as they are used: a quantized one has other outputs, so it counts as it is stored."""
    return dict(model.named_parameters()) | quantized_buffers(model)


def _hash(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
