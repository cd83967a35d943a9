"""Names and shapes of a complete file of each kind, from its own sizes: checks one file without building a model.

All names are canonical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import Blip2QFormerModel

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.configuration import PHI_2, EvaViTConfig, TinyGPTVConfig
from tinygptv_ds.models.eva_vit import build_eva_vit
from tinygptv_ds.models.parameters import lora, norms
from tinygptv_ds.models.phi import PhiForCausalLM
from tinygptv_ds.weights.layouts import blip2
from tinygptv_ds.weights.layouts.layers import layer_numbers
from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS, in_layer
from tinygptv_ds.weights.source import Source, lora_rank

Shapes = dict[str, tuple[int, ...]]
_LLM = "language_model."
_LAYER = _LLM + "model.layers.0."


def expected_shapes(kind: str, source: Source) -> Shapes:
    """Return names and shapes of a complete file of this width and number of layers, in the model's order.

    Args:
        kind: a key of `detect.KINDS`.
        source: what the file holds.

    Raises:
        WeightsError: the file holds too little to know the sizes.
    """
    shapes = source.shapes
    try:
        if kind == "phi":
            return _phi(source, shapes)
        if kind == "eva_vit":
            return _eva_vit(source, shapes)
        if kind == "blip2":
            return _blip2(source, shapes)
        if kind == "projection":
            return _linear(shapes, "llama_proj")
        if kind == "adapter":
            return shapes
        if kind == "trained":
            return _trained(source, shapes)
        return _eva_vit(source, shapes) | _blip2(source, shapes) | _projections(shapes) | _phi(source, shapes)
    except KeyError as error:
        name = error.args[0]
        raise WeightsError(
            f"{source.path}: {name} is missing; the file holds a part alone, or is of another model: name a whole one"
        ) from None


def in_order(weights: Mapping[str, object], expected: Shapes) -> list[str]:
    """Sort the names of `weights` into the model's order, with unexpected ones last."""
    rank = {name: number for number, name in enumerate(expected)}
    return sorted(weights, key=lambda name: (rank.get(name, len(rank)), name))


def _phi(source: Source, shapes: Shapes) -> Shapes:
    """Return Phi's shapes, with LoRA and each kind of added norm if any layer has it."""
    vocabulary, width = shapes[_LLM + "model.embed_tokens.weight"]
    inner = shapes[_LAYER + "mlp.fc1.weight"][0]
    given = {in_layer(name) for name in filter(ADDED_NORMS.fullmatch, shapes)}
    return {
        name: shape
        for name, shape in _llm(source, shapes, vocabulary, width, inner).items()
        if not ADDED_NORMS.fullmatch(name) or in_layer(name) in given
    }


def _trained(source: Source, shapes: Shapes) -> Shapes:
    projections = _projections(shapes)
    width = shapes["llama_proj2.weight"][0]
    inner = shapes.get(_LAYER + "mlp.fc1.lora_B.weight", (width,))[0]
    llm = _llm(source, shapes, PHI_2["vocab_size"], width, inner)
    trained = {name: shape for name, shape in llm.items() if norms(name) or lora(name) or _norm_bias(name, shapes)}
    qformer: Shapes = {}
    if any(name.startswith("qformer.") for name in shapes):
        qformer = {n: s for n, s in _blip2(source, shapes).items() if not n.startswith("ln_vision.")}
    return qformer | projections | trained


def _norm_bias(name: str, given: Shapes) -> bool:
    """Return whether this is the bias of a norm, and in the file: no stage trains it, but peft saves norms whole."""
    return name in given and norms(name.removesuffix(".bias") + ".weight")


def _llm(source: Source, shapes: Shapes, vocabulary: int, width: int, inner: int) -> Shapes:
    adapters = [name for name in shapes if ".lora_A." in name]
    # The norm over a head has its size; without one, no other shape depends on it.
    head = shapes.get(_LAYER + "self_attn.q_layernorm.weight", (width,))[0]
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(source, r"language_model\.model\.layers\.(\d+)\."),
        "num_attention_heads": max(width // head, 1),
    }
    config = TinyGPTVConfig(
        text_config=text,
        lora_r=lora_rank(shapes),
        lora_targets=tuple({name.split(".lora_A.")[0].rpartition(".")[2] for name in adapters}),
    )
    return _named(lambda: PhiForCausalLM(config), _LLM)


def _eva_vit(source: Source, shapes: Shapes) -> Shapes:
    prefix = "visual_encoder."
    patch = shapes[prefix + "patch_embed.proj.weight"][-1]
    grid = round((shapes[prefix + "pos_embed"][1] - 1) ** 0.5)
    config = EvaViTConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=shapes[prefix + "cls_token"][-1],
        num_hidden_layers=_count(source, r"visual_encoder\.blocks\.(\d+)\."),
        num_attention_heads=1,
        intermediate_size=shapes[prefix + "blocks.0.mlp.fc1.weight"][0],
    )
    return _named(lambda: build_eva_vit(config), prefix)


def _blip2(source: Source, shapes: Shapes) -> Shapes:
    config = blip2.qformer_config(source, heads=1)
    vision = (config.encoder_hidden_size,)
    parts = {"query_tokens": shapes["query_tokens"], "ln_vision.weight": vision, "ln_vision.bias": vision}
    return parts | _named(lambda: Blip2QFormerModel(config), "qformer.")


def _projections(shapes: Shapes) -> Shapes:
    return _linear(shapes, "llama_proj") | _linear(shapes, "llama_proj2")


def _linear(shapes: Shapes, name: str) -> Shapes:
    weight = shapes[f"{name}.weight"]
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _named(build: Callable[[], nn.Module], prefix: str) -> Shapes:
    with torch.device("meta"):
        module = build()
    return {prefix + name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _count(source: Source, pattern: str) -> int:
    return 1 + max(layer_numbers(source.weights, pattern, source.path), default=-1)
