"""Kernels that a training step launches, and the time that the host takes for them. Needs no torch.

The host launches kernel after kernel, and where a GPU is done with them sooner than the host launches the next ones, it
waits: a step then takes as long as its launches, however few samples it has. The numbers here are those of torch's
operations, one kernel each; a test compares their sum with a count of every operation (`benchmarks/ledger.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# Seconds of the host for one kernel: Python, autograd, autocast, dispatch and the launch itself.
LAUNCH_SECONDS = 12e-6

WAITS_FOR_HOST = "launch-bound: the GPU waits for the host"


def remedy(*, from_features: bool, compiled: bool, graphs: bool) -> str:
    """Return what helps where a GPU waits for the host, by the keys of a recipe.

    Args:
        from_features: images come as the Q-Former's outputs.
        compiled: the blocks are compiled, or cannot be.
        graphs: `train.cuda_graph_tokens` is set, or several GPUs train, which cannot use it.
    """
    ways = ["a larger micro-batch (train.micro_batch_size)"]
    if not from_features:
        ways.append("features in place of images (data.features)")
    if not compiled:
        ways.append("compiled blocks (model.compile)")
    if not graphs:
        ways.append("CUDA graphs (train.cuda_graph_tokens)")
    return ", ".join(ways)


@dataclass(frozen=True)
class BlockKernels:
    """Kernels of each kind of block.

    Attributes:
        vit: a block of the ViT.
        qformer: a layer of the Q-Former.
        crossing: what cross-attention to the image adds to it.
        phi: a block of Phi, forward and backward.
        lora: what LoRA on a linear layer adds to it, forward and backward, by the layer's name.
    """

    vit: int
    qformer: int
    crossing: int
    phi: tuple[int, int]
    lora: Mapping[str, tuple[int, int]]


UNCOMPILED = BlockKernels(
    11, 20, 10, (40, 41), {"query_key_value": (7, 8), "dense": (7, 9), "fc1": (7, 9), "fc2": (7, 9)}
)
# An estimate of what a compiler leaves of them; its rule is in benchmarks/operations/fusion.py.
COMPILED = BlockKernels(10, 11, 6, (10, 14), {"query_key_value": (3, 6), "dense": (5, 7), "fc1": (4, 6), "fc2": (4, 6)})
# Whatever the depth: the ends of ViT and Q-Former; rotary tables, dropout's keys and Phi's last norm; and projections,
# embedding, head and loss, forward and backward.
_AROUND_VISION, _AROUND_PHI, _REST = 24, 69, 54
# Casts of A and B, or of their gradients, of LoRA on a linear layer; a single rank has one for all layers.
_LORA_CASTS = 2
# The optimizer: flat tensors on one rank, whole groups at a time; else two copies of each trained tensor's gradient in
# the hooks of ZeRO-1 and 2 (on one rank; 1.6 on two).
_OPTIMIZER, _PER_TENSOR = 40, 2


def pass_kernels(
    config: Any,
    trained: Collection[str],
    *,
    from_features: bool = False,
    recomputed: float = 0.0,
    compiled: bool = False,
    flat: bool = False,
) -> float:
    """Return the kernels of the forward and the backward pass of a micro-batch.

    Args:
        config: a `TinyGPTVConfig`, or anything with its fields.
        trained: trained parts, by the names of `config.parts.PARTS`. The backward pass of a ViT or a Q-Former that is
            trained is taken to launch as many kernels as the forward pass.
        from_features: images come as the Q-Former's outputs.
        recomputed: share of Phi's blocks that run forward twice.
        compiled: whether the blocks are compiled.
        flat: whether the weights are those of a flat optimizer, as on one rank, where LoRA's are cast together.
    """
    blocks = COMPILED if compiled else UNCOMPILED
    lora = [blocks.lora[name] for name in config.lora_targets if config.lora_r]
    saved = _LORA_CASTS * flat
    forward = blocks.phi[0] + sum(each[0] - saved for each in lora)
    backward = blocks.phi[1] + sum(each[1] - saved for each in lora) + recomputed * forward
    phi = config.text_config.num_hidden_layers * (forward + backward) + _AROUND_PHI + 2 * (flat and bool(lora))
    return phi + _REST + (0 if from_features else _vision(config, trained, blocks))


def _vision(config: Any, trained: Collection[str], blocks: BlockKernels) -> int:
    qformer = config.qformer_config
    vit = config.vision_config.num_hidden_layers * blocks.vit
    crossings = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    layers = qformer.num_hidden_layers * blocks.qformer + crossings * blocks.crossing
    again = ("vit" in trained) * vit + bool({"vit", "qformer"} & set(trained)) * layers
    return vit + layers + _AROUND_VISION + again


def optimizer_kernels(tensors: int, *, flat: bool) -> int:
    """Return the kernels of an optimizer step, and of ZeRO's work on gradients.

    Args:
        tensors: trained tensors.
        flat: on flat tensors, as on one rank, instead of ZeRO's.
    """
    return _OPTIMIZER + (0 if flat else _PER_TENSOR * tensors)
