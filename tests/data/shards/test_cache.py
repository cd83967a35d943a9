"""Several processes, kills and a tight bound: the cache holds whole shards, fetched once, within the bound."""

import contextlib
import io
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.patience import PATIENCE
from helpers.tar_server import TarServer

from tinygptv_ds.data.shards import disk_quota
from tinygptv_ds.data.shards.cache import ShardCache
from tinygptv_ds.data.shards.disk_quota import lock_cache_file, try_cache_file
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.remote import RemoteShard
from tinygptv_ds.errors import DataError

TAR = 10240 * 20  # bytes of each tar
fork = multiprocessing.get_context("fork")


def tar_bytes(answer: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("a.json", f'{{"answer": "{answer}"}}'.encode()), ("a.jpg", bytes(TAR - 10240))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert len(out.getvalue()) == TAR
    return out.getvalue()


@pytest.fixture
def server() -> Iterator[TarServer]:
    with TarServer() as running:
        running.files = {f"{i}.tar": tar_bytes(str(i)) for i in range(8)}
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def shard(server: TarServer, number: int) -> RemoteShard:
    return RemoteShard(f"{server.url}/{number}.tar")


def answer(cache: ShardCache, shard: RemoteShard) -> str:
    return ShardReader(cache=cache).read(shard, 0).record["answer"]


def held(folder: Path) -> list[str]:
    """The complete tars by number."""
    return sorted(tar.stem[-1] for tar in folder.glob("*.tar"))


def bytes_of(folder: Path) -> int:
    """What tars and downloads take on the disk, but for indexes and locks."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.suffix in (".tar", ".partial") else 0
    return total


def start(target: object, *args: object) -> multiprocessing.Process:
    process = fork.Process(target=target, args=args)
    process.start()
    return process


def all_end_well(processes: list) -> None:
    for process in processes:
        process.join(timeout=PATIENCE)
    assert [process.exitcode for process in processes] == [0] * len(processes)


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_the_shards_used_last_stay(server: TarServer, folder: Path) -> None:
    cache = ShardCache(folder, 3 * TAR)
    for number in (0, 1, 2, 0, 3, 0, 4):
        assert answer(cache, shard(server, number)) == str(number)
        assert bytes_of(folder) <= 3 * TAR
    assert held(folder) == ["0", "3", "4"]
    assert [server.asked(f"{i}.tar") for i in range(5)] == [1] * 5


def test_the_count_stays_when_the_tar_goes(server: TarServer, folder: Path) -> None:
    cache = ShardCache(folder, TAR)
    assert cache.counts([shard(server, i) for i in range(3)]) == [1, 1, 1]
    assert len(held(folder)) == 1
    server.requests.clear()
    assert cache.counts([shard(server, i) for i in range(3)]) == [1, 1, 1]
    assert server.requests == []
    assert [answer(cache, shard(server, i)) for i in range(3)] == ["0", "1", "2"]


def test_an_open_shard_stays_readable(server: TarServer, folder: Path) -> None:
    cache = ShardCache(folder, TAR)
    reader = ShardReader(cache=cache)
    reader.read(shard(server, 0), 0)
    answer(cache, shard(server, 1))
    assert held(folder) == ["1"]
    assert reader.read(shard(server, 0), 0).record["answer"] == "0"


def test_a_shard_that_is_just_opened_is_not_removed(server: TarServer, folder: Path) -> None:
    cache = ShardCache(folder, 2 * TAR)
    first = cache.fetch(shard(server, 0))
    cache.fetch(shard(server, 1))
    with lock_cache_file(first.with_suffix(".lock")):
        cache.fetch(shard(server, 2))
    assert held(folder) == ["0", "2"]


def test_a_cache_smaller_than_a_shard(server: TarServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if only the download shows how large the shard is."""
    monkeypatch.setattr(disk_quota, "FIRST_RESERVATION", 1000)
    for server.lengths in (True, False):
        with pytest.raises(DataError, match=r"the tar has 0.000\d+ GB or more.*may hold 0.000205 GB.*data.cache_gb"):
            ShardCache(folder, TAR - 1).open(shard(server, 0))
        assert bytes_of(folder) == 0
        assert list(folder.glob("*.reserved")) == []


def _read_all(url: str, folder: Path, max_bytes: int, order: list[int]) -> None:
    cache = ShardCache(folder, max_bytes)
    for number in order:
        assert answer(cache, RemoteShard(f"{url}/{number}.tar")) == str(number)


@pytest.mark.parametrize("lengths", [True, False])
def test_processes_that_race_keep_the_bound(
    lengths: bool, server: TarServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space for two and a half shards and four processes: all finish, and the bound holds at any time."""
    monkeypatch.setattr(disk_quota, "FIRST_RESERVATION", TAR // 4)
    monkeypatch.setattr(disk_quota, "_WAIT_SECONDS", 0.01)
    server.lengths, server.pause = lengths, 0.001
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [4, 5, 6, 7], [7, 0, 5, 2]]
    bound = TAR * 5 // 2
    processes = [start(_read_all, server.url, folder, bound, order) for order in orders]
    most = 0
    folder.mkdir(exist_ok=True)
    while any(process.is_alive() for process in processes):
        with lock_cache_file(folder / "quota.lock"):  # else a tar just removed and its successor would both be seen
            most = max(most, bytes_of(folder))
        time.sleep(0.002)
    all_end_well(processes)
    assert TAR < most <= bound
    assert list(folder.glob("*.reserved")) == list(folder.glob("*.partial")) == []


# ---- sharing and kills -----------------------------------------------------------------------------------------------


def test_processes_fetch_a_shard_once(server: TarServer, folder: Path) -> None:
    server.pause = 0.01
    all_end_well([start(_read_all, server.url, folder, 10 * TAR, [0]) for _ in range(5)])
    assert server.asked("0.tar") == 1


def _count(url: str, folder: Path) -> None:
    assert ShardCache(folder, 10 * TAR).counts([RemoteShard(f"{url}/{i}.tar") for i in range(8)]) == [1] * 8


def test_processes_count_once(server: TarServer, folder: Path) -> None:
    server.pause = 0.002
    all_end_well([start(_count, server.url, folder) for _ in range(4)])
    assert [server.asked(f"{i}.tar") for i in range(8)] == [1] * 8
    assert server.asked(".idx") == 8


def test_a_killed_download_leaves_nothing_that_counts(server: TarServer, folder: Path) -> None:
    server.pause = 0.05
    victim = start(_read_all, server.url, folder, TAR * 3 // 2, [0])
    while not any(path.stat().st_size for path in folder.glob("*.partial")):
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert held(folder) == []
    assert 0 < bytes_of(folder) < TAR
    server.pause = 0.0
    cache = ShardCache(folder, TAR * 3 // 2)
    assert answer(cache, shard(server, 1)) == "1"  # another shard: the leftovers make room for it
    assert bytes_of(folder) == TAR
    assert list(folder.glob("*.partial")) == list(folder.glob("*.reserved")) == []
    assert answer(cache, shard(server, 0)) == "0"
    assert held(folder) == ["0"]


def test_the_same_shard_after_a_kill(server: TarServer, folder: Path) -> None:
    """A process that waited for the download takes it over."""
    server.pause = 0.05
    victim = start(_read_all, server.url, folder, 10 * TAR, [0])
    while not any(path.stat().st_size for path in folder.glob("*.partial")):
        time.sleep(0.01)
    waiting = start(_read_all, server.url, folder, 10 * TAR, [0])
    time.sleep(0.1)
    server.pause = 0.0
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    all_end_well([waiting])
    assert ShardReader(cache=ShardCache(folder, TAR)).read(shard(server, 0), 0).images == (bytes(TAR - 10240),)
    assert list(folder.glob("*.partial")) == list(folder.glob("*.reserved")) == []


def test_a_lock_is_free_although_a_forked_child_lives_on(folder: Path) -> None:
    """A dataloader worker started while a thread fetches has the lock file open, too."""
    folder.mkdir()
    with lock_cache_file(folder / "0.lock"):
        child = start(time.sleep, 20)
    try:
        second = try_cache_file(folder / "0.lock")
        assert second is not None
        with second:
            assert try_cache_file(folder / "0.lock") is None
    finally:
        child.kill()
        child.join()
