"""GPU memory of a training step in bf16, from the recipe's sizes alone.

Weights, optimizer states and gradients are counted. Activations are what each operation keeps for the backward pass
under autocast, per row of Phi; a test compares them with what torch keeps of a small model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tinygptv_ds.estimate.data_summary import MeanSample
from tinygptv_ds.estimate.model_size import QuantizedWeights
from tinygptv_ds.models.flops import phi_linears

if TYPE_CHECKING:
    from tinygptv_ds.models.configuration import TinyGPTVConfig

SETTINGS = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 + CPU offload")
WITH_QUANTIZED = ("ZeRO-1", "ZeRO-2")  # those of `SETTINGS` that go with quantized weights
GIB = 2**30
_CONTEXT = 1.0 * GIB  # CUDA, cuBLAS and NCCL take 0.6 to 1.2 GiB
_MARGIN = 0.06  # share of the rest that the allocator cannot use
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
        """Return the sum of all."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class MicroBatchSize:
    """The micro-batch of one GPU.

    Attributes:
        samples: number of samples.
        sample: the mean sample.
        recomputed: share of Phi's blocks that are recomputed in the backward pass.
        from_features: ViT and Q-Former do not run.
    """

    samples: float
    sample: MeanSample
    recomputed: float = 0.0
    from_features: bool = False


def step_memory(
    config: TinyGPTVConfig,
    counts: Mapping[str, int],
    trained: Collection[str],
    batch: MicroBatchSize,
    gpus: int,
    quantized: QuantizedWeights | None = None,
    *,
    flat: bool = False,
) -> dict[str, Memory]:
    """Return the peak of a step on one GPU under each of `SETTINGS`; quantized weights do not go with ZeRO-3.

    Args:
        config: the model's configuration.
        counts: parameters by part.
        trained: trained parts.
        batch: the micro-batch of one GPU.
        gpus: number of GPUs that ZeRO divides its states among.
        quantized: frozen weights that are kept in fewer than 16 bit.
        flat: ZeRO-1 and 2 leave the optimizer to flat tensors, as a run on one GPU does. The weights are views of them,
            so that there is no other copy, and the gradients of a backward pass are added to flat ones: no buckets.
    """
    trainable = sum(count for part, count in counts.items() if part in trained)
    frozen = sum(counts.values()) - trainable
    whole = 2.0 * frozen + 4 * trainable
    activations = _activations(config, trained, batch)
    activations += 2 * trainable  # autocast's bf16 copies
    if quantized is not None:
        whole -= 2 * quantized.count - quantized.stored
        activations += 2 * quantized.largest  # one layer at a time is restored to 16 bit
    logits = _PER_LOGIT * batch.samples * batch.sample.targets * config.text_config.vocab_size
    bucket = 4 * 2 * min(_BUCKET, trainable)  # one bucket is filled while another is reduced
    gathered = _gathered(config)
    states = 12 * trainable / gpus  # fp32 copy and two moments
    rows = {
        "ZeRO-1": (whole, 8.0 * trainable, 8.0 * trainable) if flat else (whole, states, 4 * trainable + bucket),
        "ZeRO-2": (whole, 8.0 * trainable, 8.0 * trainable) if flat else (whole, states, 4 * trainable / gpus + bucket),
        "ZeRO-3": (whole / gpus + gathered, states, 4 * trainable / gpus + bucket),
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
        if quantized is None or name in WITH_QUANTIZED
    }


def fits(memory: Memory, gib: float) -> bool:
    """Return whether a card of so many GiB has room for it."""
    return memory.total <= gib * GIB


def phi_row_bytes(config: TinyGPTVConfig, trained: Collection[str]) -> float:
    """Return the bytes per row that one of Phi's blocks keeps for the backward pass.

    Attention is that of packed rows; as SDPA, which pads them, it would keep 6 bytes more per unit of width.
    """
    text = config.text_config
    width, mlp = text.hidden_size, text.intermediate_size
    with_lora = config.lora_r > 0 and "lora" in trained
    keeps = 4.0 * width  # input norm: its input in fp32
    keeps += 2 * 4 * width  # q and k norms: their inputs in fp32
    keeps += 2 * (2 + 3 + 1) * width  # attention: rotated q and k, all of qkv, of which v is a view, and its output
    keeps += 4 * width  # attention-output norm: its input in fp32
    keeps += 4 * (3 + 5 * text.num_attention_heads)  # the norms' means and deviations, and attention's log-sum-exps
    keeps += 2 * mlp  # input of GELU
    keeps += 2 * width  # dropout masks
    if with_lora:
        widths = [inputs for name, (inputs, _) in phi_linears(width, mlp).items() if name in config.lora_targets]
        keeps += sum(3 * inputs + 2 * config.lora_r for inputs in widths)  # input after dropout, its mask, A's output
    if "llm" in trained:
        keeps += 2 * width + 2 * mlp  # inputs of the first linear layers and of the last one
    return keeps


def _activations(config: TinyGPTVConfig, trained: Collection[str], batch: MicroBatchSize) -> float:
    text, rows = config.text_config, batch.samples * batch.sample.tokens
    whole = phi_row_bytes(config, trained)
    kept = (1 - batch.recomputed) * whole + batch.recomputed * 2 * text.hidden_size
    block_again = whole if batch.recomputed else 0.0
    phi = rows * (text.num_hidden_layers * kept + block_again)
    images = 0.0 if batch.from_features else batch.samples * batch.sample.images
    vision = images * _vision_bytes(config, trained, recomputed=batch.recomputed > 0)
    # Activations of a frozen vision path are freed before Phi begins.
    return phi + vision if {"vit", "qformer"} & set(trained) else max(phi, vision)


def _vision_bytes(config: TinyGPTVConfig, trained: Collection[str], *, recomputed: bool) -> float:
    """Return the bytes of one image: what is kept where ViT or Q-Former are trained, else the widest block's peak."""
    vit, qformer = config.vision_config, config.qformer_config
    patches = (vit.image_size // vit.patch_size) ** 2 + 1
    peak = patches * 2 * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    row = _GENERIC_ROW * vit.hidden_size
    # Recomputed blocks keep their inputs, in fp32, and one block at a time all of its rows.
    of_blocks = vit.num_hidden_layers * 4 * vit.hidden_size + row if recomputed else vit.num_hidden_layers * row
    kept_vit = patches * of_blocks if "vit" in trained else peak
    if {"vit", "qformer"} & set(trained):
        blocks = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
        cross_attention = blocks * patches * 2 * 2 * qformer.hidden_size
        rows = config.num_query_tokens * qformer.num_hidden_layers
        return kept_vit + cross_attention + rows * _GENERIC_ROW * qformer.hidden_size
    return kept_vit


def _gathered(config: TinyGPTVConfig) -> float:
    """Return the bytes that ZeRO-3 keeps whole at a time: a block or two fetched ahead, or the largest matrix."""
    text = config.text_config
    block = sum(inputs * outputs for inputs, outputs in phi_linears(text.hidden_size, text.intermediate_size).values())
    return 2 * max(text.vocab_size * text.hidden_size, _BUCKET + 2 * block)


def _reserve(used: float) -> float:
    return _CONTEXT + _MARGIN * used
