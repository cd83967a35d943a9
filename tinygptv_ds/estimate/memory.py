"""GPU memory of a training step in bf16, from the recipe's sizes alone. No torch.

Weights, optimizer and gradients are counted; activations follow what each operation keeps for the backward pass under
autocast, per row of Phi: a test holds them against what torch keeps of a small model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from tinygptv_ds.estimate.costs import MeanSample
from tinygptv_ds.estimate.layers import parameters
from tinygptv_ds.estimate.sizes import Sizes

SETTINGS = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 + CPU offload")
GIB = 2**30
_CONTEXT = 1.0 * GIB  # CUDA, cuBLAS, NCCL; 0.6 to 1.2 on the cards seen
_MARGIN = 0.06  # of the rest: what the allocator cannot use
_BUCKET = 50_000_000  # elements, as in ds_configs/
_PER_LOGIT = 10  # bytes: bf16, and two fp32 copies in the cross entropy's backward
_GENERIC_ROW = 34  # bytes per row and unit of width that a transformer's block keeps (Korthikanti et al., 2205.05198)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    context_and_margin: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class MicroBatch:
    """What one GPU computes at once.

    Attributes:
        samples: of `sample` each.
        sample: what one holds.
        checkpointed: share of Phi's blocks that are recomputed.
        from_features: without ViT and Q-Former.
    """

    samples: float
    sample: MeanSample
    checkpointed: float = 0.0
    from_features: bool = False


def step_memory(sizes: Sizes, trained: Collection[str], batch: MicroBatch, gpus: int) -> dict[str, Memory]:
    """The peak of a step on one GPU under each of `SETTINGS`.

    Args:
        sizes: of the model.
        trained: parts that learn.
        batch: what one GPU computes at once.
        gpus: over which ZeRO divides.
    """
    counts = parameters(sizes)
    learning = sum(count for part, count in counts.items() if part in trained)
    frozen = sum(counts.values()) - learning
    whole = 2 * frozen + 4 * learning
    activations = _activations(sizes, trained, batch)
    activations += 2 * learning  # autocast's bf16 copies
    logits = _PER_LOGIT * batch.samples * batch.sample.targets * sizes.vocabulary
    bucket = 4 * 2 * min(_BUCKET, learning)  # one is filled while another is reduced
    gathered = _gathered(sizes)
    states = 12 * learning / gpus  # fp32 copy and two moments
    rows = {
        "ZeRO-1": (whole, states, 4 * learning + bucket),
        "ZeRO-2": (whole, states, 4 * learning / gpus + bucket),
        "ZeRO-3": (whole / gpus + gathered, states, 4 * learning / gpus + bucket),
        "ZeRO-3 + CPU offload": (gathered, 0.0, bucket),
    }
    return {
        name: Memory(
            weights,
            optimizer,
            gradients,
            activations,
            logits,
            _reserve(weights + optimizer + gradients + activations + logits),
        )
        for name, (weights, optimizer, gradients) in rows.items()
    }


def fits(memory: Memory, gib: float) -> bool:
    """Whether a card of so many GiB holds it."""
    return memory.total <= gib * GIB


def phi_row_bytes(sizes: Sizes, trained: Collection[str]) -> float:
    """What one of Phi's blocks keeps of a row for the backward pass, in bytes."""
    width, mlp = sizes.phi.width, sizes.phi.mlp
    with_lora = sizes.lora_r > 0 and "lora" in trained
    keeps = 6.0 * width  # input norm: its input in fp32, its output in bf16
    keeps += 2 * 6 * width  # q and k norms: inputs in fp32 and bf16
    keeps += 2 * 4 * width  # attention: q, k, v and its output
    keeps += 2 * 4 * width + 2 * width  # attention-output norm: fp32 input and output; bf16 input of the sum
    keeps += 2 * mlp  # input of GELU
    keeps += 2 * width  # dropout masks
    if with_lora:
        widths = {name: pair[0] for name, pair in sizes.phi_linears.items() if name in sizes.lora_targets}
        keeps += sum(3 * inputs + 2 * sizes.lora_r for inputs in widths.values())  # dropped input, its mask, A's output
    if "llm" in trained:
        keeps += 2 * mlp  # input of the second linear layer
    return keeps


def _activations(sizes: Sizes, trained: Collection[str], batch: MicroBatch) -> float:
    rows, width = batch.samples * batch.sample.tokens, sizes.phi.width
    whole = phi_row_bytes(sizes, trained)
    kept = (1 - batch.checkpointed) * whole + batch.checkpointed * 2 * width
    one_again = whole if batch.checkpointed else 0.0
    phi = rows * (sizes.phi.layers * kept + one_again)
    images = 0.0 if batch.from_features else batch.samples * batch.sample.images
    vision = images * _vision_bytes(sizes, trained)
    learns = {"vit", "qformer"} & set(trained)
    return phi + vision if learns else max(phi, vision)  # a frozen vision path has passed before Phi begins


def _vision_bytes(sizes: Sizes, trained: Collection[str]) -> float:
    """Of one image: what is kept where ViT or Q-Former learn, else what the widest block has in hand."""
    vit, qformer = sizes.vit, sizes.qformer
    in_hand = sizes.patches * 2 * (4 * vit.width + 2 * vit.mlp)
    kept_vit = sizes.patches * vit.layers * _GENERIC_ROW * vit.width if "vit" in trained else in_hand
    if {"vit", "qformer"} & set(trained):
        crossing = sizes.crossings * sizes.patches * 2 * 2 * qformer.width
        return kept_vit + crossing + sizes.queries * qformer.layers * _GENERIC_ROW * qformer.width
    return kept_vit


def _gathered(sizes: Sizes) -> float:
    """Weights that ZeRO-3 holds whole at a time: a block or two fetched ahead, or the largest single matrix."""
    block = sum(inputs * outputs for inputs, outputs in sizes.phi_linears.values())
    return 2 * max(sizes.vocabulary * sizes.phi.width, _BUCKET + 2 * block)


def _reserve(used: float) -> float:
    return _CONTEXT + _MARGIN * used
