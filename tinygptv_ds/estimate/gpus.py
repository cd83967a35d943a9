"""The GPUs that `estimate` knows, and the links between them. Needs no torch."""

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
        name: its name on the command line.
        gib: memory in GiB.
        teraflops: peak of dense bf16 matrix products with fp32 accumulation in TFLOP/s, from its vendor's data sheet.
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
    """Return the cards of these names in any case; "all" means every card.

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


@dataclass(frozen=True)
class Link:
    """A link between ranks.

    Attributes:
        name: its name on the command line.
        gigabytes: nominal speed in GB/s (10^9 bytes) in each direction, of a GPU within a node or of a whole node.
    """

    name: str
    gigabytes: float


NVLINK, PCIE = Link("NVLink", 300.0), Link("PCIe", 25.0)  # an A100's, in each direction; PCIe 4.0 x16 as measured
LINKS = (NVLINK, Link("400Gb/s", 50.0), PCIE, Link("100Gb/s", 12.5), Link("25Gb/s", 3.125))


def links_named(names: Sequence[str]) -> list[Link]:
    """Return the links of these names in any case, or of so many GB/s; "all" means every named link.

    Raises:
        ConfigError: a link is neither a name nor a number above 0.
    """
    if "all" in names:
        return list(LINKS)
    known = {link.name.lower(): link for link in LINKS}
    return [known.get(name.lower()) or _link_of(name) for name in names]


def _link_of(speed: str) -> Link:
    try:
        gigabytes = float(speed)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(
            f"--link {speed}: neither a number of GB/s nor one of {', '.join(link.name for link in LINKS)}"
            f"{nearest(speed, [link.name for link in LINKS])}"
        )
    return Link(f"{gigabytes:g}GB/s", gigabytes)
