"""The devices that a fine-tuning runs on, and the settings with which a step fits into their memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.finetune.schedule import micro_batch_sizes

if TYPE_CHECKING:
    from tinygptv_ds.config.recipe import Recipe
    from tinygptv_ds.estimate.memory import Memory

_MOST_SAMPLES = 16  # of a micro-batch; beyond that a card gains little, and single long samples weigh more
_FEW_SAMPLES = 4  # below that, matrices are too small for a GPU, and recomputing with more samples is no slower
_USED = 0.9  # share of a card's memory: the longest samples take more than the mean one, which is what is counted


@dataclass(frozen=True)
class Devices:
    """GPUs, or this machine's CPU.

    Attributes:
        ranks: number of ranks; 1 on a CPU, whose cores one process uses.
        gib: memory of the smallest GPU in GiB; None on a CPU.
        name: of the GPU, or "CPU".
        bf16: whether the GPUs compute in bf16.
    """

    ranks: int
    gib: float | None
    name: str
    bf16: bool = True

    def __str__(self) -> str:
        return self.name if self.gib is None else f"{self.ranks} x {self.name} ({self.gib:.0f} GiB)"


@dataclass(frozen=True)
class Fit:
    """Settings that fit.

    Attributes:
        micro_batch_size: samples of one forward pass on one rank.
        gradient_checkpointing: whether Phi's blocks are recomputed in the backward pass.
        deepspeed: the file in ds_configs/.
        reason: why, in a few words.
    """

    micro_batch_size: int
    gradient_checkpointing: bool
    deepspeed: str
    reason: str


def find_devices(wanted: int | None) -> Devices:
    """Return the GPUs of this machine, as many as wanted if a number is given, or its CPU if there is none.

    Raises:
        ConfigError: there are fewer than wanted.
    """
    import torch

    count = torch.cuda.device_count()
    if wanted is not None and not 1 <= wanted <= max(count, 1):
        raise ConfigError(f"--num-gpus {wanted}: this machine shows {count}; leave the option out to use what is there")
    if not count:
        return Devices(1, None, "CPU")
    ranks = wanted or count
    cards = [torch.cuda.get_device_properties(index) for index in range(ranks)]
    return Devices(
        ranks,
        min(card.total_memory for card in cards) / 2**30,
        cards[0].name.removeprefix("NVIDIA "),
        torch.cuda.is_bf16_supported(including_emulation=False),
    )


def fit(recipe: Recipe, devices: Devices) -> Fit:
    """Return the fastest settings with which a step of this recipe fits into the devices' memory, by `estimate`.

    Tried in this order: ZeRO-2 with micro-batches from 16 samples down to 4, then recomputing Phi's blocks, ZeRO-3 over
    several GPUs, and parameters and optimizer in CPU memory.

    Args:
        recipe: its batch size divides among the ranks; micro-batch and gradient checkpointing are chosen here.
        devices: what there is.

    Raises:
        ConfigError: nothing fits.
    """
    train = recipe.train
    sizes = [n for n in micro_batch_sizes(train.batch_size, devices.ranks) if n <= _MOST_SAMPLES]
    if devices.gib is None:
        return Fit(sizes[0], False, "cpu.json", "a CPU: fp32, and as many samples at once as the step has, up to 16")
    needed_by = _memory_of(recipe, devices.ranks)
    for size, again, setting in _choices(sizes, devices.ranks):
        needed = needed_by(size, again)[setting].total / 2**30
        if needed <= _USED * devices.gib:
            reason = f"{setting} takes {needed:.1f} of {devices.gib:.0f} GiB by `estimate`"
            return Fit(size, again, _file(setting, devices.bf16), reason)
    raise ConfigError(
        f"a step does not fit on {devices}, even with parameters and optimizer in CPU memory; a smaller image size "
        "(--set model.image_size=224) or shorter samples (--set text.max_txt_len=...) take less"
    )


def _memory_of(recipe: Recipe, ranks: int) -> Callable[[int, bool], Mapping[str, Memory]]:
    """Return a function from micro-batch size and gradient checkpointing to the memory by ZeRO setting."""
    from tinygptv_ds.estimate.data_summary import summarize_data
    from tinygptv_ds.estimate.memory import MicroBatchSize, step_memory
    from tinygptv_ds.estimate.model_size import (
        model_configuration,
        parameter_counts,
        parameter_shapes,
        phi_sizes,
        trained_parts,
    )

    sample, features = summarize_data(recipe).sample, recipe.data.features is not None
    config = model_configuration(recipe, phi_sizes(recipe)[0])
    counts, trained = parameter_counts(parameter_shapes(config)), trained_parts(recipe)

    def memory(size: int, again: bool) -> Mapping[str, Memory]:
        return step_memory(config, counts, trained, MicroBatchSize(size, sample, float(again), features), ranks)

    return memory


def _choices(sizes: list[int], ranks: int) -> list[tuple[int, bool, str]]:
    enough = [size for size in sizes if size >= min(_FEW_SAMPLES, sizes[0])]
    choices = [(size, False, "ZeRO-2") for size in enough]
    choices += [(size, True, "ZeRO-2") for size in sizes]
    choices += [(size, True, "ZeRO-3") for size in sizes] if ranks > 1 else []
    return choices + [(size, True, "ZeRO-3 + CPU offload") for size in sizes]


def _file(setting: str, bf16: bool) -> str:
    precision = "bf16" if bf16 else "fp16"
    named = {"ZeRO-2": f"zero2_{precision}.json", "ZeRO-3": f"zero3_{precision}.json"}
    return named.get(setting, "zero3_offload.json")
