"""What a step's traffic takes next to its computing, and so how well a run scales. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.estimate.gathers import Limits
from tinygptv_ds.estimate.gpus import NVLINK, PCIE, Link
from tinygptv_ds.estimate.layers import model_layers
from tinygptv_ds.estimate.sizes import Sizes, trained_parts
from tinygptv_ds.estimate.traffic import (
    GATHERED,
    GRADIENTS,
    SMALL,
    UPDATED,
    Step,
    Zero,
    checkpoint_traffic,
    moved_over_pcie,
    step_traffic,
)

# ds_configs/zero3_offload.json leaves these two limits to DeepSpeed.
OFFLOAD = Zero(3, limits=Limits(reuse=10**9, live=10**9), offloaded=True)


@dataclass(frozen=True)
class Sent:
    """Bytes that each rank sends in an optimizer step, in rings.

    Attributes:
        gradients: to be summed.
        updated: weights after the optimizer has changed them.
        gathered: weights that ZeRO-3 brings together where they are used.
        small: norms, votes, the loss's divisor, the sums of the log.
        inside: further weights that ZeRO-3 brings together, within a node (hpZ).
        pcie: weights and gradients between the GPU and CPU memory (offload).
        checkpoint: for one checkpoint; not in a step.
    """

    gradients: float
    updated: float
    gathered: float
    small: float
    inside: float
    pcie: float
    checkpoint: float

    @property
    def across(self) -> float:
        """Between any two ranks that are neighbours in a ring, so between nodes, too."""
        return self.gradients + self.updated + self.gathered + self.small

    def seconds(self, link: Link) -> float:
        """Of a step, if nothing of it passes while something is computed, and without latency."""
        slower = self.across / link.gigabytes + self.inside / NVLINK.gigabytes + self.pcie / PCIE.gigabytes
        return slower / 1e9


def sent_in_a_step(recipe: Recipe, sizes: Sizes, gpus: int, node: int) -> dict[str, Sent]:
    """By ZeRO setting, under the names of `memory.SETTINGS`, and with hpZ where there are several nodes.

    Args:
        recipe: the recipe.
        sizes: of its model.
        gpus: of all nodes.
        node: GPUs of one.
    """
    step = step_of(recipe, sizes, gpus)
    settings = {"ZeRO-1": Zero(1), "ZeRO-2": Zero(2), "ZeRO-3": Zero(3)}
    if gpus > node > 1 and gpus % node == 0:
        settings["ZeRO-3 + hpZ"] = Zero(3, node=node)
    settings["ZeRO-3 + CPU offload"] = OFFLOAD
    return {name: _sent(step, zero) for name, zero in settings.items()}


def step_of(recipe: Recipe, sizes: Sizes, gpus: int) -> Step:
    """What of a recipe decides about the traffic of a step.

    Raises:
        ConfigError: the batch does not divide among the GPUs.
    """
    return Step(
        model_layers(sizes),
        trained_parts(recipe),
        gpus,
        recipe.train.accumulation(gpus),
        int(recipe.model.gradient_checkpointing),
        recipe.data.features is not None,
        len(recipe.data.used),
        recipe.train.log_every,
        recipe.train.loss_reduction == "step_mean",
        recipe.optimizer.lr_scale,
    )


def _sent(step: Step, zero: Zero) -> Sent:
    collectives = step_traffic(step, zero)
    by_what = dict.fromkeys((GRADIENTS, UPDATED, GATHERED, SMALL, "inside"), 0.0)
    for each in collectives:
        by_what[each.what if each.ranks == step.ranks else "inside"] += each.sent
    pcie = moved_over_pcie(collectives) if zero.offloaded else 0.0
    return Sent(*by_what.values(), pcie, checkpoint_traffic(step, zero).sent)


def efficiency(computing: float, waiting: float) -> float:
    """Share of the time that is computed in, of seconds computed and seconds waited."""
    return computing / (computing + waiting)
