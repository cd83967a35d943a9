"""The validation loss: fixed samples, each once for any number of ranks, without dropout or gradient."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Tokens, open_tokens
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.data.stream.validation import validation_stream
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import ImageTokens
from tinygptv_ds.train.callbacks.validation_loss import ValidationLoss
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.transfer import model_inputs
from tinygptv_ds.weights.assemble import build_model

RAW = Callable[..., dict[str, Any]]


def fake_run(raw: dict[str, Any]) -> tuple[SimpleNamespace, Tokens]:
    """Return a run of one rank without DeepSpeed; `inference` is the real engine's."""
    recipe = build_recipe(raw, "test")
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.text, frozen_dtype=torch.float32).train()
    engine = SimpleNamespace(
        module=model, device=torch.device("cpu"), all_reduce=lambda tensor: tensor, precision="fp32"
    )
    engine.inference = lambda: Engine.inference(engine)
    run = SimpleNamespace(engine=engine, recipe=recipe, ranks=Ranks(0, 0, 1, 1), on_hang=None)
    return run, open_tokens(recipe, model.config)


def alone(model: TinyGPTVForConditionalGeneration, run: SimpleNamespace, tokens: Tokens, ref: SampleRef) -> Any:
    """Return the token losses of one sample by itself, in evaluation mode."""
    stream = open_stream(run.recipe, held_out=True)
    batches = MicroBatches(stream, tokens, rank=0, world_size=1)
    batches._planner = SimpleNamespace(plan=lambda _: SimpleNamespace(micro_batch=lambda *_: [ref]))
    with torch.no_grad():
        return model.eval()(**model_inputs(batches[0, 0].batch)).token_losses.double()


def test_it_is_the_mean_over_all_targets(raw_recipe: RAW) -> None:
    """It covers the first held-out samples of each dataset one by one; dropout is on only in training."""
    raw = raw_recipe(data__validation_share=0.5, train__validation_samples=4, model__resid_dropout=0.5)
    run, tokens = fake_run(raw)
    validation = ValidationLoss(run, tokens, None, None)
    measured = validation.measure(1)
    assert run.engine.module.training and all(p.grad is None for p in run.engine.module.parameters())
    assert validation.measure(2) == measured
    held_out = open_stream(run.recipe, held_out=True)
    losses = {}
    for name in held_out.names:
        refs = [SampleRef(0, name, *held_out.orders[name].locate(k)) for k in range(4)]
        losses[name] = torch.cat([alone(run.engine.module, run, tokens, ref) for ref in refs])
        assert measured[f"val/loss_{name}"] == pytest.approx(losses[name].mean().item(), rel=1e-5)
    assert measured["val/loss"] == pytest.approx(torch.cat(list(losses.values())).mean().item(), rel=1e-5)


def test_without_validation_samples_there_is_no_loss(raw_recipe: RAW) -> None:
    run, tokens = fake_run(raw_recipe())
    assert ValidationLoss(run, tokens, None, None).measure(1) == {}


def test_to_validate_on_nothing_is_a_mistake(raw_recipe: RAW) -> None:
    with pytest.raises(ConfigError, match=r"train\.validate_every is set, .* data\.validation_share"):
        build_recipe(raw_recipe(train__validate_every=5), "test")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.integers(1, 4),
    samples=st.integers(1, 7),
    size=st.one_of(st.tuples(st.integers(1, 3), st.none()), st.tuples(st.none(), st.integers(120, 400))),
)
def test_every_sample_once_in_the_same_number_of_passes(
    world_size: int, samples: int, size: tuple[int | None, int | None], raw_recipe: RAW
) -> None:
    """With packing by samples or by tokens, ranks without samples take part with an empty batch."""
    raw = raw_recipe(data__validation_share=0.5, train__validation_samples=samples, train__batch_size=12)
    raw["train"] |= {"micro_batch_size": size[0], "max_tokens": size[1]}
    recipe = build_recipe(raw, "test")
    stream = validation_stream(recipe)
    image = ImageTokens(500, tiny.QUERIES)
    tokens = Tokens(open_tokenizer(recipe.model.phi), recipe.text, image, tiny.IMAGE_SIZE)
    seen, passes = [], set()
    for rank in range(world_size):
        batches = MicroBatches(stream, tokens, rank=rank, world_size=world_size)
        steps = load_steps(batches, first=0, last=stream.order.steps, num_workers=0, pin_memory=False)
        loaded = [item for step in steps for item in step]
        assert not any(item.skipped for item in loaded)
        seen += [ref for item in loaded for ref in item.batch.sample_ids]
        passes.add(len(loaded))
    assert len(passes) == 1
    assert sorted(ref.position for ref in seen) == list(range(samples_of(stream, samples)))
    for name, order in stream.orders.items():
        mine = {(ref.epoch, ref.shard, ref.index) for ref in seen if ref.dataset == name}
        assert mine == {order.locate(k) for k in range(min(samples, len(order)))}


def samples_of(stream: Any, samples: int) -> int:
    return sum(min(samples, len(order)) for order in stream.orders.values())


def open_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_validation_datasets_are_taken_whole(raw_recipe: RAW, shards: dict[str, Path]) -> None:
    named = [{"name": "unseen", "shards": str(shards["chat"])}]
    stream = validation_stream(build_recipe(raw_recipe(data__validation=named), "test"))
    refs = [ref for step in range(stream.order.steps) for ref in stream.order.step(step)]
    assert len({(ref.shard, ref.index) for ref in refs}) == len(refs) == 12 and {r.dataset for r in refs} == {"unseen"}
