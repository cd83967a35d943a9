"""The model's weights by name and shape, in the order in which a forward pass comes to them. No torch.

Parameters by part, and what ZeRO-3 gathers when, both follow from this one list; a test holds it to a model that is
built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tinygptv_ds.estimate.sizes import Sizes
from tinygptv_ds.models.parameters import part_of


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        name: the canonical one.
        part: of `models.trainable.PARTS`.
        numel: elements.
        dimensions: of its shape.
    """

    name: str
    part: str
    numel: int
    dimensions: int


@dataclass(frozen=True)
class Layer:
    """A module and what its forward pass uses.

    Attributes:
        name: of the module; empty: of the whole model.
        weights: what it uses by itself, in the order of the model's parameters: its own, and those of a module inside
            it that its code touches.
        inner: modules that run inside its forward pass, in their order.
        block: number of the block of Phi that it is, or None.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    inner: tuple[Layer, ...] = ()
    block: int | None = None

    def every_weight(self) -> Iterator[Weight]:
        """All weights of it and what is inside, those that are used in two places twice."""
        yield from self.weights
        for layer in self.inner:
            yield from layer.every_weight()


def parameters(sizes: Sizes) -> dict[str, int]:
    """Parameters by part; they add up to the model, `norms` being counted apart from `llm`."""
    counts = dict.fromkeys(("vit", "qformer", "projections", "llm", "norms", "lora"), 0)
    for weight in weights_of(model_layers(sizes)):
        counts[weight.part] += weight.numel
    return counts


def weights_of(root: Layer) -> list[Weight]:
    """Every weight once."""
    return list({weight.name: weight for weight in root.every_weight()}.values())


def model_layers(sizes: Sizes) -> Layer:
    """The whole model, from pixels to logits."""
    vision, projections = [*_vit(sizes), _qformer(sizes)], _projections(sizes)
    touched = [
        _weight("query_tokens", 1, sizes.queries, sizes.qformer.width),
        _weight("visual_encoder.cls_token", 1, 1, sizes.vit.width),
        _weight("visual_encoder.pos_embed", 1, sizes.patches, sizes.vit.width),
        vision[0].weights[0],  # for its dtype
        projections[0].weights[0],  # likewise
    ]
    return Layer("", tuple(touched), (*vision, *projections, *_phi(sizes)))


def without_vision(root: Layer) -> Layer:
    """The same where features are read in place of images: what belongs to ViT and Q-Former does not run."""
    kept = tuple(weight for weight in root.weights if weight.part not in ("vit", "qformer"))
    unseen = ("visual_encoder.", "ln_vision", "qformer")
    return Layer(root.name, kept, tuple(layer for layer in root.inner if not layer.name.startswith(unseen)))


def _weight(name: str, *shape: int) -> Weight:
    return Weight(name, part_of(name), math.prod(shape), len(shape))


def _linear(name: str, inputs: int, outputs: int, inner: tuple[Layer, ...] = ()) -> Layer:
    return Layer(name, (_weight(f"{name}.weight", outputs, inputs), _weight(f"{name}.bias", outputs)), inner)


def _norm(name: str, width: int) -> Layer:
    return Layer(name, (_weight(f"{name}.weight", width), _weight(f"{name}.bias", width)))


def _vit(sizes: Sizes) -> list[Layer]:
    width, mlp, start = sizes.vit.width, sizes.vit.mlp, "visual_encoder.patch_embed.proj"
    patches = _weight(f"{start}.weight", width, 3, sizes.patch, sizes.patch)
    layers = [Layer(start, (patches, _weight(f"{start}.bias", width)))]
    for number in range(sizes.vit.layers):
        block = f"visual_encoder.blocks.{number}"
        biases = [_weight(f"{block}.attn.{name}_bias", width) for name in "qv"]
        qkv = _weight(f"{block}.attn.qkv.weight", 3 * width, width)  # used by the attention itself
        layers += [
            _norm(f"{block}.norm1", width),
            Layer(f"{block}.attn", (*biases, qkv), (_linear(f"{block}.attn.proj", width, width),)),
            _norm(f"{block}.norm2", width),
            _linear(f"{block}.mlp.fc1", width, mlp),
            _linear(f"{block}.mlp.fc2", mlp, width),
        ]
    return [*layers, _norm("ln_vision", width)]


def _qformer(sizes: Sizes) -> Layer:
    width, mlp, norm = sizes.qformer.width, sizes.qformer.mlp, _norm("qformer.layernorm", sizes.qformer.width)
    layers = [norm]
    for number in range(sizes.qformer.layers):
        block = f"qformer.encoder.layer.{number}"
        looks = {"attention": width} | ({"crossattention": sizes.vit.width} if number % 2 == 0 else {})
        for name, seen in looks.items():
            widths = {"query": width, "key": seen, "value": seen}
            layers += [_linear(f"{block}.{name}.attention.{k}", inputs, width) for k, inputs in widths.items()]
            layers += [_linear(f"{block}.{name}.output.dense", width, width)]
            layers += [_norm(f"{block}.{name}.output.LayerNorm", width)]
        layers += [_linear(f"{block}.intermediate_query.dense", width, mlp)]
        layers += [_linear(f"{block}.output_query.dense", mlp, width)]
        layers += [_norm(f"{block}.output_query.LayerNorm", width)]
    return Layer("qformer", norm.weights[:1], tuple(layers))  # it looks at its norm's dtype


def _projections(sizes: Sizes) -> list[Layer]:
    return [
        _linear("llama_proj", sizes.qformer.width, sizes.proj_hidden),
        _linear("llama_proj2", sizes.proj_hidden, sizes.phi.width),
    ]


def _phi(sizes: Sizes) -> list[Layer]:
    width, vocabulary, table = sizes.phi.width, sizes.vocabulary, "language_model.model.embed_tokens"
    return [
        Layer(table, (_weight(f"{table}.weight", vocabulary, width),)),
        *(_phi_block(sizes, number) for number in range(sizes.phi.layers)),
        _norm("language_model.model.final_layernorm", width),
        _linear("language_model.lm_head", width, vocabulary),
    ]


def _phi_block(sizes: Sizes, number: int) -> Layer:
    name, width, head = f"language_model.model.layers.{number}", sizes.phi.width, sizes.head_dim
    inner = (
        _norm(f"{name}.input_layernorm", width),
        _phi_linear(sizes, f"{name}.self_attn.query_key_value"),
        _norm(f"{name}.self_attn.q_layernorm", head),
        _norm(f"{name}.self_attn.k_layernorm", head),
        _phi_linear(sizes, f"{name}.self_attn.dense"),
        Layer(f"{name}.post_layernorm", (_weight(f"{name}.post_layernorm.weight", width),)),
        _phi_linear(sizes, f"{name}.mlp.fc1"),
        _phi_linear(sizes, f"{name}.mlp.fc2"),
    )
    return Layer(name, inner=inner, block=number)


def _phi_linear(sizes: Sizes, name: str) -> Layer:
    short = name.rpartition(".")[2]
    inputs, outputs = sizes.phi_linears[short]
    if not sizes.lora_r or short not in sizes.lora_targets:
        return _linear(name, inputs, outputs)
    down = Layer(f"{name}.lora_A", (_weight(f"{name}.lora_A.weight", sizes.lora_r, inputs),))
    up = Layer(f"{name}.lora_B", (_weight(f"{name}.lora_B.weight", outputs, sizes.lora_r),))
    return _linear(name, inputs, outputs, (down, up))
