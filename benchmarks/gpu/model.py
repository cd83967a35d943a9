"""A model of the published or a tiny size with random weights, and batches for it. No file is written or read."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.plan import Case
from benchmarks.made_up import SIZES
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.batch import MicroBatch, collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.estimate.data_summary import ASSUMED, MeanSample
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.fp8_linear import check_fp8_device, use_fp8
from tinygptv_ds.models.frozen_linear import FrozenLinear
from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.models.quantized_linear import quantize_layers
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE, TokenRow
from tinygptv_ds.weights.assemble import typed_meta_model

DATASET = "made up"
_TINY = {"model.proj_hidden_size=24", "model.lora_alpha=4"}
_DIFFERENT = 4  # number of batches that are used in turn


def overrides(stage: int, size: str) -> list[str]:
    """Return the changes to a stage's recipe for `load_recipe`: image size and LoRA of the tiny model."""
    if size == "published":
        return []
    return [f"model.image_size={14 * (2 if stage == 1 else 4)}", f"model.lora_r={0 if stage == 1 else 4}", *_TINY]


def model_config(recipe: Recipe, size: str) -> TinyGPTVConfig:
    """Return a stage's configuration: images, projections and LoRA from its recipe, the rest published or tiny."""
    section, base = recipe.model, SIZES[size]
    return TinyGPTVConfig(
        vision_config={**base.vision_config.to_dict(), "image_size": section.image_size},
        qformer_config=deepcopy(base.qformer_config),
        text_config=deepcopy(base.text_config),
        num_query_tokens=base.num_query_tokens,
        proj_hidden_size=section.proj_hidden_size,
        lora_r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        lora_targets=tuple(section.lora_targets),
    )


def build(
    config: TinyGPTVConfig, frozen: torch.dtype, device: torch.device, bits: int | None = None, *, fp8: bool = False
) -> TinyGPTVForConditionalGeneration:
    """Create the model with random weights on the device; it trains the parts of its stage.

    Args:
        config: the model's configuration; LoRA is trained if the model has it.
        frozen: dtype of the frozen weights; the trained ones are in fp32.
        device: the device.
        bits: of the frozen weights of Phi's linear layers; None: as `frozen`.
        fp8: whether the frozen linear layers of Phi and the ViT compute in fp8.

    Raises:
        ConfigError: the device cannot compute in fp8.
    """
    model = typed_meta_model(config, frozen)
    quantized: dict[str, FrozenLinear] = {}
    if fp8:
        check_fp8_device(device)
        quantized |= use_fp8(model, phi=True)
    if bits is not None:
        quantized |= quantize_layers(model, bits, vision=False)
    model.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                inputs = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
                drawn = torch.randn(
                    parameter.shape, generator=random, device=device
                )  # drawn in fp32, so that every dtype gets the same values
                parameter.copy_(drawn * inputs**-0.5)  # the output has about the scale of the input
            else:
                parameter.fill_(1.0 if name.endswith(".weight") else 0.0)  # norms and biases
        for buffer in model.buffers():
            buffer.zero_()
    for layer in quantized.values():
        layer.store(torch.randn(layer.out_features, layer.in_features) * layer.in_features**-0.5)
    train_only(model, projections, norms, *([lora] if config.lora_r else []))
    return model


@dataclass(frozen=True)
class Batches:
    """A few micro-batches on the host, used in turn.

    Attributes:
        loaded: the micro-batches as the loader yields them.
        mean: their mean sample.
    """

    loaded: list[MicroBatch]
    mean: MeanSample


def make_batches(config: TinyGPTVConfig, case: Case, seed: int, *, pinned: bool) -> Batches:
    """Return samples of one image and about as many tokens as those of the stage have (`data_summary.ASSUMED`).

    Args:
        config: the model's configuration.
        case: gives stage, source and number of samples.
        seed: different for every rank.
        pinned: whether to use pinned memory, as the loader does for a GPU.
    """
    rng = np.random.default_rng((seed, case.stage, case.batch, case.source == "pixels"))
    mean, size = ASSUMED[case.stage], config.vision_config.image_size
    queries, width = config.num_query_tokens, config.qformer_config.hidden_size
    asked = max(1, round(mean.tokens - mean.targets) - IMAGE_ROWS)
    loaded, lengths, targets = [], [], []
    for number in range(_DIFFERENT):
        rows = [_row(rng, config, _around(rng, asked), _around(rng, round(mean.targets))) for _ in range(case.batch)]
        refs = [SampleRef(number * case.batch + i, DATASET, 0, 0, i) for i in range(case.batch)]
        shape = (case.batch, 1 if case.source == "pixels" else 0, 3, size, size)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        features = torch.from_numpy(rng.standard_normal((case.batch, 1, queries, width), dtype=np.float32)).bfloat16()
        made = [None] * case.batch if case.source == "pixels" else list(features)
        samples = [Sample(*each) for each in zip(refs, rows, pixels, made, strict=True)]
        none = None if case.source == "pixels" else features[0][:0]
        batch = collate(samples, [DATASET], queries=queries, image_size=size, bos=0, no_features=none)
        loaded.append(MicroBatch(batch.pin_memory() if pinned else batch, ()))
        lengths += [len(row) for row in rows]
        targets.append(len(batch.targets))
    return Batches(loaded, MeanSample(1, float(np.mean(lengths)), sum(targets) / len(lengths)))


IMAGE_ROWS = 32  # rows of the image, which `ASSUMED` counts among the tokens


def _around(rng: np.random.Generator, mean: int) -> int:
    """Return a random number between half and one and a half times `mean`."""
    return int(rng.integers(max(1, mean // 2), mean + mean // 2 + 1))


def _row(rng: np.random.Generator, config: TinyGPTVConfig, asked: int, answered: int) -> TokenRow:
    """Return a sequence of a BOS token and a prompt, the image, and target tokens."""
    queries = config.num_query_tokens
    length = asked + queries + answered
    ids = rng.integers(0, config.image_token_id, length)
    ids[asked : asked + queries] = config.image_token_id
    labels = np.where(np.arange(length) < asked + queries, IGNORE, ids)
    return TokenRow(ids, labels, np.arange(length), np.arange(asked, asked + queries), np.arange(queries))
