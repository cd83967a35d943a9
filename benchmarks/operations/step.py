"""The operations of one training step of the published size, forward and backward, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.fake_gpu import DEVICE, backward, fake_gpu, fake_model, on_gpu
from benchmarks.gpu.model import make_batches, model_config, overrides
from benchmarks.gpu.plan import Case
from benchmarks.operations.record import Recorder
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.models import dropout
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import weight_decay_groups
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.flat_optimizer import FlatOptimizer
from tinygptv_ds.train.micro_batch_loss import micro_batch_loss
from tinygptv_ds.train.transfer import model_inputs

VISION, PROJECTIONS, PHI, HEAD, OPTIMIZER = "vision", "projections", "phi", "head and loss", "optimizer"


@dataclass(frozen=True)
class RecordedStep:
    """A recorded step.

    Attributes:
        recorder: its operations.
        model: the model, with gradients where no optimizer took them over.
        token_losses: fp32 `[targets]`, fake.
        tokens: rows of Phi.
        targets: target tokens.
    """

    recorder: Recorder
    model: TinyGPTVForConditionalGeneration
    token_losses: Tensor
    tokens: int
    targets: int


def published_config(stage: int) -> TinyGPTVConfig:
    """Return the configuration of a stage at the published size."""
    return model_config(
        load_recipe(project_root() / f"stages/stage{stage}.yaml", overrides(stage, "published")), "published"
    )


def record_step(
    case: Case, config: TinyGPTVConfig | None = None, attention: str = "torch_varlen", *, one_rank: bool = False
) -> RecordedStep:
    """Return the operations of one micro-batch, forward and backward, on a fake GPU.

    Args:
        case: stage, precision, source and number of samples.
        config: the model's configuration; None: the published one.
        attention: the attention backend.
        one_rank: as on a single rank: LoRA's weights are cast together, and a step of its optimizer follows.
    """
    config = published_config(case.stage) if config is None else config
    batch = make_batches(config, case, 0, pinned=False).loaded[0].batch
    lengths = np.diff(batch.cu_seqlens.numpy()).astype(np.float64)
    norm = (1.0,) if one_rank else ()  # the host reads it
    recorder = Recorder(squares=float(np.square(lengths).sum()), values=norm)
    with fake_gpu(), _compiled_dropout(recorder):
        model = fake_model(config, DTYPES[case.precision])
        model.attention = attention
        model.language_model.model.gradient_checkpointing = int(case.recompute)
        model.language_model.model.cast_lora_together = one_rank
        optimizer = _flat_optimizer(model) if one_rank else None
        _mark_parts(recorder, model)
        inputs = {name: on_gpu(value) for name, value in model_inputs(batch).items()}
        divisor = torch.full((), float(len(batch.targets)), device=DEVICE)
        with recorder:
            with recorder.part(HEAD):
                with torch.autocast(DEVICE, DTYPES[case.precision]):
                    output = model(**inputs)
                loss = micro_batch_loss(output, divisor, count=1, world_size=1)
            backward(loss, recorder.backward_of)
            if optimizer is not None:
                with recorder.part(OPTIMIZER):
                    optimizer.add_gradients()
                    optimizer.step()
    return RecordedStep(recorder, model, output.token_losses, len(batch.input_ids), len(batch.targets))


def _flat_optimizer(model: TinyGPTVForConditionalGeneration) -> FlatOptimizer:
    """Return the optimizer of a single rank, after the first step, which makes the moments."""
    groups = weight_decay_groups(model, weight_decay=0.05)
    optimizer = FlatOptimizer(groups, lambda flat: torch.optim.AdamW(flat, fused=True), gradient_clipping=0.0)
    optimizer.optimizer.step()
    return optimizer


def _mark_parts(recorder: Recorder, model: TinyGPTVForConditionalGeneration) -> None:
    recorder.mark_blocks(model, tuple(model._no_split_modules))
    recorder.wrap(model, "encode_vision", lambda: recorder.part(VISION))
    recorder.wrap(model, "project", lambda: recorder.part(PROJECTIONS))
    recorder.wrap(model.language_model.model, "forward", lambda: recorder.part(PHI))


@contextmanager
def _compiled_dropout(recorder: Recorder) -> Iterator[None]:
    """Mark dropout, which is compiled into one kernel on every GPU, and run it uncompiled: fake tensors need that."""

    def kernel(p: float, device: str) -> dropout.Drop:
        plain = dropout._drop_at(p)

        def drop(x: Tensor, first: Tensor, second: Tensor, features: Tensor) -> Tensor:
            with recorder.block(inner=True):
                return plain(x, first, second, features)

        return drop

    with patch.object(dropout, "kernel", kernel):
        yield
