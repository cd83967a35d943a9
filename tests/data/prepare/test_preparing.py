"""`prepare` over processes: the same bytes however many there are, whatever is killed, and in how many attempts."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from operator import length_hint
from pathlib import Path

import pytest
from helpers.forked import fork_context
from helpers.patience import PATIENCE
from PIL import Image

from tinygptv_ds.data import process_pool
from tinygptv_ds.data.prepare import prepare as prepare_module
from tinygptv_ds.data.prepare.prepare import prepare, prepare_digits, write_samples
from tinygptv_ds.data.prepare.stored_images import Encoding
from tinygptv_ds.data.process_pool import run_tasks
from tinygptv_ds.data.sets.common import PreparedSample, Samples, Skipped
from tinygptv_ds.data.shards.index import load_index, sample_count
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.errors import DataError

IMAGES = 6  # more than are remembered, so that each is read or encoded again


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the workers of this process from one that has imported torch, as webdataset does.

    A command that a test starts spawns its own, as for a user.
    """
    monkeypatch.setattr(process_pool, "_CONTEXT", fork_context())


def make_root(root: Path, count: int, side: int = 40) -> Path:
    """`count` questions about a few images; every seventh image is missing."""
    root.mkdir()
    rng = random.Random(0)
    for number in range(IMAGES):
        out = io.BytesIO()
        Image.frombytes("RGB", (side, side), rng.randbytes(side * side * 3)).save(out, "JPEG")
        (root / f"{number}.jpg").write_bytes(out.getvalue())
    entries = [
        {"image": "gone.jpg" if n % 7 == 3 else f"{n % IMAGES}.jpg", "question": "q", "answer": str(n)}
        for n in range(count)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return root


def result(out: Path) -> dict[str, bytes]:
    """All that a preparation made, but for the indexes, which hold the time of writing."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.endswith(".idx")}


def entries(count: int) -> Iterator[PreparedSample]:
    for i in range(count):
        yield PreparedSample(f"{i:04d}", {"pool": None, "text": "q", "answer": str(i)}, ())


def interrupted(count: int) -> Iterator[PreparedSample]:
    yield from entries(count)
    raise KeyboardInterrupt


def write(out: Path, samples: Iterator, size: int = 2, **settings: int) -> None:
    write_samples(samples, out, samples_per_shard=size, total=None, settings=settings)


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_workers_make_no_difference(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", 30)
    for workers in (1, 3):
        prepare("jsonl", root, tmp_path / str(workers), samples_per_shard=4, workers=workers)
    assert result(tmp_path / "1") == result(tmp_path / "3")
    assert sorted(result(tmp_path / "3")) == [*(f"0000{n}.tar" for n in range(8)), "report.json"]
    report = json.loads((tmp_path / "3/report.json").read_bytes())
    assert (report["samples"], report["skipped"]) == (26, {"missing_image": 4})
    assert [entry["key"] for entry in report["skipped_entries"]] == [f"{n:09d}" for n in (3, 10, 17, 24)]
    assert sum(sample_count(tar) for tar in expand_shards(str(tmp_path / "3"))) == 26


def test_a_chunk_without_a_sample_gives_no_tar(tmp_path: Path) -> None:
    samples = [*entries(2), Skipped("a", "bad_record", ""), Skipped("b", "missing_field", "", "url"), *entries(1)]
    report = write_samples(samples, tmp_path, samples_per_shard=2, total=None, settings={})
    assert report.shards == ["00000.tar", "00002.tar"] == [tar.name for tar in expand_shards(str(tmp_path))]
    assert (report.samples, report.skipped) == (3, {"bad_record": 1, "missing_field": 1})
    assert report.missing_fields == {"url": 1}
    assert "missing fields: 1 url" in str(report)


def test_images_that_entries_hold_bound_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet files hold them; the entries of a whole shard would not fit into memory."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    monkeypatch.setattr(prepare_module, "_HELD_BYTES", 3 * len(out.getvalue()))
    samples = [PreparedSample(str(n), {"caption": "x", "clean": []}, (out.getvalue(),)) for n in range(7)]
    report = write_samples(samples, tmp_path, samples_per_shard=5, total=None, settings={})
    assert [sample_count(tmp_path / tar) for tar in report.shards] == [3, 3, 1]


def test_how_many_are_to_come_is_known() -> None:
    """From the number of entries and the share that belongs; nothing is said of a source that cannot tell."""
    samples = Samples(list(range(100)), lambda n: ({"n": n}, []) if n % 2 else None)
    assert length_hint(samples, -1) == 100
    for _ in range(10):
        next(samples)
    assert length_hint(samples, -1) == 40 == len(list(samples))
    assert length_hint(samples, -1) == 0
    assert length_hint(Samples(iter(map(str, "ab")), lambda n: None), -1) == -1


# ---- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(kind: signal.Signals, tmp_path: Path) -> None:
    """Finished shards are kept, the rest is made, and all is as if nothing had happened; no process is left behind."""
    root, out = make_root(tmp_path / "root", 200, side=300), tmp_path / "out"
    options = ["--samples-per-shard", "10", "--max-side", "200", "--workers", "2"]
    command = [sys.executable, "-m", "tinygptv_ds", "prepare", "jsonl", "--root", root, "--out", out, *options]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    until(lambda: len(list(out.glob(".*.part"))) >= 3)
    if kind == signal.SIGKILL:
        process.kill()  # the parent alone
    else:
        os.killpg(process.pid, kind)  # as Ctrl-C in a terminal
    _, stderr = process.communicate(timeout=PATIENCE)
    until(lambda: not alive(process.pid))
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert "resumes from the finished shards" in stderr
        assert not [path.name for path in out.iterdir() if path.name.endswith((".tmp", ".partial"))]
    assert not (out / "report.json").exists()
    done = {tar: tar.stat().st_mtime_ns for tar in out.glob("*.tar") if (out / f".{tar.stem}.part").exists()}
    assert 3 <= len(done) < 20
    with pytest.raises(DataError, match=r"other settings \(limit\)"):
        prepare("jsonl", root, out, samples_per_shard=10, encoding=Encoding(200), limit=3)
    for folder, workers in ((out, 2), (tmp_path / "clean", 1)):
        prepare("jsonl", root, folder, samples_per_shard=10, encoding=Encoding(200), workers=workers)
    assert result(out) == result(tmp_path / "clean")
    assert {tar: tar.stat().st_mtime_ns for tar in done} == done


def until(condition: object) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def cut(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:-600])


def overwrite(tar: Path) -> None:
    tar.write_bytes(bytes(len(tar.read_bytes())))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("00001.tar", Path.unlink),
        ("00001.tar", cut),
        ("00001.tar", overwrite),
        (".00001.part", Path.unlink),
        (".00001.part", cut),
        ("00001.tar.idx", Path.unlink),
        ("00001.tar.idx", overwrite),
    ],
)
def test_damaged_parts_are_made_again(file: str, damage: object, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", interrupted(7))
    before = (tmp_path / "a/00000.tar").stat().st_mtime_ns
    damage(tmp_path / "a" / file)
    for name in "ab":
        write(tmp_path / name, entries(9))
    assert result(tmp_path / "a") == result(tmp_path / "b")
    assert (tmp_path / "a/00000.tar").stat().st_mtime_ns == before
    assert len(load_index(tmp_path / "a/00001.tar")) == 2


def test_other_entries_are_made_again(tmp_path: Path) -> None:
    """A source may change in a way that its settings do not show; shards past its end go."""
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", interrupted(9))
    changed = [PreparedSample("x", {"pool": None, "text": "q", "answer": "new"}, ()), *entries(3)]
    for name in "ab":
        write(tmp_path / name, iter(changed))
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_unfinished_with_other_settings(tmp_path: Path) -> None:
    """Refused where something is finished, taken over where nothing is."""
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", interrupted(3), limit=1)
    with pytest.raises(DataError, match=r"other settings \(limit\)"):
        write(tmp_path / "a", entries(3), limit=2)
    (tmp_path / "a/.00000.part").unlink()
    write(tmp_path / "a", entries(3), limit=2)
    assert set(result(tmp_path / "a")) == {"00000.tar", "00001.tar", "report.json"}


def test_failures_before_the_first_shard_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "root/gqa/images").mkdir(parents=True)
    (tmp_path / "root/gqa/train_balanced_questions.json").write_text("[")
    with pytest.raises(DataError, match="is no JSON"):
        prepare("gqa", tmp_path / "root", tmp_path / "out")
    with pytest.raises(DataError, match="not one sample"):
        write(tmp_path / "out", iter([Skipped("0", "bad_record", "x")]))
    assert not (tmp_path / "out").exists()


# ---- failing workers -------------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path: Path) -> None:
    """One message, whichever process meets it, and nothing half-made."""
    root, out = make_root(tmp_path / "root", 40), tmp_path / "out"
    command = [sys.executable, "-m", "tinygptv_ds", "prepare", "jsonl", "--root", root, "--out", out]
    done = subprocess.run(
        [*command, "--samples-per-shard", "20", "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out}: shard 0000")
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def at_3(number: int, tick: object) -> None:
    """A task that goes well, but for number 3."""
    tick(1)
    if number == 3:
        raise DataError("three")
    if number == 30:
        raise KeyError("thirty")
    if number == 300:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (3, DataError, "^three$"),
        (30, RuntimeError, "in a worker process:\nTraceback"),
        (300, DataError, r"was killed \(SIGKILL\); most often memory"),
    ],
)
def test_errors_of_workers_are_raised_here(bad: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_tasks(at_3, iter([1, 2, bad, 4, 5]), 2, lambda n: None, remedy="use fewer")


def test_tasks_are_drawn_as_they_are_needed() -> None:
    """So that memory holds a few chunks, not all; and all of them are done."""
    drawn, done, ahead = 0, 0, 0

    def tasks() -> Iterator[int]:
        nonlocal drawn, ahead
        for number in range(100, 140):
            drawn += 1
            ahead = max(ahead, drawn - done)
            yield number

    def tick(count: int) -> None:
        nonlocal done
        done += count

    run_tasks(at_3, tasks(), 2, tick, remedy="")
    assert done == drawn == 40
    assert ahead <= 2 + 1


def test_digits_do_not_depend_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes make the same shards and reports as one."""
    one = prepare_digits(tmp_path / "one", limit=2)
    monkeypatch.setattr(prepare_module, "_WORTH_A_PROCESS", 1)
    two = prepare_digits(tmp_path / "two", limit=2, workers=2)
    assert list(one.items()) == list(two.items())
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.tar")}
    assert files == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.tar")}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
