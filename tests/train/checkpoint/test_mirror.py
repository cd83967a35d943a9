"""The mirror of a run: what it keeps, that nothing waits for it, and that nothing there ends a run."""

import errno
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.patience import PATIENCE

from tinygptv_ds import object_storage
from tinygptv_ds.log import LOGGER, set_up_logging
from tinygptv_ds.object_storage import RemoteFolders
from tinygptv_ds.train.checkpoint.folders import complete_ones, step_of
from tinygptv_ds.train.checkpoint.mirror import Mirror
from tinygptv_ds.train.checkpoint.storage import remove_old


class Place:
    """A run directory and its mirror."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir, self.url = tmp_path / "run", f"memory://{tmp_path.name}/mirror"
        self.remote = RemoteFolders(self.url)
        (self.run_dir / "checkpoints").mkdir(parents=True)

    def save(self, step: int, parent: str = "checkpoints") -> Path:
        folder = self.run_dir / parent / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))
        return folder

    def mirror(self, keep: int = 2, every: int = 0, first_step: int = 0) -> Mirror:
        return Mirror(self.url, self.run_dir, SimpleNamespace(keep_checkpoints=keep, keep_every=every), first_step)

    def steps(self, parent: str = "checkpoints") -> list[int]:
        return [step_of(Path(name)) for name in self.remote.names(parent)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    set_up_logging()
    monkeypatch.setattr(object_storage.NETWORK, "delays", (0.0,))
    yield Place(tmp_path)
    LOGGER.handlers.clear()


def wait_until(condition: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


class Gate:
    """Holds up each upload until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._open, put = threading.Event(), threading.Event(), MemoryFileSystem.put_file

        def gated(files: Any, local: str, path: str, **more: Any) -> None:
            self.entered.set()
            assert self._open.wait(PATIENCE)
            put(files, local, path, **more)

        monkeypatch.setattr(MemoryFileSystem, "put_file", gated)

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize(("keep", "every", "left"), [(2, 0, [8, 9]), (1, 4, [4, 8, 9]), (9, 0, list(range(1, 10)))])
def test_keeps_as_many_as_the_run(keep: int, every: int, left: list[int], place: Place) -> None:
    mirror = place.mirror(keep, every)
    for step in range(1, 10):
        mirror.add(place.save(step))
        wait_until(lambda done=step: mirror.newest == done)
    assert mirror.finish(PATIENCE) and mirror.failures == 0
    assert place.steps() == left


def test_other_folders(place: Place) -> None:
    """DeepSpeed's own checkpoints are no steps to resume from, and `model/` is never passed over."""
    mirror = place.mirror()
    (place.run_dir / "model").mkdir()
    (place.run_dir / "model/trained.safetensors").write_bytes(b"x")
    for folder in (place.save(3), place.save(7, "deepspeed"), place.run_dir / "model"):
        mirror.add(folder)
    assert mirror.finish(PATIENCE)
    assert mirror.newest == 3 and place.steps() == [3] and place.steps("deepspeed") == [7]
    assert place.remote.read("model", "trained.safetensors") == b"x"


def test_a_slow_store_holds_up_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is being copied and what waits stays; the newest of those that wait takes the place of the others."""
    gate, mirror, folders = Gate(monkeypatch), place.mirror(keep=1, every=4), {}
    for step in (1, 2, 3, 4, 5, 6):
        folders[step] = place.save(step)
        mirror.add(folders[step])
        assert step > 1 or gate.entered.wait(PATIENCE)
    assert [step for step, folder in folders.items() if mirror.holds(folder)] == [1, 4, 6]
    train = SimpleNamespace(keep_checkpoints=1, keep_every=0)
    remove_old(complete_ones(place.run_dir / "checkpoints"), train, mirror.holds)
    assert [step_of(folder) for folder in complete_ones(place.run_dir / "checkpoints")] == [1, 4, 6]
    with caplog.at_level(logging.INFO):
        assert not mirror.finish(0.05)
    assert (
        "waiting up to 0 s for it" in caplog.text and "step-00000001 and step-00000004 and step-00000006" in caplog.text
    )
    assert place.steps() == []
    gate.open()
    assert mirror.finish(PATIENCE)
    assert place.steps() == [4, 6]
    remove_old(complete_ones(place.run_dir / "checkpoints"), train, mirror.holds)
    assert [step_of(folder) for folder in complete_ones(place.run_dir / "checkpoints")] == [6]


def test_failures_are_warnings(place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The next checkpoint is copied all the same, and what is left of the one that failed is removed."""
    mirror = place.mirror()
    mirror.add(place.save(1))
    wait_until(lambda: mirror.newest == 1)
    put = MemoryFileSystem.put_file
    with monkeypatch.context() as patch:

        def failing(files: Any, local: str, path: str, **more: Any) -> None:
            put(files, local, path, **more)
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(MemoryFileSystem, "put_file", failing)
        mirror.add(place.save(2))
        wait_until(lambda: mirror.failures == 1)
    assert "step-00000002 could not be copied" in caplog.text and "is that of step 1" in caplog.text
    assert place.steps() == [1] and place.remote.names("checkpoints", complete=False) == ["step-00000002"]
    mirror.add(place.save(3))
    assert not mirror.finish(PATIENCE)  # one failed
    assert place.steps() == [1, 3] and place.remote.names("checkpoints", complete=False) == []


def test_removed_before_it_was_copied(place: Place) -> None:
    """That is no failure: a newer one has come."""
    mirror = place.mirror()
    mirror.add(place.run_dir / "checkpoints/step-00000004")
    wait_until(lambda: not mirror.holds(place.run_dir / "checkpoints/step-00000004"))
    mirror.add(place.save(5))
    assert mirror.finish(PATIENCE) and mirror.failures == 0 and place.steps() == [5]


def test_a_course_that_was_left(place: Place) -> None:
    """After --resume of an earlier checkpoint the later ones there are no more part of the run."""
    for step in (3, 6, 9):
        place.remote.put(place.save(step), f"checkpoints/step-{step:08d}")
    mirror = place.mirror(first_step=6)
    wait_until(lambda: mirror.newest == 6)
    assert mirror.finish(PATIENCE) and place.steps() == [3, 6]
