import errno
import gc
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from helpers.patience import PATIENCE

from tinygptv_ds import retry as storage
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.errors import DataError

RECORD = json.dumps({"answer": "a"}).encode()


def shard(folder: Path, *members: dict[str, bytes], per_shard: int = 100) -> list[Path]:
    with ShardWriter(folder, per_shard) as writer:
        for number, sample in enumerate(members):
            writer.write(f"k{number}", sample)
    return writer.tars


def test_reads_any_sample_in_any_order(tmp_path: Path) -> None:
    members = [{"json": json.dumps({"answer": str(i)}).encode(), "jpg": bytes([i])} for i in range(6)]
    tars = shard(tmp_path, *members, per_shard=4)
    reader = ShardReader()
    for i in (5, 0, 3, 4, 0):
        sample = reader.read(tars[i // 4], i % 4)
        assert (sample.key, sample.record, sample.images) == (f"k{i}", {"answer": str(i)}, (bytes([i]),))


def test_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """The tar holds 10 before 2."""
    images = {f"{i}.png": bytes([i]) for i in range(12)}
    (tar,) = shard(tmp_path, {"json": RECORD, "txt": b"x", "npy": b"x", **images}, {"json": RECORD})
    assert ShardReader().read(tar, 0).images == tuple(bytes([i]) for i in range(12))
    assert ShardReader().read(tar, 1).images == ()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b"x", "txt": b"x"}, "missing_record"),
        ({"json": b"{"}, "bad_json"),
        ({"json": b"[1]"}, "bad_json"),
        ({"json": b'"caf\xe9"'}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"json": b'{"caption": "a"}', "txt": b"a"}, "missing_image"),
        ({"json": RECORD, "0.jpg": b"", "2.jpg": b""}, "missing_image"),
        ({"json": RECORD, "1.jpg": b""}, "missing_image"),
        ({"json": RECORD, "jpg": b"", "png": b""}, "ambiguous_images"),
    ],
)
def test_bad_samples_are_named_and_counted(members: dict, reason: str, tmp_path: Path) -> None:
    (tar,) = shard(tmp_path, {"json": RECORD}, members)
    with pytest.raises(SampleError, match=f"{tar}: sample k1: ") as caught:
        ShardReader().read(tar, 1)
    assert caught.value.reason == reason
    assert isinstance(caught.value, DataError)
    again = pickle.loads(pickle.dumps(caught.value))  # how a dataloader worker hands it over
    assert (again.reason, str(again)) == (reason, str(caught.value))


def test_pickle_members_are_never_opened(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "canary"),)

    harmful = dict.fromkeys(("pkl", "pyd", "pth"), pickle.dumps(Harm()))
    (tar,) = shard(tmp_path / "out", {"json": RECORD, **harmful})
    assert ShardReader().read(tar, 0).record == {"answer": "a"}
    assert not (tmp_path / "canary").exists()


def test_shard_that_shrinks_while_open(tmp_path: Path) -> None:
    (tar,) = shard(tmp_path, {"json": RECORD, "jpg": b"x" * 5000})
    reader = ShardReader()
    reader.read(tar, 0)
    os.truncate(tar, 2000)
    with pytest.raises(SampleError, match=r"\.json ends after|\.jpg ends after") as caught:
        reader.read(tar, 0)
    assert caught.value.reason == "truncated"


def test_index_out_of_range_and_missing_shard(tmp_path: Path) -> None:
    (tar,) = shard(tmp_path, {"json": RECORD})
    with pytest.raises(DataError, match="has 1 samples, none with number 1"):
        ShardReader().read(tar, 1)
    with pytest.raises(DataError, match=r"gone\.tar"):
        ShardReader().read(tmp_path / "gone.tar", 0)


def test_failing_storage_is_tried_again_and_then_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tar,) = shard(tmp_path, {"json": RECORD})
    failures, pread, waits = [2], os.pread, []

    def flaky(*args: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    assert ShardReader().read(tar, 0).record == {"answer": "a"}
    assert waits == sorted(waits)
    assert len(waits) == 2
    failures[0] = 1000
    with pytest.raises(SampleError, match="Input/output error") as caught:
        ShardReader().read(tar, 0)
    assert caught.value.reason == "unreadable"


def test_a_stale_file_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system wants it, once it has been served again; what cannot pass is not tried again."""
    (tar,) = shard(tmp_path, {"json": RECORD}, {"json": RECORD})
    reader, waits, stale, pread = ShardReader(), [], [], os.pread
    assert reader.read(tar, 0).key == "k0"

    def gone(file: int, *given: int) -> bytes:
        stale.append(file) if not stale else None
        if file in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(file, *given)

    before = open_files()
    monkeypatch.setattr(os, "pread", gone)
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    assert reader.read(tar, 1).key == "k1"
    assert len(waits) == 1 and open_files() == before
    with pytest.raises(DataError, match="No such file"):
        ShardReader().read(tmp_path / "gone.tar", 0)
    assert len(waits) == 1


def open_files() -> int:
    gc.collect()  # readers that an exception still refers to
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_open_files_are_bounded(tmp_path: Path) -> None:
    tars = shard(tmp_path, *[{"json": RECORD}] * 40, per_shard=1)
    before = open_files()
    reader = ShardReader(max_open=4)
    for _ in range(3):
        for tar in tars:
            reader.read(tar, 0)
    assert open_files() - before == 2 * 4  # a shard and its index
    reader.close()
    assert open_files() == before
    assert reader.read(tars[0], 0).key == "k0"


def _read(reader: ShardReader, tar: Path, result: "multiprocessing.Queue") -> None:
    result.put(reader.read(tar, 1).key)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_used_reader_works_in_another_process(method: str, tmp_path: Path) -> None:
    (tar,) = shard(tmp_path, {"json": RECORD}, {"json": RECORD})
    reader = ShardReader()
    reader.read(tar, 0)
    context = multiprocessing.get_context(method)
    result = context.Queue()
    process = context.Process(target=_read, args=(reader, tar, result))
    process.start()
    assert result.get(timeout=PATIENCE) == "k1"
    process.join()
    assert reader.read(tar, 0).key == "k0"  # the parent's files are still its own
