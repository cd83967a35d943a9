"""GPUs that `estimate` knows. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.flops import PEAK_TFLOPS


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as the command line takes it.
        gib: memory.
        teraflops: dense bf16 matrix products with fp32 sums, 10^12 operations a second, by its maker's data sheet.
    """

    name: str
    gib: float
    teraflops: float


CARDS = (
    Card("RTX-3090", 24, PEAK_TFLOPS["RTX 3090"]),
    Card("RTX-4090", 24, PEAK_TFLOPS["RTX 4090"]),
    Card("A6000", 48, PEAK_TFLOPS["RTX A6000"]),
    Card("L40S", 48, PEAK_TFLOPS["L40S"]),
    Card("A100-40GB", 40, PEAK_TFLOPS["A100"]),
    Card("A100-80GB", 80, PEAK_TFLOPS["A100"]),
    Card("H100-80GB", 80, PEAK_TFLOPS["H100"]),
    Card("H200-141GB", 141, PEAK_TFLOPS["H200"]),
)


def cards_named(names: Sequence[str]) -> list[Card]:
    """The cards of these names, whatever their case; "all": every one.

    Raises:
        ConfigError: a name is unknown.
    """
    if "all" in names:
        return list(CARDS)
    known = {card.name.lower(): card for card in CARDS}
    for name in names:
        if name.lower() not in known:
            raise ConfigError(f"--gpu {name}: unknown card{nearest(name, [card.name for card in CARDS])}")
    return [known[name.lower()] for name in names]
