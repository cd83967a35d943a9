"""One result of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckResult:
    """One line of the report of `doctor`.

    Attributes:
        name: what was checked.
        text: the result.
        remedy: what to do about it, if anything.
        blocks: whether training is impossible without it.
    """

    name: str
    text: str
    remedy: str | None = None
    blocks: bool = False

    def __str__(self) -> str:
        mark = "MISSING" if self.blocks else "note" if self.remedy else "ok"
        line = f"{mark:8} {self.name:16} {self.text}"
        return line if self.remedy is None else f"{line}\n{'':25} -> {self.remedy}"
