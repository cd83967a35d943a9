"""From a recipe to each rank's share: for any ranks, batch sizes and places to start, one global order."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream, Planner, open_stream
from tinygptv_ds.errors import DataError

RAW = Callable[..., dict[str, Any]]
SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opened(raw: dict[str, Any], **options: bool) -> OpenStream:
    return open_stream(build_recipe(raw, "test"), **options)


def together(stream: OpenStream, world: int, step: int) -> list[SampleRef]:
    """What all ranks compute in a step, each planning it by itself."""
    shares = []
    for rank in range(world):
        plan = Planner(stream, world).plan(step)
        shares += [ref for n in range(plan.packing.micro_batches) for ref in plan.micro_batch(n, rank)]
    return sorted(shares, key=lambda ref: ref.position)


@SETTINGS
@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.one_of(st.none(), st.integers(30, 300)), st.booleans()
)
def test_ranks_and_packing_never_change_a_step(
    raw_recipe: RAW, world: int, micro: int, accumulation: int, max_tokens: int | None, homogeneous: bool
) -> None:
    size = {"micro_batch_size": micro} if max_tokens is None else {"max_tokens": max_tokens}
    raw = raw_recipe(data__homogeneous=homogeneous)
    raw["train"] = {"batch_size": world * micro * accumulation, "steps_per_epoch": 9, **size}
    stream = opened(raw)
    for step in (7, 0, 3):
        assert together(stream, world, step) == stream.order.step(step)


@SETTINGS
@given(st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5]))
def test_every_sample_once_an_epoch(raw_recipe: RAW, batch_size: int, share: float) -> None:
    """Of one dataset, held-out samples aside, wherever the steps cut the epoch."""
    raw = raw_recipe(data__validation_share=share)
    raw["data"]["datasets"] = raw["data"]["datasets"][:1]
    raw["train"] = {"batch_size": batch_size, "micro_batch_size": 1}
    stream, kept = opened(raw), 12 - int(12 * share)
    refs = [ref for step in range(-(-3 * kept // batch_size)) for ref in together(stream, 1, step)]
    for epoch in range(2):
        seen = Counter((ref.shard, ref.index) for ref in refs if ref.epoch == epoch)
        assert len(seen) == kept and set(seen.values()) == {1}


def test_held_out_samples_are_the_last_of_each_shard(raw_recipe: RAW) -> None:
    """Neighbours often share an image, so those held out lie together."""
    raw = raw_recipe(data__validation_share=0.4)  # 12 samples in shards of 5, 5 and 2
    found = {
        held_out: {(ref.shard, ref.index) for s in range(20) for ref in opened(raw, held_out=held_out).order.step(s)}
        for held_out in (False, True)
    }
    assert found[True] == {(0, 3), (0, 4), (1, 3), (1, 4)}
    assert found[False] == {(s, i) for s, n in enumerate((5, 5, 2)) for i in range(n)} - found[True]


def test_a_share_that_holds_out_nothing_is_an_error(raw_recipe: RAW) -> None:
    with pytest.raises(DataError, match=r"dataset vqa: data.validation_share 0.01 of its 12 samples holds out none"):
        opened(raw_recipe(data__validation_share=0.01))


def test_a_shard_that_vanishes_shifts_nothing(raw_recipe: RAW, tmp_path: Path) -> None:
    """Its samples are still dealt out (and drop out where they are read)."""
    from helpers import tiny

    shards = tiny.write_shards(tmp_path / "vqa", tiny.samples("vqa", 12))
    stream = opened(raw_recipe(data__datasets=[{"name": "vqa", "shards": str(shards)}]))
    (shards / "00001.tar").unlink()
    assert together(stream, 2, 0) == stream.order.step(0)
