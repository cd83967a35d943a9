"""The ledger's table: kernels, bytes and operations of each case by part, stored as JSON, printed as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import PUBLISHED_BATCH, Case
from benchmarks.operations.fusion import Kernels, compiled, uncompiled
from benchmarks.operations.step import record_step

LEDGER = Path(__file__).resolve().parents[1] / "ledger.json"
REGENERATE = "python benchmarks/ledger.py --write"
CASES = tuple(
    Case(stage, 2, "bf16", source, batch)
    for stage, batch in ((1, PUBLISHED_BATCH[1]), (4, PUBLISHED_BATCH[4]), (4, 16))
    for source in ("pixels", "features")
)
WAYS = {"uncompiled": uncompiled, "compiled blocks": compiled}
SAME_BYTES = 0.01  # relative difference of bytes and operations that is no change
_LIBRARIES = ("torch", "transformers", "timm")  # decide which operations a model makes


def name_of(case: Case) -> str:
    """Return the name of a case in the table."""
    return f"stage {case.stage}, {case.batch} samples, {case.source}"


def count(case: Case) -> dict[str, dict[str, list[float]]]:
    """Return kernels, megabytes and GFLOP of a case, by way and part."""
    operations = record_step(case, one_rank=True).recorder.operations
    return {
        way: {part: _plain(kernels) for part, kernels in {**parts(operations), "all": total(parts(operations))}.items()}
        for way, parts in WAYS.items()
    }


def total(parts: Mapping[str, Kernels]) -> Kernels:
    """Return the sum of all parts."""
    return sum(parts.values(), Kernels())


def _plain(kernels: Kernels) -> list[float]:
    return [kernels.kernels, round(kernels.bytes / 1e6, 1), round(kernels.flops / 1e9, 1)]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide which operations there are."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def count_all() -> dict[str, Any]:
    """Return the whole table."""
    return {"versions": versions(), "cases": {name_of(case): count(case) for case in CASES}}


def write(table: Mapping[str, Any]) -> None:
    """Write the committed table."""
    LEDGER.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def read() -> dict[str, Any]:
    """Return the committed table."""
    return json.loads(LEDGER.read_text(encoding="utf-8"))


def changes(case: Case, found: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return a line for each part of a case whose kernels, bytes or operations are not those of the committed table.

    Args:
        case: the case.
        found: its `count`.
        before: the committed table.
    """
    kept = before["cases"][name_of(case)]
    return [
        f"{name_of(case)}, {way}, {part}: {_text(kept[way].get(part))} in the table, {_text(found[way].get(part))} now"
        for way in WAYS
        for part in {**kept[way], **found[way]}
        if not _same(kept[way].get(part), found[way].get(part))
    ]


def _same(one: list[float] | None, other: list[float] | None) -> bool:
    if one is None or other is None:
        return False
    close = all(abs(a - b) <= SAME_BYTES * max(a, b) for a, b in zip(one[1:], other[1:], strict=True))
    return close and one[0] == other[0]


def _text(values: list[float] | None) -> str:
    return "nothing" if values is None else "{:.0f} kernels, {:.1f} MB, {:.1f} GFLOP".format(*values)


def markdown(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table in Markdown, kernels and gigabytes in both ways."""
    ways = " | ".join(f"{way}: kernels | GB" for way in WAYS)
    yield f"| | part | TFLOP | {ways} |"
    yield f"|{'-|' * (3 + 2 * len(WAYS))}"
    for name, by_way in table["cases"].items():
        first = by_way[next(iter(WAYS))]
        for part in first:
            cells = " | ".join(f"{by_way[way][part][0]:,.0f} | {by_way[way][part][1] / 1e3:.1f}" for way in WAYS)
            yield f"| {name} | {part} | {first[part][2] / 1e3:.2f} | {cells} |"
            name = ""
