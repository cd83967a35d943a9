"""Micro-batches: the same whatever the workers and ranks, and a sample that drops out moves nothing else."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image
from torch import Tensor

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.batch import Batch, MicroBatch, collate
from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Sample, Tokens, open_tokens
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream, open_stream
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.sequence import IGNORE, TokenRow

STEPS = 4
RAW = Callable[..., dict[str, Any]]


def stream_of(raw: dict[str, Any]) -> tuple[OpenStream, Tokens]:
    recipe = build_recipe(raw, "test")
    vision = SimpleNamespace(image_size=tiny.IMAGE_SIZE)
    config = SimpleNamespace(image_token_id=-1, num_query_tokens=tiny.QUERIES, vision_config=vision)
    return open_stream(recipe), open_tokens(recipe, config)


def load(raw: dict[str, Any], *, rank: int = 0, world: int = 1, workers: int = 0, first: int = 0) -> list[MicroBatch]:
    stream, tokens = stream_of(raw)
    dataset = MicroBatches(stream, tokens, rank=rank, world_size=world)
    steps = load_steps(dataset, first=first, last=STEPS, num_workers=workers, pin_memory=False)
    return [loaded for step in steps for loaded in step]


def in_order(*ranks: list[MicroBatch]) -> list[tuple[SampleRef, list[int], list[int], Tensor]]:
    """The samples of all ranks together, in the order of the stream."""
    samples = [sample for rank in ranks for loaded in rank for sample in samples_of(loaded.batch)]
    return sorted(samples, key=lambda sample: sample[0].position)


def assert_same(ours: Batch, theirs: Batch) -> None:
    for f in fields(Batch):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b, f.name


def samples_of(batch: Batch) -> Iterator[tuple[SampleRef, list[int], list[int], Tensor]]:
    """A batch taken apart again: which sample, its tokens, positions, and the pixels that its rows show."""
    queries = tiny.QUERIES
    for number, ref in enumerate(batch.sample_ids):
        start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
        mine = (batch.image_rows >= start) & (batch.image_rows < end)
        shown = batch.pixel_values[batch.image_index[mine][::queries] // queries]
        yield ref, batch.input_ids[start:end].tolist(), batch.position_ids[start:end].tolist(), shown


@pytest.fixture
def mixed(raw_recipe: RAW) -> dict[str, Any]:
    return raw_recipe(train__batch_size=8, train__micro_batch_size=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, mixed: dict[str, Any]) -> None:
    alone, parallel = load(mixed), load(mixed, workers=workers)
    assert len(alone) == len(parallel) == STEPS * 4
    for ours, theirs in zip(parallel, alone, strict=True):
        assert_same(ours.batch, theirs.batch)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_same_samples(world: int, mixed: dict[str, Any]) -> None:
    """Byte for byte the same, each on one rank, and as many on each."""
    alone = in_order(load(mixed))
    ranks = [load(mixed, rank=rank, world=world) for rank in range(world)]
    assert {len(loaded.batch.sample_ids) for rank in ranks for loaded in rank} == {2}
    together = in_order(*ranks)
    assert len(alone) == len(together) == STEPS * 8
    for ours, theirs in zip(together, alone, strict=True):
        assert ours[:3] == theirs[:3]
        assert torch.equal(ours[3], theirs[3])


def test_samples_are_those_of_the_stream(mixed: dict[str, Any]) -> None:
    stream, _ = stream_of(mixed)
    loaded = [sample[0] for sample in in_order(load(mixed))]
    assert loaded == [ref for step in range(STEPS) for ref in stream.order.step(step)]
    assert {ref.dataset for ref in loaded} == {"vqa", "text", "chat", "pair"}


def test_going_on_in_the_middle(mixed: dict[str, Any]) -> None:
    """What a resumed run reads is what an unbroken one would have read."""
    whole = load(mixed)
    for ours, theirs in zip(load(mixed, first=2, workers=1), whole[8:], strict=True):
        assert_same(ours.batch, theirs.batch)


def test_another_micro_batch_size_is_the_same_step(mixed: dict[str, Any], raw_recipe: RAW) -> None:
    other = load(raw_recipe(train__batch_size=8, train__micro_batch_size=4))
    assert [sample[:3] for sample in in_order(other)] == [sample[:3] for sample in in_order(load(mixed))]


# ---- samples that cannot be used -------------------------------------------------------------------------------------


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write(folder: Path, changes: dict[int, dict[str, bytes]]) -> Path:
    """Eight samples with an image, some members replaced."""
    folder.mkdir()
    with ShardWriter(folder, 4) as writer:
        for number in range(8):
            record = {"text": f"what is {number} ?", "answer": f"the {number}"}
            members = {"jpg": jpeg(number), "json": json.dumps(record).encode()}
            writer.write(f"key{number}", members | changes.get(number, {}))
        writer.finish()
    return folder


def only(raw_recipe: RAW, shards: Path, **train: int) -> dict[str, Any]:
    changes = {f"train__{name}": value for name, value in train.items()}
    return raw_recipe(data__datasets=[{"name": "vqa", "shards": str(shards)}], **changes)


BAD = {
    "corrupt_image": {"jpg": jpeg(5)[:200]},
    "bad_record": {"json": json.dumps({"raw": True, "text": "<ImageHere> <ImageHere>", "answer": "a"}).encode()},
    "bad_json": {"json": b"{"},
    "empty_answer": {"json": json.dumps({"text": "what is this ?", "answer": " \n"}).encode()},
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_drops_out_alone(reason: str, workers: int, raw_recipe: RAW, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good", {}), write(tmp_path / "bad", {5: BAD[reason]})
    train = {"batch_size": 4, "micro_batch_size": 2}
    whole, rest = load(only(raw_recipe, good, **train)), load(only(raw_recipe, bad, **train), workers=workers)
    skipped = [item for loaded in rest for item in loaded.skipped]
    assert [item.reason for item in skipped] == [reason] * (STEPS * 4 // 8)  # once an epoch
    for item in skipped:
        assert str(bad / "00001.tar") in item.message and "sample key5: " in item.message
        assert (item.ref.shard, item.ref.index) == (1, 1)
    gone = {item.ref for item in skipped}
    expected = [sample for sample in in_order(whole) if sample[0] not in gone]
    for mine, other in zip(in_order(rest), expected, strict=True):
        assert mine[:3] == other[:3]
        assert torch.equal(mine[3], other[3])


def test_decoding_is_the_recipes(raw_recipe: RAW, tmp_path: Path) -> None:
    """Of JPEGs more than twice the input size, fast gives other pixels, and nothing else changes."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), dtype=np.uint8)).save(out, "JPEG")
    shards = write(tmp_path / "large", {key: {"jpg": out.getvalue()} for key in range(8)})
    sections = [{"name": "vqa", "shards": str(shards)}]
    exact, fast = (load(raw_recipe(data__datasets=sections, data__decoding=way)) for way in ("exact", "fast"))
    for ours, theirs in zip(fast, exact, strict=True):
        assert torch.equal(ours.batch.input_ids, theirs.batch.input_ids)
        assert not torch.equal(ours.batch.pixel_values, theirs.batch.pixel_values)
    assert torch.equal(exact[0].batch.pixel_values[0], torch.from_numpy(to_pixels(out.getvalue(), tiny.IMAGE_SIZE)))


