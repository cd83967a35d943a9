import io
import json
import multiprocessing
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.patience import PATIENCE
from helpers.tar_server import TarServer

from tinygptv_ds import object_storage
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.sample import load_sample
from tinygptv_ds.data.shards import remote as remote_module
from tinygptv_ds.data.shards.cache import ShardCache, count_samples
from tinygptv_ds.data.shards.index import ShardIndex
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.shards.remote import RemoteShard
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.weights.recipe_files import check_files

SAMPLES, SHARDS = 3, 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote_module.NETWORK, "delays", (0.0, 0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four shards of three samples, with their indexes."""
    with ShardWriter(tmp_path_factory.mktemp("tars"), SAMPLES) as writer:
        for i in range(SAMPLES * SHARDS):
            writer.write(f"k{i}", {"json": json.dumps({"answer": str(i)}).encode(), "jpg": bytes([i]) * 5000})
    return writer.tars


@pytest.fixture
def server(local: list[Path]) -> Iterator[TarServer]:
    with TarServer() as running:
        for tar in local:
            running.files[tar.name] = tar.read_bytes()
            running.files[f"{tar.name}.idx"] = tar.with_name(f"{tar.name}.idx").read_bytes()
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9)


def drop_indexes(server: TarServer) -> None:
    for name in [name for name in server.files if name.endswith(".idx")]:
        del server.files[name]


def shards_of(server: TarServer) -> list[RemoteShard]:
    return expand_shards(f"{server.url}/{{00000..00003}}.tar")


def answers(shards: list, cache: ShardCache) -> list[str]:
    reader = ShardReader(cache=cache)
    return [reader.read(shard, i).record["answer"] for shard in shards for i in range(SAMPLES)]


EXPECTED = [str(i) for i in range(SAMPLES * SHARDS)]

# ---- patterns --------------------------------------------------------------------------------------------------------


def test_braces_ask_nobody(server: TarServer) -> None:
    assert [shard.name for shard in shards_of(server)] == [f"0000{i}.tar" for i in range(4)]
    assert server.requests == []


@pytest.mark.parametrize("pattern", ["/", "/*.tar", "/0000*.tar"])
def test_a_folder_or_a_wildcard_is_listed(pattern: str, server: TarServer) -> None:
    assert expand_shards(server.url + pattern) == shards_of(server)


def test_folders_of_other_file_systems(local: list[Path], cache: ShardCache) -> None:
    """s3, gs and the like go the same way as fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.makedirs("/bucket/laion", exist_ok=True)
    for tar in local:
        memory.pipe_file(f"/bucket/laion/{tar.name}", tar.read_bytes())
    shards = expand_shards("memory://bucket/laion/")
    assert [shard.url for shard in shards] == [f"memory:///bucket/laion/{tar.name}" for tar in local]
    assert count_samples(shards, cache) == [SAMPLES] * SHARDS
    assert answers(shards, cache) == EXPECTED
    assert answers([RemoteShard(local[0].as_uri())], cache) == EXPECTED[:SAMPLES]


def test_what_cannot_be_listed(server: TarServer, tmp_path: Path) -> None:
    server.files.clear()
    with pytest.raises(DataError, match=f"{server.url}/.*none found"):
        expand_shards(f"{server.url}/*.tar")
    with pytest.raises(DataError, match=r"pip install s3fs"):
        expand_shards("s3://bucket/data/")
    with pytest.raises(DataError, match="nosuch"):
        expand_shards("nosuch://bucket/*.tar")


def test_a_password_is_not_shown() -> None:
    assert str(RemoteShard("https://me:secret@host/0.tar")) == "https://***@host/0.tar"


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
def test_remote_shards_read_as_local_ones(
    ranges: bool, lengths: bool, server: TarServer, local: list[Path], cache: ShardCache
) -> None:
    server.ranges, server.lengths = ranges, lengths
    shards = shards_of(server)
    assert count_samples([local[0], *shards], cache) == [SAMPLES] * (SHARDS + 1)
    assert answers(shards, cache) == answers(local, cache) == EXPECTED
    if lengths:  # where a HEAD does not tell the size, fsspec begins a GET for it
        assert [server.asked(f"0000{i}.tar") for i in range(4)] == [1] * 4
    server.requests.clear()
    assert answers(shards, cache) == EXPECTED
    assert server.requests == []


def test_counting_reads_the_heads_of_the_indexes_once(server: TarServer, cache: ShardCache, tmp_path: Path) -> None:
    shards = shards_of(server)
    assert cache.counts(shards) == [SAMPLES] * SHARDS
    assert server.asked(".tar") == 0
    assert server.asked(".idx") == SHARDS
    server.requests.clear()
    assert ShardCache(tmp_path / "cache", 10**9).counts(shards) == [SAMPLES] * SHARDS
    assert server.requests == []


@pytest.mark.parametrize("what", ["none", "of another tar", "torn", "with another count", "no index"])
def test_an_index_that_does_not_fit_is_built(what: str, server: TarServer, cache: ShardCache) -> None:
    good = server.files["00001.tar.idx"]
    changed = bytearray(good)
    changed[24] ^= 1
    other = ShardIndex([]).to_bytes((len(server.files["00001.tar"]) + 512, 0))
    bad = {"of another tar": other, "torn": good[:-3], "with another count": bytes(changed), "no index": b"<html>"}
    drop_indexes(server)
    if what in bad:
        server.files["00001.tar.idx"] = bad[what]
    shards = shards_of(server)
    assert cache.counts(shards) == [SAMPLES] * SHARDS
    assert answers(shards, cache) == EXPECTED
    assert server.asked("00001.tar") == 1
    assert cache.counts(shards) == [SAMPLES] * SHARDS


def test_an_index_is_had_without_its_tar(server: TarServer, cache: ShardCache) -> None:
    """What shares a step out to ranks needs the lengths of all samples."""
    first, second = shards_of(server)[:2]
    del server.files["00001.tar.idx"]
    assert cache.counts([first, second]) == [SAMPLES] * 2
    assert [cache.index(first).key(1), cache.index(second).key(1)] == ["k1", "k4"]
    assert [server.asked("00000.tar"), server.asked("00001.tar")] == [0, 1]
    server.files.clear()
    for path in cache._folder.glob("*.tar"):
        path.unlink()
    assert [cache.index(first).key(1), cache.index(second).key(1)] == ["k1", "k4"]


@pytest.mark.parametrize("adjacent", [True, False])
def test_a_replaced_shard_is_noticed(adjacent: bool, server: TarServer, cache: ShardCache) -> None:
    """Of the same size, as tars often are, so that the index that was left next to it seems to fit."""
    shard = shards_of(server)[0]
    if not adjacent:
        drop_indexes(server)
    assert cache.counts([shard]) == [SAMPLES]
    for path in cache._folder.glob("*.tar"):
        path.unlink()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("new.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    server.files["00000.tar"] = out.getvalue().ljust(len(server.files["00000.tar"]), b"\0")
    with pytest.raises(DataError, match="holds 1 samples, not 3 as counted at the start"):
        ShardReader(cache=cache).read(shard, 0)
    drop_indexes(server)
    again = ShardCache(cache._folder, 10**9)  # the next start
    assert again.counts([shard]) == [1]
    assert ShardReader(cache=again).read(shard, 0).key == "new"


def _first_answer(shard: RemoteShard, cache: ShardCache, result: Any) -> None:
    result.put(ShardReader(cache=cache).read(shard, 0).record["answer"])


def test_a_forked_process_fetches_as_well(server: TarServer, cache: ShardCache) -> None:
    """Dataloader workers are forked from one that has fetched."""
    shards = shards_of(server)
    assert answers(shards[:1], cache) == EXPECTED[:SAMPLES]
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    process = context.Process(target=_first_answer, args=(shards[1], cache, result))
    process.start()
    assert result.get(timeout=PATIENCE) == EXPECTED[SAMPLES]
    process.join()


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [[500], [503, 429], ["cut", 502], ["cut"]])
def test_failures_that_pass(faults: list, server: TarServer, cache: ShardCache) -> None:
    drop_indexes(server)
    server.faults["00000.tar"] = [None, *faults]  # the size is asked for first
    assert answers(shards_of(server)[:1], cache) == EXPECTED[:SAMPLES]
    assert server.asked("00000.tar") == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "message", "attempts"),
    [(404, "not found; check the URL", 1), (403, "access refused.*credentials", 1), (500, "cannot be fetched.*500", 3)],
)
def test_failures_that_stay(fault: int, message: str, attempts: int, server: TarServer, cache: ShardCache) -> None:
    server.faults["00000.tar"] = [None, *[fault] * 20]
    shard = shards_of(server)[0]
    for _ in range(2):  # the second time nobody is asked
        with pytest.raises(DataError, match=f"{server.url}/00000.tar: {message}"):
            cache.open(shard)
    assert server.asked("00000.tar") == attempts
    assert sorted(path.suffix for path in cache._folder.iterdir()) == [".lock", ".lock"]


