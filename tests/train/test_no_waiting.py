"""Within a step the host does not wait for the device: it reads nothing from it and copies nothing to it unpinned.

Seen on a CPU, where the same operations run: what would read a value of a tensor or make one from values of the host.
"""

import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.made_up import SIZES
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.batch import MicroBatch, collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.models.parameters import lora, norms, projections, train_only, weight_decay_groups
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE, TokenRow
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.liveness.progress import Progress
from tinygptv_ds.train.metrics.accumulator import Accumulator
from tinygptv_ds.train.metrics.stopwatch import Stopwatch
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.step import optimizer_step
from tinygptv_ds.train.transfer import Transfer
from tinygptv_ds.train.untouched import LeaveUntouched

# Reading a value; shapes that depend on values; a tensor of the host's values, which is then copied to the device.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh"}


class Watch(TorchDispatchMode):
    """A recorder of every operation that waits, with the place of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in WAITS:
            ours = [frame for frame in traceback.extract_stack() if "tinygptv_ds" in frame.filename]
            self.seen.append(f"{name}: {ours[-1].filename}:{ours[-1].lineno}" if ours else name)
        return func(*args, **(kwargs or {}))


class Plain:
    """The part of a DeepSpeed engine that a step calls."""

    def __init__(self, model: TinyGPTVForConditionalGeneration) -> None:
        self.model = model
        self.optimizer = SimpleNamespace(param_groups=[])

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None: ...


def sample(number: int, features: bool) -> Sample:
    config = SIZES["tiny"]
    queries, length = config.num_query_tokens, config.num_query_tokens + 6
    ids = np.arange(length) + number
    ids[:queries] = config.image_token_id
    labels = np.where(np.arange(length) < queries, IGNORE, ids)
    row = TokenRow(ids, labels, np.arange(length), np.arange(queries), np.arange(queries))
    pixels = np.full((0 if features else 1, 3, 28, 28), number, dtype=np.uint8)
    made = torch.ones(1, queries, config.qformer_config.hidden_size) if features else None
    return Sample(SampleRef(number, "vqa", 0, 0, number), row, pixels, made)


@pytest.mark.parametrize("source", ["pixels", "features"])
def test_a_step(source: str, raw_recipe: Callable[..., dict[str, Any]]) -> None:
    torch.manual_seed(0)
    config, features = SIZES["tiny"], source == "features"
    model = TinyGPTVForConditionalGeneration(config)
    train_only(model, projections, norms, lora)
    engine = Engine.__new__(Engine)
    engine.deepspeed, engine.module, engine.device = Plain(model), model.train(), torch.device("cpu")
    engine.scale = engine.flat = None
    engine.untouched = LeaveUntouched(torch.optim.AdamW(weight_decay_groups(model, 0.05)), engine.device)
    engine.forward_clock = Stopwatch(engine.device)
    engine.ranks = Ranks(0, 0, 1, 1)
    job = SimpleNamespace(recipe=build_recipe(raw_recipe(), "test"), ranks=engine.ranks)
    run = Run(job, engine, Progress(0, job.recipe.train, lambda timeout: None))
    none = torch.zeros(0, config.num_query_tokens, config.qformer_config.hidden_size) if features else None
    sizes = {"queries": config.num_query_tokens, "image_size": 28, "bos": 1, "no_features": none}
    loaded = [MicroBatch(collate([sample(n, features), sample(n + 1, features)], ["vqa"], **sizes), ()) for n in (0, 2)]
    accumulator, transfer = Accumulator(engine, ["vqa"]), Transfer(engine.device)
    with Watch() as watch:
        optimizer_step(run, 1, loaded, accumulator, transfer)
    assert watch.seen == []
    assert watch.calls > 100
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
