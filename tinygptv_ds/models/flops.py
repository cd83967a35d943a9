"""Floating-point operations (FLOPs) of a training step, from the counts of its batch. Needs no torch.

Frozen parts are counted as what they cost: a frozen layer passes the gradient on, which is as much work as its forward
pass, but has no weight gradient; parts before the first trained one have no backward pass; with features in place of
images ViT and Q-Former cost nothing. The head runs on labelled rows only, attention is causal inside each sample.
A multiply-add is two operations. Norms, softmax, activations and the optimizer are left out, as is usual for MFU.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

# Dense TFLOP/s in bf16 and fp16 with fp32 accumulation, from the vendors' data sheets; V100 and T4 have only fp16.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.4,
}


@dataclass(frozen=True)
class BatchCounts:
    """The counts of a batch that decide how many operations it takes.

    Attributes:
        tokens: rows of the language model, those of images included.
        squares: sum of the squared lengths of the samples.
        targets: labelled rows.
        images: number of images.
    """

    tokens: float = 0.0
    squares: float = 0.0
    targets: float = 0.0
    images: float = 0.0


@dataclass(frozen=True)
class FlopRates:
    """Operations for one of each count in `BatchCounts`."""

    token: float = 0.0
    square: float = 0.0
    target: float = 0.0
    image: float = 0.0

    def of(self, counts: BatchCounts) -> float:
        """Return the operations of a batch."""
        parts = (
            self.token * counts.tokens,
            self.square * counts.squares,
            self.target * counts.targets,
            self.image * counts.images,
        )
        return sum(parts)

    def __add__(self, other: FlopRates) -> FlopRates:
        """Return the rates of both together."""
        return FlopRates(
            self.token + other.token,
            self.square + other.square,
            self.target + other.target,
            self.image + other.image,
        )


@dataclass(frozen=True)
class PartFlops:
    """Operations of one part of the model in the forward and in the backward pass."""

    forward: FlopRates = FlopRates()
    backward: FlopRates = FlopRates()


@dataclass(frozen=True)
class Forward:
    """Operations of a forward pass in layers that have weights, and in attention, which has none."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Return the sum of both."""
        return self.linear + self.attention


def step_flops(
    config: Any, trained: Collection[str], *, from_features: bool = False, recomputed: float = 0.0
) -> FlopRates:
    """Return the operations of a training step, forward and backward; see `flops_by_part` for the arguments."""
    total = FlopRates()
    for part in flops_by_part(config, trained, from_features=from_features, recomputed=recomputed).values():
        total += part.forward + part.backward
    return total


def flops_by_part(
    config: Any, trained: Collection[str], *, from_features: bool = False, recomputed: float = 0.0
) -> dict[str, PartFlops]:
    """Return the operations of a training step by part: vit, qformer, projections, lora, phi and head.

    Args:
        config: a `TinyGPTVConfig`, or anything with its fields.
        trained: canonical names of the trained parameters. Gradients are taken to pass through all of Phi: the
            projections or something in the first block are trained.
        from_features: images come as the Q-Former's outputs.
        recomputed: share of Phi's blocks that run forward twice under gradient checkpointing; if it is not 0, all of a
            ViT that is trained does. MFU leaves this out: the operations are no more useful for being done twice.
    """
    trained = frozenset(trained)
    text = config.text_config
    vit, qformer = (PartFlops(), PartFlops()) if from_features else _vision(config, trained)
    if recomputed and any(name.startswith("visual_encoder.") for name in trained):
        vit = PartFlops(vit.forward, vit.backward + vit.forward)
    head = 2.0 * text.hidden_size * text.vocab_size
    head_backward = head * (1 + ("language_model.lm_head.weight" in trained))
    return {
        "vit": vit,
        "qformer": qformer,
        "projections": _projections(config, trained),
        "lora": _lora(config, trained, recomputed),
        "phi": _phi_blocks(config, trained, recomputed),
        "head": PartFlops(FlopRates(target=head), FlopRates(target=head_backward)),
    }


