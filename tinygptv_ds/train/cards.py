"""GPUs that `estimate` knows. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import ConfigError


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
    Card("RTX-3090", 24, 71),
    Card("RTX-4090", 24, 165),
    Card("A6000", 48, 155),
    Card("L40S", 48, 362),
    Card("A100-40GB", 40, 312),
    Card("A100-80GB", 80, 312),
    Card("H100-80GB", 80, 989),
    Card("H200-141GB", 141, 989),
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
