"""Operations of a training step, frozen parts counted as what they cost. No torch.

A matrix product of m x k and k x n counts 2 m k n. Going forward, everything is computed once. Going back, a linear
layer costs as much again for the gradient of its input, where something before it learns, and as much once more for the
gradient of its weight, where that learns; attention, which has no weights, costs twice its forward. Norms, activations
and embeddings are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tinygptv_ds.estimate.sizes import Sizes
from tinygptv_ds.models.flops import patch_embedding, qformer_blocks, vit_blocks

_UPSTREAM = ("vit", "qformer", "projections", "llm", "norms", "lora")


@dataclass(frozen=True)
class MeanSample:
    """What a sample holds on average.

    Attributes:
        images: how many.
        tokens: rows in Phi, those of images included.
        targets: of them, those that are learnt.
    """

    images: float
    tokens: float
    targets: float


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one part for one sample, forward and backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


def sample_operations(
    sizes: Sizes,
    sample: MeanSample,
    trained: Collection[str],
    *,
    recomputed: float = 0.0,
    from_features: bool = False,
) -> dict[str, Operations]:
    """Operations by part for one sample.

    Args:
        sizes: of the model.
        sample: what it holds.
        trained: parts that learn.
        recomputed: share of Phi's blocks that run forward twice (`model.gradient_checkpointing`).
        from_features: the outputs of ViT and Q-Former are read, not computed.
    """
    learns = {part: part in trained for part in _UPSTREAM}
    images = 0.0 if from_features else sample.images
    before_projections = learns["vit"] or learns["qformer"]
    before_phi = before_projections or learns["projections"]
    into_phi = before_phi or learns["llm"] or learns["norms"] or learns["lora"]
    linear, attention = _phi_block_operations(sizes, sample.tokens)
    phi = sizes.phi.layers * (linear + attention)
    recompute = Operations(0.0, recomputed * (phi + _lora(sizes, sample.tokens)))
    head = 2 * sample.targets * sizes.phi.width * sizes.vocabulary
    blocks = _counted(sizes.phi.layers * linear, into_phi, learns["llm"], sizes.phi.layers * attention)
    return {
        "vit": _scaled(_vit(sizes, learns["vit"]), images),
        "qformer": _scaled(_qformer(sizes, learns["vit"], learns["qformer"]), images),
        "projections": _scaled(_counted(_projections(sizes), before_projections, learns["projections"]), sample.images),
        "lora": _counted(_lora(sizes, sample.tokens), into_phi, learns["lora"]),
        "phi": Operations(blocks.forward, blocks.backward + recompute.backward),
        "head": _counted(head, into_phi, learns["llm"]),
    }


def _counted(linear: float, passes_on: bool, learns: bool, attention: float = 0.0) -> Operations:
    back = passes_on or learns
    return Operations(linear + attention, linear * passes_on + linear * learns + 2 * attention * back)


def _scaled(operations: Operations, factor: float) -> Operations:
    return Operations(operations.forward * factor, operations.backward * factor)


def _vit(sizes: Sizes, learns: bool) -> Operations:
    blocks, embedding = vit_blocks(sizes.as_config()), patch_embedding(sizes.as_config())
    return _counted(blocks.linear + embedding, learns, learns, blocks.attention)


def _qformer(sizes: Sizes, vit_learns: bool, learns: bool) -> Operations:
    blocks = qformer_blocks(sizes.as_config())
    return _counted(blocks.linear, vit_learns or learns, learns, blocks.attention)


def _projections(sizes: Sizes) -> float:
    return 2 * sizes.queries * sizes.proj_hidden * (sizes.qformer.width + sizes.phi.width)


def _phi_block_operations(sizes: Sizes, tokens: float) -> tuple[float, float]:
    """Linear layers and causal attention of one block."""
    linear = 2 * tokens * sum(inputs * outputs for inputs, outputs in sizes.phi_linears.values())
    return linear, 2 * tokens**2 * sizes.phi.width


def _lora(sizes: Sizes, tokens: float) -> float:
    widths = sum(sum(pair) for name, pair in sizes.phi_linears.items() if name in sizes.lora_targets)
    return 2 * tokens * sizes.lora_r * widths * sizes.phi.layers