def phi_linears(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Return the widths in and out of the linear layers of one of Phi's blocks."""
    return {
        "query_key_value": (width, 3 * width),
        "dense": (width, width),
        "fc1": (width, inner),
        "fc2": (inner, width),
    }


def _linears(config: Any) -> Iterator[tuple[str, int, int]]:
    """Yield canonical name, width in and width out of the linear layers of all of Phi's blocks."""
    text = config.text_config
    for layer in range(text.num_hidden_layers):
        for name, (inputs, outputs) in phi_linears(text.hidden_size, text.intermediate_size).items():
            module = "mlp" if name in ("fc1", "fc2") else "self_attn"
            yield f"language_model.model.layers.{layer}.{module}.{name}", inputs, outputs


def _phi_blocks(config: Any, trained: frozenset[str], recomputed: float) -> PartFlops:
    """Count linear layers per row, and causal attention, q k^T and p v, over n (n + 1) / 2 pairs of rows."""
    text = config.text_config
    forward = backward = 0.0
    for name, inputs, outputs in _linears(config):
        linear = 2.0 * inputs * outputs
        forward += linear
        backward += linear * (1 + (f"{name}.weight" in trained) + recomputed)
    pair = 4.0 * text.hidden_size * text.num_hidden_layers
    pair_backward = pair * (2 + recomputed)
    return PartFlops(
        FlopRates(token=forward + pair / 2, square=pair / 2),
        FlopRates(token=backward + pair_backward / 2, square=pair_backward / 2),
    )


def _lora(config: Any, trained: frozenset[str], recomputed: float) -> PartFlops:
    forward = backward = 0.0
    for name, inputs, outputs in _linears(config):
        if config.lora_r and name.rpartition(".")[2] in config.lora_targets:
            pair = 2.0 * config.lora_r * (inputs + outputs)
            forward += pair
            backward += pair * (1 + (f"{name}.lora_A.weight" in trained) + recomputed)
    return PartFlops(FlopRates(token=forward), FlopRates(token=backward))


def _projections(config: Any, trained: frozenset[str]) -> PartFlops:
    """Count per image. The second passes its gradient on where the first is trained, the first where vision is."""
    vision = any(name.startswith(("visual_encoder.", "ln_vision.", "query_tokens", "qformer.")) for name in trained)
    rows, hidden = config.num_query_tokens, config.proj_hidden_size
    first = 2.0 * rows * config.qformer_config.hidden_size * hidden
    second = 2.0 * rows * hidden * config.text_config.hidden_size
    first_trained, second_trained = "llama_proj.weight" in trained, "llama_proj2.weight" in trained
    backward = first * (vision + first_trained) + second * ((vision or first_trained) + second_trained)
    return PartFlops(FlopRates(image=first + second), FlopRates(image=backward))


def _vision(config: Any, trained: frozenset[str]) -> tuple[PartFlops, PartFlops]:
    """Count ViT and Q-Former per image. A trained part costs twice its forward pass again; pixels have no gradient."""
    vit_trained = any(name.startswith(("visual_encoder.", "ln_vision.")) for name in trained)
    qformer_trained = any(name.startswith(("query_tokens", "qformer.")) for name in trained)
    embedding, blocks, qformer = patch_embedding(config), vit_blocks(config).total, qformer_blocks(config)
    vit_backward = vit_trained * (embedding + 2 * blocks)
    qformer_backward = (vit_trained or qformer_trained) * (
        qformer.linear * (1 + qformer_trained) + 2 * qformer.attention
    )
    return (
        PartFlops(FlopRates(image=embedding + blocks), FlopRates(image=vit_backward)),
        PartFlops(FlopRates(image=qformer.total), FlopRates(image=qformer_backward)),
    )


def _patches(config: Any) -> int:
    """Return the rows of the ViT, the class token included."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def patch_embedding(config: Any) -> float:
    """Return the operations that embed the patches of one image."""
    vision = config.vision_config
    return 2.0 * (_patches(config) - 1) * 3 * vision.patch_size**2 * vision.hidden_size


def vit_blocks(config: Any) -> Forward:
    """Return the operations of one image in the ViT's blocks."""
    vision, rows = config.vision_config, _patches(config)
    width, inner = vision.hidden_size, vision.intermediate_size
    layers = vision.num_hidden_layers
    return Forward(2.0 * rows * layers * (4 * width**2 + 2 * width * inner), 4.0 * rows**2 * width * layers)


def qformer_blocks(config: Any) -> Forward:
    """Return the operations of one image in the Q-Former; every n-th block has cross-attention to the image."""
    qformer, rows, queries = config.qformer_config, _patches(config), config.num_query_tokens
    width, inner, seen = qformer.hidden_size, qformer.intermediate_size, qformer.encoder_hidden_size
    layers = qformer.num_hidden_layers
    crossings = -(-layers // qformer.cross_attention_frequency)
    linear = 2.0 * queries * layers * (4 * width**2 + 2 * width * inner)
    linear += crossings * (2.0 * queries * 2 * width**2 + 2.0 * rows * 2 * seen * width)
    return Forward(linear, 4.0 * queries**2 * width * layers + 4.0 * queries * rows * width * crossings)


def peak_flops(device: str, precision: str) -> float | None:
    """Return the peak of a device in dense operations per second; None where it is unknown, and in fp32.

    Args:
        device: its name from the driver, e.g. "NVIDIA A100-SXM4-80GB".
        precision: "bf16", "fp16" or "fp32".
    """
    if precision not in ("bf16", "fp16"):
        return None
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):  # "H100 PCIe" before "H100"
        if re.search(rf"\b{re.escape(name)}\b", device):
            return PEAK_TFLOPS[name] * 1e12
    return None
