"""BLIP-2's file (`blip2_pretrained_flant5xxl.pth`): query tokens, `ln_vision` and the Q-Former.

Both LAVIS's names and those of transformers' own BLIP-2 folders are read. The canonical names are those of
transformers' `Blip2QFormerModel` under `qformer.`.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import Blip2QFormerConfig

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import listing
from tinygptv_ds.weights.layouts.layers import layer_numbers
from tinygptv_ds.weights.opening import open_model_weights
from tinygptv_ds.weights.source import Source, rename_all

_RENAMES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"qformer.encoder.layer.\1.\2.attention.",
    ),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
)
# What BLIP-2's files hold next to the three parts: the text side of the Q-Former, other vision towers and LLMs.
_UNUSED = re.compile(
    r"(Qformer\.bert\.|qformer\.)?embeddings\.(word_embeddings|position_embeddings|position_ids)"
    r"|(Qformer\.bert|qformer)\.(pooler\.|encoder\.layer\.\d+\.(intermediate|output)\.)"
    r"|Qformer\.cls\."
    r"|(t5_proj|opt_proj|llm_proj|language_projection|t5_model|opt_model|llm_model|language_model)\."
    r"|(visual_encoder|vision_model)\."
    r"|llama_proj2?\."  # of an exported model, whose other parts are not the Q-Former's either
    r"|(vision_proj|text_proj|vision_projection|text_projection|itm_head)\.|temp$"
)
_LAYER = r"qformer\.encoder\.layer\.(\d+)\."


def canonical_name(name: str) -> str | None:
    """Return the canonical name of a tensor of BLIP-2's file, or None for one that is known and not used."""
    renamed = name
    for pattern, replacement in _RENAMES:
        renamed = re.sub(pattern, replacement, renamed)
    used = renamed.startswith("ln_vision.") or not _UNUSED.match(name)
    return renamed if used else None


def original_name(name: str) -> str:
    """Return the LAVIS name of a canonical one; inverts `canonical_name` for what is used."""
    name = re.sub(r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm.", name)
    name = re.sub(_LAYER + r"(attention|crossattention)\.attention\.", r"qformer.encoder.layer.\1.\2.self.", name)
    return re.sub(r"^qformer\.", "Qformer.bert.", name)


def blip2_source(path: Path) -> Source:
    """Return the file's weights under canonical names.

    Raises:
        WeightsError: the file is missing, damaged, or mixes two layouts.
    """
    return rename_all(*open_model_weights(path, "blip2"), canonical_name, path)


def qformer_config(source: Source, heads: int) -> Blip2QFormerConfig:
    """Return the Q-Former's sizes from the shapes of its weights.

    Args:
        source: from `blip2_source`.
        heads: attention heads, which do not follow from the shapes.

    Raises:
        WeightsError: there is no Q-Former, or its sizes do not fit.
    """
    first = "qformer.encoder.layer.0."
    names = ("query_tokens", first + "crossattention.attention.key.weight", first + "intermediate_query.dense.weight")
    missing = [name for name in names if name not in source.weights]
    if missing:
        raise WeightsError(
            f"{source.path}: not a BLIP-2 Q-Former: {listing(missing)} missing; name blip2_pretrained_flant5xxl.pth, "
            "or a file with its names"
        )
    width, vision_width = source.weights[names[1]].shape
    if width % heads:
        raise WeightsError(
            f"{source.path}: a Q-Former width of {width} does not divide into {heads} heads; set model.qformer_heads"
        )
    layers, cross = _layers(source, ""), _layers(source, "crossattention")
    frequency = sorted(cross)[1] if len(cross) > 1 else max(layers) + 1
    if cross != {layer for layer in layers if layer % frequency == 0}:
        raise WeightsError(
            f"{source.path}: cross-attention in layers {sorted(cross)}, not every {frequency}th; name a file of BLIP-2"
        )
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(layers),
        num_attention_heads=heads,
        intermediate_size=source.weights[names[2]].shape[0],
        cross_attention_frequency=frequency,
        encoder_hidden_size=vision_width,
        layer_norm_eps=1e-12,
    )


def _layers(source: Source, part: str) -> set[int]:
    return layer_numbers(source.weights, _LAYER + part, source.path)
