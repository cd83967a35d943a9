"""Results of the measuring processes: lines of JSON, appended as they come. Needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MEASURED, OUT_OF_MEMORY = "measured", "out of memory"  # status of a case


def add(path: Path, kind: str, value: Any) -> None:
    """Append one result; it is on disk afterwards, since a run on a lent machine may be cut off at any time."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, "value": value}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def add_check(path: Path, name: str, value: float, limit: float) -> None:
    """Append a check, which is passed if `value` is at most `limit`; NaN fails."""
    add(path, "check", check(name, value, limit))


def check(name: str, value: float, limit: float) -> dict[str, Any]:
    """Return a check as it is reported and stored."""
    return {"name": name, "value": value, "limit": limit, "passed": value <= limit}


def read(path: Path) -> list[dict[str, Any]]:
    """Return all results in order, without a line that a killed process has left incomplete."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
