"""Features are exactly what training would compute from the images; stale, torn and unfinished ones are refused."""

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.forked import apart
from helpers.verbs import call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.features import compute as features
from tinygptv_ds.features import encode
from tinygptv_ds.features.format import SIXTEEN_BIT, differences, fingerprint, read_notes
from tinygptv_ds.features.verify import check_features, vision_fingerprint
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import build_model, build_vision

STEPS = 3


@pytest.fixture(scope="module")
def made(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the four kinds of samples, in fp32."""
    folder = tmp_path_factory.mktemp("features")
    make(tiny.recipe(weights, shards), folder)
    return folder / "out"


def make(raw: dict[str, Any], folder: Path, *options: str) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = tiny.write_recipe(folder / "recipe.yaml", raw)
    call(features, recipe, "--out", folder / "out", "--workers", 0, "--batch-size", 5, *options)
    return folder / "out"


def loaded(recipe: Recipe, config: Any) -> Iterator[MicroBatch]:
    dataset = MicroBatches(open_stream(recipe), open_tokens(recipe, config), rank=0, world_size=1)
    return (dataset[step, number] for step in range(STEPS) for number in range(dataset.count(step)))


def model_of(raw: dict[str, Any]) -> tuple[Recipe, TinyGPTVForConditionalGeneration]:
    recipe = build_recipe(raw, "test")
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.text, frozen_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("llama_proj"))
    return recipe, model.train()


def check(raw: dict[str, Any], precision: str = "fp32") -> None:
    recipe, model = model_of(raw)
    check_features(model, recipe.data, precision)


def refused(raw: dict[str, Any], precision: str = "fp32") -> str:
    with pytest.raises(DataError) as caught:
        check(raw, precision)
    assert "tinygptv-ds features RECIPE --out DIR" in str(caught.value)
    return str(caught.value)


def test_batches_hold_what_the_vision_path_gives(raw_recipe: Callable[..., dict[str, Any]], made: Path) -> None:
    """Bit for bit, whatever images went through together; all else of a batch is the same."""
    one = {"train__micro_batch_size": 1}
    pixels, model = model_of(raw_recipe(**one))
    from_features = build_recipe(raw_recipe(data__features=str(made), **one), "test")
    counts = set()
    for ours, theirs in zip(loaded(from_features, model.config), loaded(pixels, model.config), strict=True):
        batch, other = ours.batch, theirs.batch
        assert len(batch.pixel_values) == 0
        assert batch.image_features.dtype == torch.float32
        assert torch.equal(batch.image_features, model.encode_vision(other.pixel_values)[: len(other.pixel_values)])
        for name in ("input_ids", "position_ids", "cu_seqlens", "image_rows", "image_index", "targets"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        assert batch.sample_ids == other.sample_ids
        counts.add(len(batch.image_features))
    assert counts == {0, 1, 2}


@pytest.fixture(scope="module")
def eight(weights: Path) -> tuple[TinyGPTVForConditionalGeneration, Tensor, Tensor]:
    """A vision path, eight images, and the features of each by itself."""
    recipe = build_recipe(tiny.recipe(weights, {"none": weights}), "test")
    model = build_vision(recipe.model, recipe.text, frozen_dtype=torch.float32)
    shape = (8, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    pixels = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    return model, pixels, torch.cat([encode.encode(model, one[None], "fp32") for one in pixels])


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 7)), threads=st.integers(1, 3))
def test_a_image_has_the_same_features_in_any_batch(
    eight: tuple[TinyGPTVForConditionalGeneration, Tensor, Tensor], cuts: set[int], threads: int
) -> None:
    """With any neighbours and threads, though 5 patches and 3 queries are fewer rows than MKL has one kernel for."""
    model, pixels, alone = eight
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [encode.encode(model, pixels[a:b], "fp32") for a, b in pairwise([0, *sorted(cuts), 8])]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), alone)


def test_nothing_but_the_vision_path_is_in_memory(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    """And it is the one that training uses, in its dtype."""
    recipe, model = model_of(raw_recipe())
    vision = build_vision(recipe.model, recipe.text, frozen_dtype=torch.float32)
    names = {name.split(".")[0] for name, _ in vision.named_parameters()}
    assert names == {"visual_encoder", "ln_vision", "query_tokens", "qformer"}
    whole = dict(model.named_parameters())
    assert all(torch.equal(parameter, whole[name]) for name, parameter in vision.named_parameters())


def test_a_q_former_of_init_from_is_the_one_that_counts(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The first release had trained it: features made without it would be stale."""
    _, model = model_of(raw_recipe())
    state = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(("llama_proj", "query_tokens"))}
    state["query_tokens"] += 1
    save_file(state, tmp_path / "trained.safetensors")
    raw = raw_recipe(model__init_from=str(tmp_path / "trained.safetensors"), model__allow_missing=["norms", "lora"])
    recipe = build_recipe(raw, "test")
    vision = build_vision(recipe.model, recipe.text, frozen_dtype=torch.float32)
    assert torch.equal(vision.query_tokens, state["query_tokens"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit(dtype: str, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Stored in the dtype that projections take them in."""
    out = make(raw_recipe(), tmp_path, "--dtype", dtype)
    raw = raw_recipe(data__features=str(out))
    recipe = build_recipe(raw, "test")
    model = build_model(recipe.model, recipe.text, frozen_dtype=encode.DTYPES[dtype])
    model.requires_grad_(False)
    check_features(model, recipe.data, dtype)
    pairs = zip(loaded(recipe, model.config), loaded(build_recipe(raw_recipe(), "test"), model.config), strict=True)
    for ours, theirs in pairs:
        assert ours.batch.image_features.dtype == encode.DTYPES[dtype]
        if len(theirs.batch.pixel_values):
            fresh = encode.encode(model, theirs.batch.pixel_values, dtype)
            torch.testing.assert_close(ours.batch.image_features, fresh, rtol=0.05, atol=0.05)


def test_fresh_features_are_taken(raw_recipe: Callable[..., dict[str, Any]], made: Path) -> None:
    check(raw_recipe(data__features=str(made)))
    check(raw_recipe())  # none named, none looked at


def test_another_vit(raw_recipe: Callable[..., dict[str, Any]], made: Path, tmp_path: Path) -> None:
    other = tiny.save_weights(tmp_path / "other", seed=1)
    raw = raw_recipe(data__features=str(made), model__eva_vit=str(other / "eva_vit_g.pth"))
    assert "differ from what this recipe's vision path gives in the weights of the ViT and the Q-Former." in refused(
        raw
    )


def test_another_image_size(raw_recipe: Callable[..., dict[str, Any]], made: Path) -> None:
    assert "image_size: 28 there, 56 here" in refused(raw_recipe(data__features=str(made), model__image_size=56))


def test_other_heads_have_the_same_weights(raw_recipe: Callable[..., dict[str, Any]], made: Path) -> None:
    assert "vit_heads: 2 there, 4 here" in refused(raw_recipe(data__features=str(made), model__eva_vit_heads=4))


def test_another_precision(raw_recipe: Callable[..., dict[str, Any]], made: Path) -> None:
    assert 'dtype: "fp32" there, "bf16" here' in refused(raw_recipe(data__features=str(made)), "bf16")


def test_sixteen_bits_of_an_earlier_version(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """They were computed under autocast, with other roundings on a GPU; fp32's stay as they are."""
    _, model = model_of(raw_recipe())
    assert SIXTEEN_BIT not in vision_fingerprint(model, "fp32")
    out = make(raw_recipe(), tmp_path, "--dtype", "bf16")
    for path in out.glob("*/features.json"):
        content = json.loads(path.read_text())
        del content["made_with"][SIXTEEN_BIT]
        path.write_text(json.dumps({**content, "fingerprint": fingerprint(content["made_with"])}))
    recipe = build_recipe(raw_recipe(data__features=str(out)), "test")
    model = build_model(recipe.model, recipe.text, frozen_dtype=torch.bfloat16).requires_grad_(False)
    with pytest.raises(DataError, match=r"differ .* in how 16 bits are computed \(an earlier version ran"):
        check_features(model, recipe.data, "bf16")
    assert differences({}, {"dtype": "bf16", SIXTEEN_BIT: "so"}) == ['dtype: nothing there, "bf16" here']


def test_a_vision_path_that_learns(raw_recipe: Callable[..., dict[str, Any]], made: Path) -> None:
    recipe, model = model_of(raw_recipe(data__features=str(made)))
    model.query_tokens.requires_grad_(True)
    with pytest.raises(ConfigError, match="the ViT or the Q-Former is trained"):
        check_features(model, recipe.data, "fp32")


def test_differences_name_weights_only_alone() -> None:
    there = {"weights": "a", "dtype": "fp32", "queries": 3}
    assert differences(there, dict(there)) == []
    assert differences(there, {**there, "weights": "b"}) == ["the weights of the ViT and the Q-Former"]
    assert differences(there, {**there, "weights": "b", "dtype": "bf16"}) == ['dtype: "fp32" there, "bf16" here']
    assert fingerprint(there) != fingerprint({**there, "weights": "b"})
    assert differences({}, there)[0] == 'dtype: nothing there, "fp32" here'


def open_error(raw: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        open_stream(build_recipe(raw, "test"))
    return str(caught.value)


def test_a_torn_shard_is_refused_and_mended(
    raw_recipe: Callable[..., dict[str, Any]], shards: dict[str, Path], tmp_path: Path
) -> None:
    one = [{"name": "vqa", "shards": str(shards["vqa"])}]
    out = make(raw_recipe(data__datasets=one), tmp_path)
    raw = raw_recipe(data__datasets=one, data__features=str(out))
    torn, whole = out / "vqa/00001.tar", (out / "vqa/00001.tar").read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    assert f"{torn} is torn" in open_error(raw)
    torn.unlink()
    assert f"{torn} is missing" in open_error(raw)
    torn.write_bytes(whole[:100])
    make(raw_recipe(data__datasets=one), tmp_path)
    assert torn.read_bytes() == whole
    open_stream(build_recipe(raw, "test"))


def test_what_the_notes_say_is_checked(
    raw_recipe: Callable[..., dict[str, Any]], shards: dict[str, Path], tmp_path: Path
) -> None:
    """Other shards, no features, unfinished ones, a damaged file: each has its own message, and no other folder."""
    one = [{"name": "vqa", "shards": str(shards["vqa"])}]
    out = make(raw_recipe(data__datasets=one), tmp_path)
    raw = raw_recipe(data__datasets=one, data__features=str(out))
    moved = tiny.write_shards(tmp_path / "other", tiny.samples("vqa", 8, seed=3))
    other = [{"name": "vqa", "shards": str(moved)}]
    assert "is not what" in open_error(raw_recipe(data__datasets=other, data__features=str(out)))
    with pytest.raises(DataError, match="differ in the shards that they are made from"):
        make(raw_recipe(data__datasets=other), tmp_path)
    gone = [{"name": "vqa", "shards": str(tmp_path / "removed")}]  # images may go once features are there
    open_stream(build_recipe(raw_recipe(data__datasets=gone, data__features=str(out)), "test"))
    notes = out / "vqa/features.json"
    content = json.loads(notes.read_text())
    notes.write_text(json.dumps({**content, "shard_bytes": []}))
    assert "unfinished" in open_error(raw)
    notes.write_text(json.dumps({**content, "made_with": {**content["made_with"], "dtype": "bf16"}}))
    assert "is damaged (altered since it was written)" in open_error(raw)
    notes.write_text("{")
    assert "is damaged" in open_error(raw)
    notes.write_text(json.dumps({**content, "format": 0}))
    assert "of another version" in open_error(raw)
    notes.unlink()
    assert "holds no features" in open_error(raw)


def test_unusable_samples_keep_their_place_and_reason(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The same samples drop out for the same reasons, and nothing shifts."""
    good = tiny.encoded_images(1)[0]
    record = json.dumps({"text": "what ?", "answer": "that"}).encode()
    cases: list[dict[str, bytes]] = [
        {"json": record, "png": good},
        {"json": record, "png": good[:80]},
        {"json": b"{", "png": good},
        {"png": good},
        {"json": json.dumps({"caption": "red"}).encode()},
        {"json": record, "0.png": good, "2.png": good},
        {"json": record},
        {"json": record, "0.png": good, "1.png": good},
    ]
    with ShardWriter(tmp_path / "shards", 3) as writer:
        for number, members in enumerate(cases):
            writer.write(f"key{number}", members)
    changes = {"data__datasets": [{"name": "odd", "shards": str(tmp_path / "shards")}], "train__micro_batch_size": 8}
    out = make(raw_recipe(**changes), tmp_path)
    pixels, model = model_of(raw_recipe(**changes))
    ours = list(loaded(build_recipe(raw_recipe(**changes, data__features=str(out)), "test"), model.config))
    theirs = list(loaded(pixels, model.config))
    assert [item.batch.sample_ids for item in ours] == [item.batch.sample_ids for item in theirs]
    assert [item.skipped for item in ours] == [item.skipped for item in theirs]
    reasons = {skipped.reason for item in ours for skipped in item.skipped}
    assert reasons == {"corrupt_image", "bad_json", "missing_record", "missing_image"}


def test_a_member_of_another_size_drops_out(
    raw_recipe: Callable[..., dict[str, Any]], shards: dict[str, Path], tmp_path: Path
) -> None:
    """Not a row of someone else's numbers."""
    one = [{"name": "vqa", "shards": str(shards["vqa"])}]
    out = make(raw_recipe(data__datasets=one), tmp_path)
    content = json.loads((out / "vqa/features.json").read_text())
    content["made_with"]["width"] *= 2
    content["fingerprint"] = fingerprint(content["made_with"])
    (out / "vqa/features.json").write_text(json.dumps(content))
    recipe = build_recipe(raw_recipe(data__datasets=one, data__features=str(out)), "test")
    item = next(loaded(recipe, model_of(raw_recipe())[1].config))
    assert {skipped.reason for skipped in item.skipped} == {"torn_features"}
    assert "features of 384 bytes instead of 768" in item.skipped[0].message
    assert item.batch.image_features.shape == (0, tiny.QUERIES, 64)


def make_and_die(recipe: Path, out: Path) -> None:
    """Make features and die of SIGKILL in the middle of the second shard."""
    whole, calls = encode.encode, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    encode.encode = counted
    call(features, recipe, "--out", out, "--workers", 0, "--batch-size", 3)


def test_killed_and_resumed(
    raw_recipe: Callable[..., dict[str, Any]],
    shards: dict[str, Path],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished shards stay as they are, nothing of the torn one is used, and the end is that of an unbroken run."""
    raw = raw_recipe(data__datasets=[{"name": "vqa", "shards": str(shards["vqa"])}])
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "out"
    with pytest.raises(EOFError):
        apart(make_and_die, recipe, out)
    assert sorted(path.name for path in (out / "vqa").glob("*.tar")) == ["00000.tar"]
    assert read_notes(out / "vqa").shard_bytes == []
    first = (out / "vqa/00000.tar").stat().st_mtime_ns
    encoded = []
    whole = encode.encode
    monkeypatch.setattr(encode, "encode", lambda *args: encoded.append(len(args[1])) or whole(*args))
    make(raw, tmp_path)
    assert (out / "vqa/00000.tar").stat().st_mtime_ns == first
    assert sum(encoded) == 7  # of 12, the first shard's five were done
    for tar in sorted((made / "vqa").glob("*.tar")):
        assert (out / "vqa" / tar.name).read_bytes() == tar.read_bytes()
    assert not list(out.rglob("*.partial"))


def test_what_is_there_is_not_made_twice(
    raw_recipe: Callable[..., dict[str, Any]], shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with another vision path in the same folder."""
    raw = raw_recipe(data__datasets=[{"name": "text", "shards": str(shards["text"])}])
    out = make(raw, tmp_path)
    before = (out / "text/features.json").read_bytes()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        make(raw, tmp_path)
    assert "text: 12 samples in 3 shard(s)" in output.getvalue()
    assert (out / "text/features.json").read_bytes() == before
    with pytest.raises(DataError, match="differ in image_size: 28 there, 56 here; remove it, or choose another --out"):
        make({**raw, "model": {**raw["model"], "image_size": 56}}, tmp_path)


def test_loader_processes_change_nothing(
    raw_recipe: Callable[..., dict[str, Any]], shards: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    raw = raw_recipe(data__datasets=[{"name": "pair", "shards": str(shards["pair"])}])
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    call(features, recipe, "--out", tmp_path / "out", "--workers", 1, "--batch-size", 2)
    for tar in sorted((made / "pair").glob("*.tar")):
        assert (tmp_path / "out/pair" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.parametrize("options", [("--batch-size", "0"), ("--workers", "-1")])
def test_options(options: tuple[str, str], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch-size must be at least 1"):
        call(features, recipe_file(), "--out", tmp_path, *options)
