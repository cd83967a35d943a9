"""Checkpoints under attack: killed at every point of a save, bits that flip, a disk that is full."""

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.forked import ended
from helpers.small_disk import small_disk

from tinygptv_ds.errors import CheckpointError
from tinygptv_ds.train.checkpoint import resume
from tinygptv_ds.train.checkpoint import storage as checkpoint
from tinygptv_ds.train.checkpoint import writer as writer_module
from tinygptv_ds.train.checkpoint.folders import complete_ones, step_of
from tinygptv_ds.train.checkpoint.storage import Snapshot, read_state, write_checkpoint
from tinygptv_ds.train.checkpoint.writer import CheckpointWriter
from tinygptv_ds.weights import safetensors_writer

TRAIN = SimpleNamespace(keep_checkpoints=2, keep_every=0)
KINDS = ("weight", "exp_avg", "exp_avg_sq")
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def snapshot(step: int, size: int = 1000) -> Snapshot:
    tensors = {f"{kind}/{name}": torch.full((size,), step / 7) for kind in KINDS for name in "ab"}
    state = {"step": step, "optimizer_steps": step, "loss_scale": None, "must_match": None, "began_from": None}
    return Snapshot(tensors, state)


def job(folder: Path, wanted: object = "auto") -> Any:
    return SimpleNamespace(run_dir=folder, resume=str(wanted), resume_anyway=False, evaluate_only=False)


# ---- killed while it saves -------------------------------------------------------------------------------------------


def save_and_die(checkpoints: Path, last: int) -> None:
    """Save step 3, dying of SIGKILL before event number `last`: a file operation, a piece written, a sync."""
    seen = 0

    def event() -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

    write, sync = safetensors_writer._write_all, os.fsync

    def in_pieces(target: Callable, data: Any) -> None:
        for begin in range(0, len(data), 3000):
            event()
            write(target, memoryview(data)[begin : begin + 3000])

    def synced(handle: int) -> None:
        event()
        sync(handle)

    safetensors_writer._write_all, os.fsync = in_pieces, synced
    sys.addaudithook(lambda name, args: event() if name in EVENTS and str(checkpoints) in str(args[0]) else None)
    writer = CheckpointWriter(checkpoints, TRAIN)
    writer._write(snapshot(3))
    os._exit(0)


def test_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    """What has a checkpoint's name is whole at all times, and a restart takes the newest of them."""
    fork, newest = multiprocessing.get_context("fork"), []
    for last in itertools.count(1):
        checkpoints = tmp_path / str(last) / "checkpoints"
        for step in (1, 2):
            write_checkpoint(checkpoints, snapshot(step))
        process = fork.Process(target=save_and_die, args=(checkpoints, last))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        whole = [read_state(folder)["step"] for folder in complete_ones(checkpoints)]
        assert whole in ([1, 2], [1, 2, 3], [2, 3])
        found = resume.choose_checkpoint(job(checkpoints.parent), {})
        newest.append(step_of(Path(found)))
        assert newest[-1] == whole[-1]
        CheckpointWriter(checkpoints, TRAIN)._write(snapshot(3))  # a restart gets there, whatever was left behind
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
        if process.exitcode == 0:
            break
    assert newest == sorted(newest) and newest.count(2) >= 10 and newest.count(3) >= 4


# ---- bits that flip --------------------------------------------------------------------------------------------------


def flipped(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


DAMAGE = {
    "first byte flipped": flipped(0),
    "a byte flipped": flipped(0.4),
    "last byte flipped": flipped(1),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.SUMS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(file: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`auto` names the file with both hashes and takes the checkpoint before; a path is refused with the same words."""
    first, second = (write_checkpoint(tmp_path / "checkpoints", snapshot(step)) for step in (1, 2))
    expected = checkpoint._sums(second)
    DAMAGE[damage](second / file)
    with pytest.raises(CheckpointError) as caught:
        resume.choose_checkpoint(job(tmp_path, second), {})
    message = str(caught.value)
    if file == checkpoint.SUMS and "flipped" in damage and "is damaged: it should hold" not in message:
        assert str(second / checkpoint.TENSORS) in message or str(second / checkpoint.STATE) in message
    else:
        assert str(second / file) in message
    if file != checkpoint.SUMS and damage != "gone":
        assert f"has SHA-256 {checkpoint.sha256(second / file)}, but {expected[file]} was written" in message
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.LOGGER, "warning", lambda text, *values: warned.append(text % values))
        assert resume.choose_checkpoint(job(tmp_path), {}) == str(first)
    assert f"{message}; trying the checkpoint before" in warned


def test_sums_are_those_of_the_command_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, snapshot(1))
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "state.safetensors: OK\nstate.json: OK\n"


def test_the_tensors_are_as_the_library_reads_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = {"weight/a": torch.randn(3, 5), "weight/b": torch.randn(7).expand(2, 7), "exp_avg/a": torch.zeros(())}
    folder = write_checkpoint(tmp_path, Snapshot(made, snapshot(1).state))
    read = load_file(folder / checkpoint.TENSORS)
    assert read.keys() == made.keys() and all(torch.equal(read[name], tensor) for name, tensor in made.items())


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """There is room for one checkpoint: when the second fails, training continues; when the third fails, it stops."""
    steps = {"train__steps_per_epoch": 40, "train__checkpoint_every": 10, "train__sample_count": 0}
    recipe, run = tiny.write_recipe(tmp_path / "recipe.yaml", raw_recipe(**steps)), tmp_path / "run"
    ended(recipe, tmp_path / "roomy", "--set=train.steps_per_epoch=1")
    size = sum(file.stat().st_size for file in (tmp_path / "roomy/checkpoints/step-00000001").iterdir())
    with small_disk(run / "checkpoints", size * 3 // 2):
        done = ended(recipe, run, code=2, ranks=2)
        assert done.output.count("a checkpoint could not be written ([Errno 28] No space left on device") == 2
        assert 30 <= done.metrics[-1]["step"] < 40
        assert "error: two checkpoints in a row could not be written" in done.output and "Traceback" not in done.output
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]
        assert read_state(run / "checkpoints/step-00000010")["step"] == 10


def test_a_failure_that_passes_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two failures in a row stop a run, not two in all; no partial file stays, and the last whole checkpoint does."""
    full = {2, 4, 5}

    def write(target: Callable, data: Any) -> None:
        real(target, data)
        if step in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = safetensors_writer._write_all
    monkeypatch.setattr(safetensors_writer, "_write_all", write)
    writer, stopped = CheckpointWriter(tmp_path, SimpleNamespace(keep_checkpoints=1, keep_every=0)), {}
    for step in range(1, 6):
        writer.write(snapshot(step))
        writer.wait()
        stopped[step] = writer.has_failed()
        kept = [path.name for path in tmp_path.iterdir()]
        assert kept == [f"step-{max(each for each in range(1, step + 1) if each not in full):08d}"]
    assert stopped == {1: False, 2: False, 3: False, 4: False, 5: True}
    assert "No space left" in writer.reason
    writer.close()


def test_a_bug_in_writing_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors of the system are forgiven; anything else surfaces as it is."""
    monkeypatch.setattr(writer_module, "write_checkpoint", lambda *_: 1 / 0)
    writer = CheckpointWriter(tmp_path, TRAIN)
    writer.write(snapshot(1))
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.close()