def test_a_shard_that_is_not_there_stops_the_start(server: TarServer, cache: ShardCache) -> None:
    with pytest.raises(DataError, match=r"00004.tar: not found"):
        cache.counts(expand_shards(f"{server.url}/{{00000..00004}}.tar"))


def test_a_page_instead_of_a_tar(server: TarServer, cache: ShardCache) -> None:
    """Such as a login page. It isn't kept: the next run asks again."""
    drop_indexes(server)
    server.files["00000.tar"] = b"<html>" * 1000
    with pytest.raises(
        DataError, match=f"{server.url}/00000.tar: the fetched file cannot be used: .*no uncompressed tar"
    ):
        cache.open(shards_of(server)[0])
    assert list(cache._folder.glob("*.tar")) == []


def test_a_server_that_falls_silent(server: TarServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("http").clear_instance_cache()
    monkeypatch.setattr(object_storage, "_SILENT_SECONDS", 0.1)
    server.pause = 1.0
    start = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be fetched: .*Timeout"):
        cache.open(shards_of(server)[0])
    assert time.monotonic() - start < 5


def test_a_shard_that_vanishes_during_a_run_costs_its_samples_alone(
    server: TarServer, raw_recipe: Callable[..., dict]
) -> None:
    raw = raw_recipe(data__datasets=[{"name": "remote", "shards": f"{server.url}/{{00000..00003}}.tar"}])
    stream = open_stream(build_recipe(raw, "recipe"))
    assert sum(len(stream.order._datasets[name]) for name in stream.names) == SAMPLES * SHARDS
    server.files.clear()
    reader = ShardReader(cache=stream.cache)
    with pytest.raises(SampleError, match="not found") as caught:
        load_sample(stream, reader, stream.order.step(0)[0], None)
    assert caught.value.reason == "unreadable_shard"


def test_the_check_before_a_run_fetches_nothing(server: TarServer, raw_recipe: Callable[..., dict]) -> None:
    raw = raw_recipe(data__datasets=[{"name": "remote", "shards": f"{server.url}/{{00000..00003}}.tar"}])
    check_files(build_recipe(raw, "recipe"))
    assert server.requests == []


# ---- pipes -----------------------------------------------------------------------------------------------------------


def test_pipes_expand_braces_and_give_tars(local: list[Path], cache: ShardCache) -> None:
    shards = expand_shards(f"pipe:cat {local[0].parent}/{{00000..00003}}.tar", allow_pipe=True)
    assert count_samples(shards, cache) == [SAMPLES] * SHARDS
    assert answers(shards, cache) == EXPECTED


@pytest.mark.parametrize("command", ["echo no such key >&2; exit 3", "(echo no such key >&2; exit 3) | cat"])
def test_a_command_that_fails(command: str, cache: ShardCache) -> None:
    with pytest.raises(DataError, match="exit code 3: no such key"):
        cache.open(RemoteShard(f"pipe:{command}"))


def test_pipes_run_only_where_the_recipe_names_the_dataset(raw_recipe: Callable[..., dict], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    raw = raw_recipe(data__datasets=[{"name": "piped", "shards": f"pipe:touch {mark}"}])
    with pytest.raises(ConfigError, match=r"run in a shell.*data.allow_pipe=\[piped\]"):
        build_recipe(raw, "recipe")
    raw["data"]["allow_pipe"] = ["other"]
    with pytest.raises(ConfigError, match=r"'other'.* is no dataset"):
        build_recipe(raw, "recipe")
    hidden = raw_recipe(data__datasets=[{"name": "piped", "shards": f"{{pipe:touch {mark} #://,pipe:x}}"}])
    with pytest.raises(DataError, match="shell command"):
        open_stream(build_recipe(hidden, "recipe"))
    assert not mark.exists()
    raw["data"]["allow_pipe"] = ["piped"]
    check_files(build_recipe(raw, "recipe"))
    assert not mark.exists()


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_recipe_says_where_and_how_much(server: TarServer, raw_recipe: Callable[..., dict], tmp_path: Path) -> None:
    datasets = [{"name": "remote", "shards": f"{server.url}/{{00000..00003}}.tar"}]
    raw = raw_recipe(data__datasets=datasets, data__cache_dir=str(tmp_path / "here"), data__cache_gb=1e-5)
    stream = open_stream(build_recipe(raw, "recipe"))
    assert len(list((tmp_path / "here").glob("*.adjacent"))) == SHARDS
    with pytest.raises(DataError, match=r"cache may hold 1e-05 GB; raise data.cache_gb"):
        stream.cache.open(stream.shards["remote"][0])
    with pytest.raises(ConfigError, match="cache_gb must be positive"):
        build_recipe(raw_recipe(data__cache_gb=0), "recipe")


def test_a_cache_that_cannot_be_written(server: TarServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir"):
        ShardCache(tmp_path / "file" / "cache", 10**9).counts(shards_of(server))
