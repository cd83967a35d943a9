"""Engines of one rank around a model of the published depth and a tiny width, for tests in a process of their own."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from benchmarks.made_up import SIZES
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.distributed import Ranks, complete_env
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.engine import MOMENTS, Engine, init_process_group

ONE = Ranks(0, 0, 1, 1)
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "steps_per_print": 1_000_000_000,
    "timers": {"throughput": {"enabled": False}},
}


def join() -> None:
    """Be the only rank."""
    complete_env()
    init_process_group(ONE, timedelta(minutes=5))


def tiny_model(*, layers: int, lora_r: int) -> TinyGPTVForConditionalGeneration:
    """Return a model of so many blocks of Phi with the published trainable parts: 133 tensors at 32, 261 with LoRA."""
    torch.manual_seed(0)
    config = SIZES["tiny"].to_dict()
    config["text_config"]["num_hidden_layers"] = layers
    model = TinyGPTVForConditionalGeneration(TinyGPTVConfig(**{**config, "lora_r": lora_r}))
    train_only(model, projections, norms, *([lora] if lora_r else []))
    return model


def tiny_engine(
    zero: int = 2,
    *,
    keep_zero: bool = False,
    layers: int = 2,
    lora_r: int = 4,
    weights: Mapping[str, Tensor] | None = None,
    **changes: Any,
) -> Engine:
    """Return an engine around `tiny_model`, with the weights of a `state_of`; `changes` are of DeepSpeed's JSON."""
    model = tiny_model(layers=layers, lora_r=lora_r)
    if weights is not None:
        trained = {name.removeprefix("weight/"): w for name, w in weights.items() if name.startswith("weight/")}
        assert not model.load_state_dict(trained, strict=False).unexpected_keys
    config = {**DEEPSPEED, "zero_optimization": {"stage": zero, "overlap_comm": False}, **changes}
    return Engine(model, config, OptimizerSection(lr=1e-3, min_lr=0.0), ONE, keep_zero=keep_zero)


def inputs(number: int, *, image: bool = True) -> dict[str, Any]:
    """Return a micro-batch of one sample, the same for the same number."""
    queries, length = SIZES["tiny"].num_query_tokens, 9 + number % 3
    ids = (torch.arange(length) * (number + 3)) % 40
    pixels = torch.full((int(image), 3, 28, 28), number + 1, dtype=torch.uint8)
    rows = torch.arange(queries if image else 0)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "max_seqlen": length,
        "pixel_values": pixels,
        "image_rows": rows,
        "image_index": rows,
        "target_rows": torch.arange(queries, length - 1),
        "targets": ids[queries + 1 :],
        "dropout_keys": ids * 7 + number,
    }


def train_step(
    engine: Engine,
    number: int,
    *,
    images: tuple[bool, ...] = (True,),
    factor: float = 1e-3,
    rate: float = 1e-3,
    targets: int = 1,
) -> list[Tensor]:
    """Take a step of one micro-batch for each of `images`; returns their losses, times `factor`."""
    engine.begin_step(targets=targets, images=sum(images))
    engine.set_learning_rate(rate)
    losses = []
    for place, image in enumerate(images):
        engine.set_boundary(place + 1 == len(images))
        output = engine.forward(inputs(number + place, image=image))
        losses.append(output.token_losses.sum() * factor + output.anchor)
        engine.backward(losses[-1])
        engine.step()
    return [loss.detach() for loss in losses]


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Return weights, moments and step counts."""
    state = {f"weight/{name}": weight for name, weight in engine.trained_state().items()}
    for moment in MOMENTS:
        state |= {f"{moment}/{name}": value for name, value in engine.moments(moment).items()}
    return state | {"steps": torch.tensor([engine.optimizer_steps, engine.image_steps, engine.skipped_steps])}
