"""The memory of a step as a chart: its parts by micro-batch size, next to what cards have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tinygptv_ds.charts.bars import bar_chart
from tinygptv_ds.charts.style import stacked, standalone
from tinygptv_ds.estimate.gpus import Card
from tinygptv_ds.estimate.memory import GIB, Memory
from tinygptv_ds.estimate.result import Estimate
from tinygptv_ds.files import whole_file

SIZES = tuple(2**power for power in range(13))  # samples of a micro-batch
_SETTINGS = ("ZeRO-2", "ZeRO-3")
_LEAST_BARS = 4
_SIZE = (640.0, 340.0)


def write_plot(file: Path, result: Estimate, cards: Sequence[Card]) -> None:
    """Write an SVG with a chart for ZeRO-2 and one for ZeRO-3, as far as the recipe goes with them."""
    charts = [_chart(setting, result, cards) for setting in _SETTINGS if setting in result.memory]
    with whole_file(file) as partial:
        partial.write_text(standalone(stacked(charts, _SIZE)), encoding="utf-8")


def _chart(setting: str, result: Estimate, cards: Sequence[Card]) -> str:
    """Draw sizes up to the first that no card has room for."""
    memory = {size: settings[setting] for size, settings in result.memory_by_size.items()}
    most = max(card.gib for card in cards) * GIB
    fitting = sum(each.total <= most for each in memory.values())
    bars = [(str(size), _parts(each)) for size, each in list(memory.items())[: max(fitting, _LEAST_BARS)]]
    names: dict[float, list[str]] = {}
    for card in cards:
        names.setdefault(card.gib, []).append(card.name)
    return bar_chart(
        bars,
        x_label="samples of a micro-batch",
        y_label=f"{setting} on {result.gpus} GPU{'s' if result.gpus > 1 else ''}: GiB of each",
        limits=[(", ".join(each), gib) for gib, each in sorted(names.items())],
        size=_SIZE,
    )


def _parts(memory: Memory) -> dict[str, float]:
    return {name.replace("_and_", " and "): value / GIB for name, value in asdict(memory).items()}
