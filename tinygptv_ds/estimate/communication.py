"""Bytes that ranks send in an optimizer step, and the time that takes: one closed formula per ZeRO stage.

The volumes are those of the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 7), with two differences. Only
trained parameters have gradients and updates, so the frozen ones cost nothing before ZeRO-3. And DeepSpeed 0.19 sums
whole gradients under ZeRO-1 and ZeRO-2 (an all-reduce) where the paper reduces and scatters them. In a ring of N ranks
each one sends (N - 1) / N of a tensor that is gathered or scattered, and twice that of one that is summed. That is also
what passes between two neighbouring nodes, however many ranks each of them has.

With `T` bytes of trained parameters (in fp32, as their gradients are), `m` micro-batches of a rank in a step, and `F`
and `B` bytes of weights used in a forward and in a backward pass, a rank sends (N - 1) / N of

    ZeRO-1:  2 T + T             gradients summed once a step, updated weights gathered
    ZeRO-2:  2 m T + T           gradients summed after every micro-batch
    ZeRO-3:  m (T + F + B)       gradients reduced and scattered, weights gathered where they are used

Left out is what is small: norms, votes, sums of a log line (under 1 kB), and the weights of up to
`stage3_param_persistence_threshold` elements, which stay whole. `benchmarks/traffic.py` counts every collective and
compares the counts with what real ranks send; its test keeps the formulas within 1 % of those counts (what hpZ sends
between nodes: 4 %).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinygptv_ds.estimate.gpus import NVLINK, PCIE, Link
from tinygptv_ds.estimate.model_size import FORWARD_ORDER

if TYPE_CHECKING:
    from tinygptv_ds.models.configuration import TinyGPTVConfig

_FP32_PARTS = ("projections", "norms", "lora")  # in fp32 whether they are trained or not; see models/parameters.py
# `stage3_max_live_parameters`: DeepSpeed fetches ahead up to so many elements. Those used last in the forward pass are
# still whole when the backward pass begins with them, and are not gathered again.
MAX_LIVE = 500_000_000  # in ds_configs/zero3_*.json
MAX_LIVE_OFFLOAD = 1_000_000_000  # DeepSpeed's default, which ds_configs/zero3_offload.json leaves as it is


@dataclass(frozen=True)
class SentBytes:
    """Bytes that each rank sends in an optimizer step.

    Attributes:
        gradients: gradients.
        updated: weights after the optimizer has changed them.
        gathered: weights that ZeRO-3 gathers where they are used.
        inside: weights that ZeRO-3 gathers within a node only (hpZ).
        pcie: weights and gradients between the GPU and CPU memory (offload).
        checkpoint: weights and moments for one checkpoint; not in a step.
    """

    gradients: float
    updated: float = 0.0
    gathered: float = 0.0
    inside: float = 0.0
    pcie: float = 0.0
    checkpoint: float = 0.0

    @property
    def across(self) -> float:
        """Return the bytes between two ranks that are neighbours in a ring, so also between two nodes."""
        return self.gradients + self.updated + self.gathered

    def seconds(self, link: Link) -> float:
        """Return the seconds of a step that sending takes, without latency, if nothing is computed at the same time."""
        slower = self.across / link.gigabytes + self.inside / NVLINK.gigabytes + self.pcie / PCIE.gigabytes
        return slower / 1e9


@dataclass(frozen=True)
class StepVolume:
    """The quantities of the formulas in this module's docstring.

    Attributes:
        ranks: N.
        micro_batches: m.
        trained: T.
        forward: F.
        backward: B, before what is still whole is left out.
        phi_bytes: bytes of one element of Phi's large matrices.
    """

    ranks: int
    micro_batches: int
    trained: float
    forward: float
    backward: float
    phi_bytes: int = 2

    def gathered(self, max_live: int) -> float:
        """Return m (F + B)."""
        return self.micro_batches * (self.forward + max(self.backward - self.phi_bytes * max_live, 0.0))


def zero_1(volume: StepVolume) -> SentBytes:
    """Return what ZeRO-1 sends."""
    return _zero_1_or_2(volume, reductions=1)


def zero_2(volume: StepVolume) -> SentBytes:
    """Return what ZeRO-2 sends."""
    return _zero_1_or_2(volume, reductions=volume.micro_batches)


def zero_3(volume: StepVolume, *, node: int = 1, offloaded: bool = False) -> SentBytes:
    """Return what ZeRO-3 sends.

    Args:
        volume: the quantities of the formulas.
        node: `zero_hpz_partition_size`, ranks that keep a copy of all weights among them; 1: without. A weight then
            crosses nodes once after each update, and a frozen one never.
        offloaded: parameters and optimizer are in CPU memory: a rank's shares pass PCIe.
    """
    share = _ring(volume.ranks)
    gradients = volume.micro_batches * volume.trained
    gathered = volume.gathered(MAX_LIVE_OFFLOAD if offloaded else MAX_LIVE)
    across = gathered if node == 1 else volume.trained
    return SentBytes(
        gradients=share * gradients,
        gathered=share * across,
        inside=_ring(node) * (gathered - across),
        pcie=(gradients + gathered) / volume.ranks if offloaded else 0.0,
        checkpoint=share * 3 * volume.trained,  # weights and two moments, gathered
    )


def sent_in_a_step(volume: StepVolume, node: int) -> dict[str, SentBytes]:
    """Return what is sent by ZeRO setting: `memory.SETTINGS`, and hpZ where there are several nodes.

    Args:
        volume: the quantities of the formulas.
        node: GPUs of one node.
    """
    sent = {"ZeRO-1": zero_1(volume), "ZeRO-2": zero_2(volume), "ZeRO-3": zero_3(volume)}
    if volume.ranks > node > 1 and volume.ranks % node == 0:
        sent["ZeRO-3 + hpZ"] = zero_3(volume, node=node)
    return sent | {"ZeRO-3 + CPU offload": zero_3(volume, offloaded=True)}


def step_volume(
    config: TinyGPTVConfig,
    counts: Mapping[str, int],
    trained: Collection[str],
    *,
    ranks: int,
    micro_batches: int,
    recomputed: float = 0.0,
    from_features: bool = False,
) -> StepVolume:
    """Return the quantities of the formulas for a model.

    Args:
        config: the model's configuration.
        counts: parameters by part.
        trained: trained parts.
        ranks: number of all ranks.
        micro_batches: micro-batches of each rank in a step.
        recomputed: share of Phi's blocks that run forward twice; ZeRO-3 then gathers them once more.
        from_features: ViT and Q-Former do not run.
    """
    size = {part: 4 if part in trained or part in _FP32_PARTS else 2 for part in counts}
    table = size["llm"] * config.text_config.vocab_size * config.text_config.hidden_size  # embeddings, and the head
    first = min(FORWARD_ORDER.index(part) for part in trained)
    first = min(first, FORWARD_ORDER.index("llm"))  # Phi's own parts are spread over all of its blocks
    unused = ("vit", "qformer") if from_features else ()
    in_backward = [part for part in FORWARD_ORDER[first:] if part not in unused]
    backward = float(sum(size[part] * counts[part] for part in in_backward))
    if "llm" not in trained:
        backward -= table  # the embeddings' input are token ids, which have no gradient
    blocks = sum(size[part] * counts[part] for part in ("llm", "norms", "lora")) - 2 * table
    return StepVolume(
        ranks=ranks,
        micro_batches=micro_batches,
        trained=4.0 * sum(counts[part] for part in trained),
        forward=float(sum(size[part] * count for part, count in counts.items() if part not in unused)),
        backward=backward + recomputed * blocks,
        phi_bytes=size["llm"],
    )


def efficiency(computing: float, waiting: float) -> float:
    """Return the share of the time that is spent computing, given the seconds of computing and of waiting."""
    return computing / (computing + waiting)


def _zero_1_or_2(volume: StepVolume, reductions: int) -> SentBytes:
    share = _ring(volume.ranks)
    return SentBytes(
        gradients=share * 2 * reductions * volume.trained,
        updated=share * volume.trained,
        checkpoint=share * 2 * 3 * volume.trained,  # weights and two moments, summed
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
