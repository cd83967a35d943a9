"""Damaged files of a run directory and a disk that is full: survived with a warning, or named."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.errors import CheckpointError, ConfigError, disk_problem
from tinygptv_ds.files import sha256, whole_file, whole_folder
from tinygptv_ds.log import LOGGER, set_up_logging
from tinygptv_ds.train.checkpoint.content_check import check_state, check_tensors
from tinygptv_ds.train.checkpoint.deepspeed_format import write_deepspeed_checkpoint
from tinygptv_ds.train.checkpoint.folders import complete_ones
from tinygptv_ds.train.checkpoint.storage import STATE, SUMS, TENSORS, read_state, remove_old
from tinygptv_ds.train.metrics.board import open_board
from tinygptv_ds.train.metrics.reporter import forget_after
from tinygptv_ds.train.setup.machine import check_kinds
from tinygptv_ds.train.setup.run_dir_lock import lock_run_dir
from tinygptv_ds.train.trackers.tracker import TrackedRun

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


@pytest.mark.parametrize("name", ["log.txt", "stacks/rank-0.txt", "checkpoints"])
def test_pipes_devices_and_loops(name: str, tmp_path: Path) -> None:
    """A run would wait for the other end of a pipe."""
    (tmp_path / "stacks").mkdir()
    (tmp_path / "metrics.jsonl").symlink_to("nothing")
    os.mkfifo(tmp_path / "model.partial")  # removed when model/ is written
    check_kinds(tmp_path)
    place = tmp_path / name
    os.mkfifo(place)
    with pytest.raises(ConfigError, match=f"{place} is a pipe or a device; remove it"):
        check_kinds(tmp_path)
    place.unlink()
    place.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=f"{place} is a pipe or a device; remove it"):
        check_kinds(tmp_path)
    place.unlink()
    place.symlink_to(place.name)
    with pytest.raises(ConfigError, match=f"{place} cannot be used .Too many levels"):
        check_kinds(tmp_path)


def test_files_in_the_place_of_folders_are_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConfigError, match=r"checkpoints is no folder; remove it, or choose another --run-dir"):
        check_kinds(tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl is a folder; remove it, or choose another --run-dir"):
        check_kinds(tmp_path)


@pytest.mark.parametrize("name", [SUMS, STATE, TENSORS])
def test_pipes_in_a_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / TENSORS).touch()
    (tmp_path / STATE).touch()
    (tmp_path / SUMS).write_text("".join(f"{sha256(tmp_path / each)}  {each}\n" for each in (TENSORS, STATE)))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: it is a pipe or a device"):
        read_state(tmp_path)


def test_stale_partials_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").touch()
    (tmp_path / "folder.old").touch()
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "x").touch()
    (tmp_path / "file.partial").mkdir()
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link", "loop"])
def test_what_has_the_name_of_a_folder_is_replaced(kind: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if kind == "file":
        out.write_bytes(b"x")
    elif kind == "folder":
        (out / "inner").mkdir(parents=True)
    else:
        out.symlink_to(out if kind == "loop" else elsewhere)
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / "kept").touch()
    with whole_folder(out) as partial:
        (partial / "x").touch()
    assert not out.is_symlink() and [path.name for path in out.iterdir()] == ["x"]
    assert not list(tmp_path.glob("out.*")) and (kind != "link" or (elsewhere / "kept").exists())


def test_a_checkpoint_that_is_a_link_is_removed_as_one(tmp_path: Path) -> None:
    elsewhere = tmp_path / "other disk"
    elsewhere.mkdir()
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000003").touch()  # no checkpoint at all
    remove_old(complete_ones(tmp_path), TrainSection(batch_size=1, micro_batch_size=1, keep_checkpoints=1))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert elsewhere.is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"no": 1}', '{"wandb": 3}', '{"wandb": "kept"}'])
def test_the_id_of_the_tracker(content: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(content)
    run = TrackedRun("project", tmp_path, {})
    assert run.stored_id("wandb") == ("kept" if "kept" in content else None)
    run.store_id("mlflow", "new")
    assert (run.stored_id("mlflow"), run.stored_id("wandb")) == ("new", "kept" if "kept" in content else None)


@pytest.mark.parametrize(("content", "kept"), [('{"id": "kept"}', "kept"), ("{", None), ("[1]", None), ("{}", None)])
def test_the_id_of_an_earlier_version(content: str, kept: str | None, tmp_path: Path) -> None:
    """Such a run continues its entry in W&B; other trackers have none, and a newer file comes first."""
    (tmp_path / "wandb.json").write_text(content)
    run = TrackedRun("project", tmp_path, {})
    assert (run.stored_id("wandb"), run.stored_id("mlflow")) == (kept, None)
    run.store_id("wandb", "new")
    assert run.stored_id("wandb") == "new"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (STATE, b"{", "is no JSON"),
        (STATE, b"[]", "another version"),
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
        check_tensors(tmp_path / TENSORS)


GOOD = {"step": 9, "optimizer_steps": 8, "image_steps": 7, "skipped_steps": 1, "loss_scale": [1.0, 3], "must_match": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -9}, "step is -9, not a whole number from 1 on"),
        ({"step": "9"}, "step is '9', not"),
        ({"step": True}, "step is True, not"),
        ({"step": 10**12}, "step is 1000000000000, but the folder is named step-00000009"),
        ({"optimizer_steps": None}, "optimizer_steps is None, not a whole number from 0 to 9"),
        ({"optimizer_steps": 10}, "optimizer_steps is 10, not"),
        ({"image_steps": -1}, "image_steps is -1, not"),
        ({"skipped_steps": 1.5}, "skipped_steps is 1.5, not"),
        ({"loss_scale": [0, 0]}, r"loss_scale is \[0, 0\], not null"),
        ({"loss_scale": [float("nan"), 0]}, r"loss_scale is \[nan, 0\], not null"),
        ({"loss_scale": 65536.0}, "loss_scale is 65536.0, not null"),
        ({"must_match": [1]}, "must_match is a list, not"),
    ],
)
def test_a_state_that_makes_no_sense(change: dict, message: str) -> None:
    folder = Path("step-00000009")
    check_state(folder, GOOD)
    check_state(folder, {key: GOOD[key] for key in GOOD if key not in ("image_steps", "skipped_steps")})  # version 0.1
    with pytest.raises(CheckpointError, match=message):
        check_state(folder, GOOD | change)


def negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors["exp_avg_sq/a"][0, 0] = -1e-9


TENSOR_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    r"weight/a holds NaN or Inf": lambda t: t["weight/a"].fill_(float("nan")),
    r"exp_avg/a holds NaN or Inf": lambda t: t["exp_avg/a"].fill_(float("inf")),
    r"exp_avg_sq/a holds negative values": negative,
    r"exp_avg/a is \[3, 2\], its weight \[2, 3\]": lambda t: t.update({"exp_avg/a": torch.zeros(3, 2)}),
    r"exp_avg_sq/a is torch.bfloat16, not": lambda t: t.update({"exp_avg_sq/a": torch.zeros(2, 3).bfloat16()}),
    r"weight/a is torch.int64, not": lambda t: t.update({"weight/a": torch.zeros(2, 3).long()}),
    r"lacks \['exp_avg/a'\]": lambda t: t.pop("exp_avg/a"),
    r"lacks \['weight/a'\]": lambda t: t.pop("weight/a"),
    r"holds \['momentum/a'\], which is no part": lambda t: t.update({"momentum/a": torch.zeros(1)}),
}


@pytest.mark.parametrize("message", TENSOR_DAMAGE)
def test_tensors_that_no_run_can_resume_from(message: str, tmp_path: Path) -> None:
    """Damage with a hash that fits: another program has rewritten the checkpoint."""
    tensors = {f"{kind}/a": torch.zeros(2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    save_file(tensors, tmp_path / TENSORS)
    check_tensors(tmp_path / TENSORS)
    TENSOR_DAMAGE[message](tensors)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(tmp_path / TENSORS)


def test_a_full_disk_costs_events_and_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, tmp_path / "log.txt")
    board = open_board(tmp_path / "board", None)

    def fail(*_: object) -> None:
        raise FULL

    board.file_writer.event_writer._async_writer._writer._writer.write = fail  # the one that its thread uses
    for step in range(3):
        board.add_scalar("x", 1.0, step)
        board.flush()
    board.close()
    LOGGER.handlers[1].stream.write = fail
    LOGGER.info("first")
    LOGGER.info("second")
    console = capsys.readouterr()
    out = console.out.splitlines()
    assert "Traceback" not in console.err  # of TensorBoard's thread
    assert len([line for line in out if "board cannot be written (No space left" in line]) == 1
    assert len([line for line in out if "log.txt cannot be written (No space left" in line]) == 1
    assert out[-1] == "second"


class Written:
    """Stands in for DeepSpeed's engine: it saves two files, the second of which may not fit."""

    def __init__(self, fits: bool) -> None:
        self.ranks, self.deepspeed, self.checkpoint_engine, self._fits = Ranks(0, 0, 1, 1), self, self, fits

    def save(self, state_dict: dict, path: str) -> None:
        if not self._fits and path.endswith("2.pt"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0\nframe #0")
        Path(path).write_text(str(state_dict))

    def save_checkpoint(self, folder: str, tag: str, client_state: dict, save_latest: bool, **_: object) -> None:
        assert not save_latest
        for number in (1, 2):
            self.checkpoint_engine.save(client_state, f"{folder}/{tag}/{number}.pt")


def test_no_room_for_deepspeeds_own_checkpoint(tmp_path: Path) -> None:
    """It is there as a whole and named, or not at all, and the one before is still named."""
    assert write_deepspeed_checkpoint(Written(fits=True), tmp_path, "step-00000001", {"step": 1}) is None
    problem = write_deepspeed_checkpoint(Written(fits=False), tmp_path, "step-00000002", {"step": 2})
    assert problem is not None and problem.startswith(f"{tmp_path}/step-00000002/2.pt: [enforce fail at inline_con")
    assert "\n" not in problem
    assert (tmp_path / "latest").read_text() == "step-00000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    (tmp_path / "file").touch()
    problem = write_deepspeed_checkpoint(Written(fits=True), tmp_path / "file", "step-00000001", {})
    assert problem is not None and "Not a directory" in problem


def test_errors_of_the_disk_have_a_remedy() -> None:
    assert disk_problem(OSError(errno.ENOSPC, "No space left on device", "model/x")) == (
        "model/x: No space left on device; make room, then start the same command again"
    )
    assert "perhaps /dev/shm" in (disk_problem(FULL) or "")
    for number in (errno.EROFS, errno.EACCES):  # a container's
        assert "data.num_workers=0 does without" in (disk_problem(OSError(number, os.strerror(number))) or "")
        assert "/dev/shm" not in (disk_problem(OSError(number, os.strerror(number), "x")) or "")
    for number in (errno.EFBIG, errno.ENAMETOOLONG, errno.EMFILE, errno.EIO):
        assert "then start the same command again" in (disk_problem(OSError(number, os.strerror(number), "x")) or "")
    assert disk_problem(OSError(errno.EINVAL, "x")) is None and disk_problem(ValueError()) is None