def test_a_placeholder_mismatch_is_explained(raw_recipe: RAW, tmp_path: Path) -> None:
    shards = write(tmp_path / "bad", {0: BAD["bad_record"]})
    messages = [s.message for item in load(only(raw_recipe, shards)) for s in item.skipped]
    assert messages and all("2 times '<ImageHere>', but the sample has 1 image" in message for message in messages)


def test_an_empty_caption_teaches_nothing(raw_recipe: RAW, tmp_path: Path) -> None:
    """Punctuation alone is nothing once it is cleaned; the original trains on the end symbol then."""
    empty, words = ({"json": json.dumps({"caption": text}).encode()} for text in ("...", "a bus"))
    raw = only(raw_recipe, write(tmp_path / "captions", {0: empty, 1: words}))
    assert {item.reason for loaded in load(raw) for item in loaded.skipped} == {"empty_answer"}


def test_max_tokens(mixed: dict[str, Any], raw_recipe: RAW) -> None:
    """As many samples as fit, by an estimate: fewer micro-batches than samples, as many on each rank."""
    raw = raw_recipe(train__micro_batch_size=None, train__max_tokens=120)
    ranks = [load(raw, rank=rank, world=2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) < STEPS * 4
    sizes = [len(loaded.batch.input_ids) for rank in ranks for loaded in rank]
    assert max(sizes) < 1.25 * 120  # this tokenizer knows few words
    assert sum(sizes) / len(sizes) > 0.5 * 120
    assert [sample[:3] for sample in in_order(*ranks)] == [sample[:3] for sample in in_order(load(mixed))]


def test_a_sample_above_max_tokens_drops_out(mixed: dict[str, Any], raw_recipe: RAW) -> None:
    """Whatever the ranks: its own length decides."""
    longest = 25
    kept = [sample[0] for sample in in_order(load(mixed)) if len(sample[1]) <= longest]
    raw = raw_recipe(train__micro_batch_size=None, train__max_tokens=longest)
    for world in (1, 2):
        ranks = [load(raw, rank=rank, world=world) for rank in range(world)]
        assert [sample[0] for sample in in_order(*ranks)] == kept
        skipped = [item for rank in ranks for loaded in rank for item in loaded.skipped]
        assert {item.reason for item in skipped} == {"too_long"}
        assert len(skipped) + len(kept) == STEPS * 8
        assert all("more than train.max_tokens (25)" in item.message for item in skipped)


def test_a_micro_batch_without_a_sample(raw_recipe: RAW, tmp_path: Path) -> None:
    """A lone BOS token without a target: every rank still makes the same calls."""
    shards = write(tmp_path / "bad", dict.fromkeys(range(8), BAD["corrupt_image"]))
    raw = only(raw_recipe, shards, batch_size=2, micro_batch_size=1)
    _, tokens = stream_of(raw)
    for loaded in load(raw):
        batch = loaded.batch
        assert len(loaded.skipped) == 1
        assert batch.input_ids.tolist() == [tokens.tokenizer.bos_token_id]
        assert (batch.position_ids.tolist(), batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0], [0, 1], 1)
        assert batch.sample_ids == ()
        assert batch.pixel_values.shape == (0, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        for name in ("image_rows", "image_index", "target_rows", "targets", "target_dataset"):
            assert getattr(batch, name).shape == (0,) and getattr(batch, name).dtype == torch.int64


# ---- packing ---------------------------------------------------------------------------------------------------------


def row(ids: list[int], labels: list[int], images: list[int]) -> TokenRow:
    arrays = (ids, labels, range(len(ids)), images, range(len(images)))
    return TokenRow(*(np.array(list(values), dtype=np.int64) for values in arrays))


def test_collate() -> None:
    """Rows, images and targets of each sample move by what is before it."""
    none = np.zeros((0, 3, 1, 1), dtype=np.uint8)
    images = np.arange(3 * 12, dtype=np.uint8).reshape(3, 3, 2, 2)
    made = [
        Sample(SampleRef(0, "b", 0, 0, 0), row([9, 7, 7, 1, 2], [IGNORE, IGNORE, IGNORE, 1, 2], [1, 2]), images[:1]),
        Sample(SampleRef(1, "a", 0, 0, 1), row([9, 3], [IGNORE, 3], []), none),
        # its second image is cut after the first row
        Sample(SampleRef(2, "b", 0, 0, 2), row([9, 7, 7, 7, 4], [IGNORE] * 4 + [4], [1, 2, 3]), images[1:]),
    ]
    batch = collate(made, ["a", "b"], queries=2, image_size=2, bos=9)
    assert batch.input_ids.tolist() == [9, 7, 7, 1, 2, 9, 3, 9, 7, 7, 7, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype, batch.max_seqlen) == ([0, 5, 7, 12], torch.int32, 5)
    assert (batch.image_rows.tolist(), batch.image_index.tolist()) == ([1, 2, 8, 9, 10], [0, 1, 2, 3, 4])
    assert batch.targets.tolist() == [1, 2, 3, 4]
    assert batch.target_rows.tolist() == [2, 3, 5, 10]  # the row before each target, never of another sample
    assert batch.target_dataset.tolist() == [1, 1, 0, 1]
    assert torch.equal(batch.pixel_values, torch.from_numpy(images))
    assert [ref.position for ref in batch.sample_ids] == [0, 1, 2]


def test_targets_follow_their_rows(mixed: dict[str, Any]) -> None:
    """Whatever the samples: a target is the token after its row, in the same sample."""
    for loaded in load(mixed):
        batch = loaded.batch
        assert torch.equal(batch.input_ids[batch.target_rows + 1], batch.targets)
        assert not set((batch.target_rows + 1).tolist()) & set(batch.cu_seqlens.tolist())
        assert len(batch.image_rows) == len(batch.pixel_values) * tiny.QUERIES
