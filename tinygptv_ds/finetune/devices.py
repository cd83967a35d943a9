"""The devices that a fine-tuning runs on, and the settings with which a step fits into their memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.finetune.schedule import micro_batch_sizes

if TYPE_CHECKING:
    from tinygptv_ds.config.recipe import Recipe

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
        quantizes: whether bitsandbytes is installed, which frozen weights in 8 or 4 bit need.
    """

    ranks: int
    gib: float | None
    name: str
    bf16: bool = True
    quantizes: bool = True

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
        frozen_bits: bits of frozen linear layers; None: 16.
        quantize_vision: whether those of the ViT are among them.
    """

    micro_batch_size: int
    gradient_checkpointing: bool
    deepspeed: str
    reason: str
    frozen_bits: int | None = None
    quantize_vision: bool = False


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
        importlib.util.find_spec("bitsandbytes") is not None,
    )


def fit(recipe: Recipe, devices: Devices, *, keep_bits: bool = False) -> Fit:
    """Return the fastest settings with which a step of this recipe fits into the devices' memory, by `estimate`.

    Tried in this order: ZeRO-2 with micro-batches from 16 samples down to 4, then recomputing Phi's blocks, ZeRO-3 over
    several GPUs; frozen weights of Phi in 8 bit, in 4 bit, and those of the ViT as well; and parameters and optimizer
    in CPU memory.

    Args:
        recipe: its batch size divides among the ranks; micro-batch and gradient checkpointing are chosen here.
        devices: what there is.
        keep_bits: leave `model.frozen_bits` and `model.quantize_vision` as the recipe has them.

    Raises:
        ConfigError: nothing fits.
    """
    train = recipe.train
    sizes = [n for n in micro_batch_sizes(train.batch_size, devices.ranks) if n <= _MOST_SAMPLES]
    if devices.gib is None:
        return Fit(sizes[0], False, "cpu.json", "a CPU: fp32, and as many samples at once as the step has, up to 16")
    memory_of = _memory_of(recipe, devices.ranks)
    for choice in _choices(recipe, sizes, devices.ranks, _quantizations(recipe, devices, keep_bits=keep_bits)):
        needed = memory_of(choice) / 2**30
        if needed <= _USED * devices.gib:
            reason = f"{choice.setting} takes {needed:.1f} of {devices.gib:.0f} GiB by `estimate`"
            file = _file(choice.setting, devices.bf16)
            return Fit(choice.size, choice.again, file, reason, choice.bits, choice.vision)
    raise ConfigError(
        f"a step does not fit on {devices}, even with parameters and optimizer in CPU memory; a smaller image size "
        "(--set model.image_size=224) or shorter samples (--set text.max_txt_len=...) take less"
    )


@dataclass(frozen=True)
class _Choice:
    """Settings to try: micro-batch, gradient checkpointing, ZeRO, bits of frozen weights, whether the ViT's too."""

    size: int
    again: bool
    setting: str
    bits: int | None
    vision: bool


def _memory_of(recipe: Recipe, ranks: int) -> Callable[[_Choice], float]:
    """Return a function from a choice to the bytes on one GPU."""
    from tinygptv_ds.estimate.data_summary import summarize_data
    from tinygptv_ds.estimate.memory import MicroBatchSize, step_memory
    from tinygptv_ds.estimate.model_size import (
        model_configuration,
        parameter_counts,
        parameter_shapes,
        phi_sizes,
        quantized_weights,
        trained_parts,
    )

    sample, features = summarize_data(recipe).sample, recipe.data.features is not None
    config = model_configuration(recipe, phi_sizes(recipe)[0])
    shapes, trained = parameter_shapes(config), trained_parts(recipe)
    counts, flat = parameter_counts(shapes), ranks == 1 and not recipe.train.deepspeed_checkpoints

    def memory(choice: _Choice) -> float:
        quantized = quantized_weights(shapes, choice.bits, vision=choice.vision, fp8=recipe.model.fp8)
        batch = MicroBatchSize(choice.size, sample, float(choice.again), features)
        return step_memory(config, counts, trained, batch, ranks, quantized, flat=flat)[choice.setting].total

    return memory


def _quantizations(recipe: Recipe, devices: Devices, *, keep_bits: bool) -> list[tuple[int | None, bool]]:
    """Return values of `model.frozen_bits` and `model.quantize_vision` to try, from those that change least on."""
    model, trained = recipe.model, recipe.model.train or ()
    if keep_bits:
        return [(model.frozen_bits, model.quantize_vision)]
    if not devices.quantizes or "llm" in trained or model.fp8 == "all":
        return [(None, False)]
    return [(None, False), (8, False), (4, False), *([] if "vit" in trained or model.fp8 else [(4, True)])]


def _choices(
    recipe: Recipe, sizes: list[int], ranks: int, quantizations: Sequence[tuple[int | None, bool]]
) -> Iterator[_Choice]:
    divides = recipe.model.fp8 is None  # ZeRO-3 goes with no quantized weight
    enough = [size for size in sizes if size >= min(_FEW_SAMPLES, sizes[0])]
    for bits, vision in quantizations:
        yield from (_Choice(size, False, "ZeRO-2", bits, vision) for size in enough)
        few = bits is None or (bits, vision) == quantizations[-1]  # rather fewer bits than fewer samples
        yield from (_Choice(size, True, "ZeRO-2", bits, vision) for size in (sizes if few else enough))
        if bits is None and ranks > 1 and divides:
            yield from (_Choice(size, True, "ZeRO-3", None, False) for size in sizes)
    if (None, False) in quantizations and divides:
        yield from (_Choice(size, True, "ZeRO-3 + CPU offload", None, False) for size in sizes)


def _file(setting: str, bf16: bool) -> str:
    precision = "bf16" if bf16 else "fp16"
    named = {"ZeRO-2": f"zero2_{precision}.json", "ZeRO-3": f"zero3_{precision}.json"}
    return named.get(setting, "zero3_offload.json")
