"""What the measuring processes hand to the one that started them: lines of JSON, kept as far as they got. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED, OUT_OF_MEMORY = "measured", "out of memory"  # what became of a case


def add(path: Path, kind: str, value: Any) -> None:
    """Append one result."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, "value": value}) + "\n")


def add_check(path: Path, name: str, value: float, limit: float) -> None:
    """Append a check: passed where `value` is at most `limit`; NaN never is."""
    add(path, "check", check(name, value, limit))


def check(name: str, value: float, limit: float) -> dict[str, Any]:
    """A check as it is told and stored."""
    return {"name": name, "value": value, "limit": limit, "passed": value <= limit}


def read(path: Path) -> list[dict[str, Any]]:
    """All results in order; a line cut short by a killed process is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
