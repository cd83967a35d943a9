"""Damaged files of a run directory and a disk that is full: survived with a warning, or named."""

import errno
import json
from pathlib import Path

import pytest

from tinygptv_ds.errors import CheckpointError, ConfigError, disk_problem
from tinygptv_ds.files import sha256, whole_file, whole_folder
from tinygptv_ds.log import LOGGER, set_up_logging
from tinygptv_ds.train.checkpoint.resume import open_checkpoint
from tinygptv_ds.train.checkpoint.storage import STATE, SUMS, TENSORS, read_state
from tinygptv_ds.train.metrics.board import open_board
from tinygptv_ds.train.metrics.reporter import forget_after
from tinygptv_ds.train.metrics.wandb_tracker import _id
from tinygptv_ds.train.setup.run_dir_lock import lock_run_dir

FULL = OSError(errno.ENOSPC, "No space left on device")
DAMAGED = [
    b"\0" * 300 + b"\n",
    b'{"step": 2, "train/l\n',
    b"\xff\xfe\n",
    b'["step"]\n',
    b'{"step": "2"}\n',
    b"[" * 9999 + b"\n",
    b"\n",
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_of_the_metrics(damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 3)]
    file.write_bytes(lines[0] + damaged + lines[1] + lines[2] + b'{"step": 4')
    forget_after(file, 2)
    assert file.read_bytes() == lines[0] + lines[1]
    assert "2 damaged line(s) dropped" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "lock.json", "log.txt"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be used \(Is a directory\)"):
        forget_after(tmp_path / "metrics.jsonl", 1)
    with pytest.raises(ConfigError, match=r"lock.json cannot be locked \(Is a directory\); remove it"):
        lock_run_dir(tmp_path)
    with pytest.raises(ConfigError, match=r"log.txt cannot be written \(Is a directory\)"):
        set_up_logging(0, tmp_path / "log.txt")
    (tmp_path / "board").touch()
    with pytest.raises(ConfigError, match="board cannot be written"):
        open_board(tmp_path / "board", None)


def test_stale_partials_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").touch()
    (tmp_path / "folder.old").touch()
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "x").touch()
    (tmp_path / "file.partial").mkdir()
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"no": 1}', '{"id": "kept"}'])
def test_the_id_of_the_tracker(content: str, tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text(content)
    found = _id(tmp_path / "wandb.json")
    assert found == _id(tmp_path / "wandb.json") and (found == "kept") == ("kept" in content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (STATE, b"{", "is no JSON"),
        (STATE, b"[]", "another version"),
        (STATE, b'{"step": "x", "optimizer_steps": 1, "loss_scale": null, "must_match": {}}', "another version"),
        (TENSORS, b"\0" * 100, "is no safetensors file"),
    ],
)
def test_damage_with_a_hash_that_fits(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / STATE).write_text('{"step": 1, "optimizer_steps": 1, "loss_scale": null, "must_match": {}}')
    (tmp_path / name).write_bytes(content)
    (tmp_path / SUMS).write_text("".join(f"{sha256(tmp_path / each)}  {each}\n" for each in (TENSORS, STATE)))
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path)
        open_checkpoint(tmp_path)


def test_a_full_disk_costs_events_and_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, tmp_path / "log.txt")
    board = open_board(tmp_path / "board", None)

    def fail(*_: object) -> None:
        raise FULL

    board.file_writer.event_writer._writer.add_event = fail
    for step in range(3):
        board.add_scalar("x", 1.0, step)
    board.close()
    LOGGER.handlers[1].stream.write = fail
    LOGGER.info("first")
    LOGGER.info("second")
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if "board cannot be written (No space left" in line]) == 1
    assert len([line for line in out if "log.txt cannot be written (No space left" in line]) == 1
    assert out[-1] == "second"


def test_errors_of_the_disk_have_a_remedy() -> None:
    assert disk_problem(OSError(errno.ENOSPC, "No space left on device", "model/x")) == (
        "model/x: No space left on device; make room, then start the same command again"
    )
    assert disk_problem(OSError(errno.EINVAL, "x")) is None and disk_problem(ValueError()) is None
