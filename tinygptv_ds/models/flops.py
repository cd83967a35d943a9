"""What a training step costs in floating-point operations, from counts of its batch. No torch.

Frozen parts are counted as what they cost: a frozen layer passes the gradient on, which is as much work as its forward
pass, but has no weight gradient; what lies before everything that learns has no backward pass; with features in place
of images ViT and Q-Former cost nothing. The head runs on labelled rows only, attention is causal inside each sample.
A multiply-add is two operations. Norms, softmax, activations and the optimizer are left out, as is usual for MFU.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# Dense TFLOP/s in bf16 and fp16 with fp32 accumulation, from the makers' data sheets; V100 and T4 have fp16 alone.
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
class Work:
    """What of a batch decides its cost.

    Attributes:
        tokens: rows of the language model, those of images included.
        squares: sum over the samples of their lengths' squares.
        targets: labelled rows.
        images: how many.
    """

    tokens: float = 0.0
    squares: float = 0.0
    targets: float = 0.0
    images: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Operations of a training step, forward and backward, for one of each count in `Work`."""

    token: float
    square: float
    target: float
    image: float

    def of(self, work: Work) -> float:
        """Operations of a step."""
        parts = (
            self.token * work.tokens,
            self.square * work.squares,
            self.target * work.targets,
            self.image * work.images,
        )
        return sum(parts)


@dataclass(frozen=True)
class Forward:
    """Operations of a forward pass in layers that have weights, and in attention, which has none."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.linear + self.attention


@dataclass(frozen=True)
class _Linear:
    """A linear layer, per row. `learns`: its weight has a gradient; `rank`: of the LoRA next to it, which learns."""

    inputs: int
    outputs: int
    learns: bool
    rank: int = 0

    @property
    def forward(self) -> float:
        return 2.0 * (self.inputs * self.outputs + self.rank * (self.inputs + self.outputs))

    @property
    def weight_gradients(self) -> float:
        return 2.0 * (self.inputs * self.outputs * self.learns + self.rank * (self.inputs + self.outputs))


def step_costs(config: Any, trained: Collection[str], *, from_features: bool = False, recompute: bool = False) -> Costs:
    """The costs under a model's sizes and what of it is trained.

    Args:
        config: a `TinyGPTVConfig`, or anything with its fields.
        trained: canonical names of the trained parameters. Gradients are taken to pass through all of Phi: the
            projections or something in the first block learn.
        from_features: images come as the Q-Former's outputs.
        recompute: count Phi's blocks once more, as gradient checkpointing runs them. MFU leaves this out: the work is
            no more useful for being done twice.
    """
    trained = frozenset(trained)
    text = config.text_config
    linears = [linear for layer in range(text.num_hidden_layers) for linear in _block(config, layer, trained)]
    forward = sum(linear.forward for linear in linears)
    token = 2 * forward + sum(linear.weight_gradients for linear in linears)
    # q k^T and p v over n (n + 1) / 2 pairs, and twice that backward
    attention = 4.0 * text.hidden_size * text.num_hidden_layers
    pair = 3 * attention
    if recompute:
        token, pair = token + forward, pair + attention
    head = _Linear(text.hidden_size, text.vocab_size, "language_model.lm_head.weight" in trained)
    image = _projections(config, trained) + (0.0 if from_features else _vision(config, trained))
    return Costs(token + pair / 2, pair / 2, 2 * head.forward + head.weight_gradients, image)


def phi_linears(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Widths in and out of the linear layers of one of Phi's blocks."""
    return {
        "query_key_value": (width, 3 * width),
        "dense": (width, width),
        "fc1": (width, inner),
        "fc2": (inner, width),
    }


def _block(config: Any, layer: int, trained: frozenset[str]) -> list[_Linear]:
    width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
    linears = []
    for name, (inputs, outputs) in phi_linears(width, inner).items():
        rank = config.lora_r if name in config.lora_targets else 0
        module = "mlp" if name in ("fc1", "fc2") else "self_attn"
        learns = f"language_model.model.layers.{layer}.{module}.{name}.weight" in trained
        linears.append(_Linear(inputs, outputs, learns, rank))
    return linears


def _projections(config: Any, trained: frozenset[str]) -> float:
    """Per image. The second passes its gradient on where the first learns, the first where the vision path does."""
    vision = any(name.startswith(("visual_encoder.", "ln_vision.", "query_tokens", "qformer.")) for name in trained)
    first = _Linear(config.qformer_config.hidden_size, config.proj_hidden_size, "llama_proj.weight" in trained)
    second = _Linear(config.proj_hidden_size, config.text_config.hidden_size, "llama_proj2.weight" in trained)
    row = first.forward * (1 + vision) + first.weight_gradients
    row += second.forward * (1 + (vision or first.learns)) + second.weight_gradients
    return config.num_query_tokens * row


def _vision(config: Any, trained: frozenset[str]) -> float:
    """Per image. A part with anything trained costs three times its forward pass, one behind such a part twice."""
    vit = any(name.startswith(("visual_encoder.", "ln_vision.")) for name in trained)
    qformer = any(name.startswith(("query_tokens", "qformer.")) for name in trained)
    embedding = patch_embedding(config) * (2 if vit else 1)  # pixels have no gradient
    blocks = vit_blocks(config).total * (3 if vit else 1)
    return embedding + blocks + qformer_blocks(config).total * (3 if qformer else 2 if vit else 1)


def _patches(config: Any) -> int:
    """Rows of the ViT, the class token included."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def patch_embedding(config: Any) -> float:
    """Operations that make rows of one image's patches."""
    vision = config.vision_config
    return 2.0 * (_patches(config) - 1) * 3 * vision.patch_size**2 * vision.hidden_size


def vit_blocks(config: Any) -> Forward:
    """One image through the ViT's blocks."""
    vision, rows = config.vision_config, _patches(config)
    width, inner = vision.hidden_size, vision.intermediate_size
    layers = vision.num_hidden_layers
    return Forward(2.0 * rows * layers * (4 * width**2 + 2 * width * inner), 4.0 * rows**2 * width * layers)


def qformer_blocks(config: Any) -> Forward:
    """One image through the Q-Former, whose every n-th block looks at it."""
    qformer, rows, queries = config.qformer_config, _patches(config), config.num_query_tokens
    width, inner, seen = qformer.hidden_size, qformer.intermediate_size, qformer.encoder_hidden_size
    layers = qformer.num_hidden_layers
    crossings = -(-layers // qformer.cross_attention_frequency)
    linear = 2.0 * queries * layers * (4 * width**2 + 2 * width * inner)
    linear += crossings * (2.0 * queries * 2 * width**2 + 2.0 * rows * 2 * seen * width)
    return Forward(linear, 4.0 * queries**2 * width * layers + 4.0 * queries * rows * width * crossings)


def peak_flops(device: str, precision: str) -> float | None:
    """Dense operations a second of a device, by the name that its driver gives; None where unknown, and in fp32.

    Args:
        device: for instance "NVIDIA A100-SXM4-80GB".
        precision: "bf16", "fp16" or "fp32".
    """
    if precision not in ("bf16", "fp16"):
        return None
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):  # "H100 PCIe" before "H100"
        if re.search(rf"\b{re.escape(name)}\b", device):
            return PEAK_TFLOPS[name] * 1e12
    return None
