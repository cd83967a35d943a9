"""The model's modules and weights in the order in which a forward pass uses them, for the count of ZeRO-3's gathers.

Names and shapes come from the model on the meta device, the order is written down here. It includes what a module's
code touches outside of itself, e.g. a weight whose dtype it reads, because DeepSpeed gathers that as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tinygptv_ds.estimate.model_size import parameter_shapes
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import part_of


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        name: the canonical name.
        part: its part, one of `models.parameters.PARTS`.
        numel: number of elements.
        dimensions: number of dimensions.
    """

    name: str
    part: str
    numel: int
    dimensions: int


@dataclass(frozen=True)
class Layer:
    """A module and what its forward pass uses.

    Attributes:
        name: name of the module; empty for the whole model.
        weights: weights that it uses itself, in the order of the model's parameters: its own, and those of a module
            inside it that its code touches.
        inner: modules that run inside its forward pass, in order.
        block: number of the block of Phi that it is, or None.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    inner: tuple[Layer, ...] = ()
    block: int | None = None

    def every_weight(self) -> Iterator[Weight]:
        """Yield all weights of the module and of those inside it; a weight that is used in two places comes twice."""
        yield from self.weights
        for layer in self.inner:
            yield from layer.every_weight()


def weights_of(root: Layer) -> list[Weight]:
    """Return every weight once."""
    return list({weight.name: weight for weight in root.every_weight()}.values())


def model_layers(config: TinyGPTVConfig) -> Layer:
    """Return the whole model, from pixels to logits."""
    return _Builder(config, parameter_shapes(config)).model()


def without_vision(root: Layer) -> Layer:
    """Return the model as it runs from features: nothing of ViT and Q-Former runs."""
    kept = tuple(weight for weight in root.weights if weight.part not in ("vit", "qformer"))
    unused = ("visual_encoder.", "ln_vision", "qformer")
    return Layer(root.name, kept, tuple(layer for layer in root.inner if not layer.name.startswith(unused)))


class _Builder:
    """Builds the layers of a model from the shapes of its parameters."""

    def __init__(self, config: TinyGPTVConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._config, self._shapes = config, shapes

    def model(self) -> Layer:
        vision, projections = [*self._vit(), self._qformer()], [self._layer("llama_proj"), self._layer("llama_proj2")]
        touched = [
            self._weight("query_tokens"),
            self._weight("visual_encoder.cls_token"),
            self._weight("visual_encoder.pos_embed"),
            vision[0].weights[0],  # its dtype is read
            projections[0].weights[0],  # the same
        ]
        return Layer("", tuple(touched), (*vision, *projections, *self._phi()))

    def _weight(self, name: str) -> Weight:
        part, shape = part_of(name), self._shapes[name]
        assert part is not None, f"{name} belongs to no part of the model"
        return Weight(name, part, math.prod(shape), len(shape))

    def _layer(self, name: str, inner: tuple[Layer, ...] = ()) -> Layer:
        """Return a module with its weight and, if it has one, its bias."""
        own = (f"{name}.weight", f"{name}.bias")
        return Layer(name, tuple(self._weight(each) for each in own if each in self._shapes), inner)

    def _vit(self) -> list[Layer]:
        layers = [self._layer("visual_encoder.patch_embed.proj")]
        for number in range(self._config.vision_config.num_hidden_layers):
            block = f"visual_encoder.blocks.{number}"
            own = ("q_bias", "v_bias", "qkv.weight")  # used by the attention itself
            attention = tuple(self._weight(f"{block}.attn.{name}") for name in own)
            layers += [
                self._layer(f"{block}.norm1"),
                Layer(f"{block}.attn", attention, (self._layer(f"{block}.attn.proj"),)),
                self._layer(f"{block}.norm2"),
                self._layer(f"{block}.mlp.fc1"),
                self._layer(f"{block}.mlp.fc2"),
            ]
        return [*layers, self._layer("ln_vision")]

    def _qformer(self) -> Layer:
        config, norm = self._config.qformer_config, self._layer("qformer.layernorm")
        layers = [norm]
        for number in range(config.num_hidden_layers):
            block = f"qformer.encoder.layer.{number}"
            crosses = number % config.cross_attention_frequency == 0
            for name in ("attention", "crossattention") if crosses else ("attention",):
                layers += [self._layer(f"{block}.{name}.attention.{of}") for of in ("query", "key", "value")]
                layers += [self._layer(f"{block}.{name}.output.{of}") for of in ("dense", "LayerNorm")]
            layers += [self._layer(f"{block}.intermediate_query.dense")]
            layers += [self._layer(f"{block}.output_query.{of}") for of in ("dense", "LayerNorm")]
        return Layer("qformer", norm.weights[:1], tuple(layers))  # the dtype of its norm is read

    def _phi(self) -> list[Layer]:
        return [
            self._layer("language_model.model.embed_tokens"),
            *(self._phi_block(number) for number in range(self._config.text_config.num_hidden_layers)),
            self._layer("language_model.model.final_layernorm"),
            self._layer("language_model.lm_head"),
        ]

    def _phi_block(self, number: int) -> Layer:
        name = f"language_model.model.layers.{number}"
        inner = (
            self._layer(f"{name}.input_layernorm"),
            self._phi_linear(f"{name}.self_attn.query_key_value"),
            self._layer(f"{name}.self_attn.q_layernorm"),
            self._layer(f"{name}.self_attn.k_layernorm"),
            self._phi_linear(f"{name}.self_attn.dense"),
            self._layer(f"{name}.post_layernorm"),
            self._phi_linear(f"{name}.mlp.fc1"),
            self._phi_linear(f"{name}.mlp.fc2"),
        )
        return Layer(name, inner=inner, block=number)

    def _phi_linear(self, name: str) -> Layer:
        lora = (f"{name}.lora_A", f"{name}.lora_B")
        return self._layer(name, tuple(self._layer(each) for each in lora if f"{each}.weight" in self._shapes))
