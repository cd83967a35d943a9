"""Damage to a run directory between two attempts, as crashes and power losses leave it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones


def damage(run_dir: Path, name: str) -> bool:
    """Damage a run directory; return False where it has nothing yet that could be damaged like this."""
    if not (run_dir / FOLDER).is_dir():
        return False
    return _ACTS[name](run_dir)


def _stale_folder(run_dir: Path) -> bool:
    for stale in (run_dir / FOLDER / "step-00000099.partial", run_dir / "model.partial"):
        stale.mkdir(exist_ok=True)
        (stale / "state.safetensors").write_bytes(os.urandom(100))
    return True


def _stale_file(run_dir: Path) -> bool:
    for stale in (run_dir / FOLDER / "step-00000098.partial", run_dir / "model.partial"):
        if not stale.exists():
            stale.write_bytes(b"left over")
    return True


def _newest(run_dir: Path) -> Path | None:
    """Return the newest checkpoint where there is one before it to resume from."""
    found = complete_ones(run_dir / FOLDER)
    return found[-1] if len(found) > 1 else None


def _cut(name: str) -> Callable[[Path], bool]:
    def cut(run_dir: Path) -> bool:
        newest = _newest(run_dir)
        if newest is not None:
            os.truncate(newest / name, (newest / name).stat().st_size // 2)
        return newest is not None

    return cut


def _flip(run_dir: Path) -> bool:
    newest = _newest(run_dir)
    if newest is not None:
        path = newest / "state.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    return newest is not None


def _append(name: str, data: bytes) -> Callable[[Path], bool]:
    def append(run_dir: Path) -> bool:
        path = run_dir / name
        if not path.is_file():
            return False
        with path.open("ab") as file:
            file.write(data)
        return True

    return append


def _torn_latest(run_dir: Path) -> bool:
    latest = run_dir / "deepspeed/latest"
    if latest.is_file():
        latest.write_text("ste")
    return latest.is_file()


_ACTS: dict[str, Callable[[Path], bool]] = {
    "stale partial folders": _stale_folder,
    "stale partial files": _stale_file,
    "torn weights of the newest checkpoint": _cut("state.safetensors"),
    "torn state.json of the newest checkpoint": _cut("state.json"),
    "torn SHA256SUMS of the newest checkpoint": _cut("SHA256SUMS"),
    "a flipped bit in the newest checkpoint": _flip,
    "NUL bytes at the end of metrics.jsonl": _append("metrics.jsonl", bytes(100)),
    "half a line at the end of metrics.jsonl": _append("metrics.jsonl", b'{"step": 3, "trai'),
    "garbage in lock.json": _append("lock.json", b"\xff\x00{{"),
    "a torn latest": _torn_latest,
}
DAMAGES = tuple(_ACTS)
