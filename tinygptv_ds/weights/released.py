"""The files of TinyGPT-V that its authors released (Hugging Face, `Tyrannosaurus/TinyGPT-V`), with size and hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """One released file.

    Attributes:
        name: its file name there.
        stage: the stage that trained it.
        size: in bytes.
        sha256: its hash.
        note: its content in a few words.
        usable: whether it is complete.
    """

    name: str
    stage: int
    size: int
    sha256: str
    note: str
    usable: bool = True


RELEASED = (
    Released(
        "TinyGPT-V_for_Stage1.pth",
        1,
        165_963_356,
        "15dead9d74257d3b718ef10948b209a0f4a8787047991b15d40ed5c17050e9da",
        "projections and norms, no LoRA",
    ),
    Released(
        "TinyGPT-V_for_Stage2.pth",
        2,
        543_639_991,
        "a0239c9531f3ccffd3a6a1a1a28cb73be2474398cfc1d6a3ee40290df643a437",
        "with LoRA",
    ),
    Released(
        "TinyGPT-V_for_Stage3.pth",
        3,
        543_640_119,
        "a7b70bb29a827792ed2f17655ec5bba2f964e7a08fb718edb914004edc2fd5c8",
        "with LoRA",
    ),
    Released(
        "TinyGPT-V_for_Stage4.pth",
        4,
        543_654_414,
        "c74973388674f881e57a150de2e69241b5fd9c6b2c52c14536906803abe6d409",
        "with LoRA, v1 of 2024-01-19, the current one",
    ),
    Released(
        "TinyGPT-V_for_Stage4.pth",
        4,
        1_805_910_138,
        "2e6da66676da74a47bce0329ddfedd1f37306c45c0053d6e69376e55c2027d0d",
        "with LoRA and a trained Q-Former, v0 of 2023-12-28",
    ),
    Released(
        "TinyGPT-V_for_Stage4.pth",
        4,
        23_711_618,
        "0e1dac684e81b9dbfe1854240f529516711e4cd65e71977acf010a8b78891f61",
        "a broken upload of 2024-01-19: download the file again",
        usable=False,
    ),
)


def released_by_size(size: int) -> Released | None:
    """Return the released file of this size; another file hardly has it to the byte."""
    return next((file for file in RELEASED if file.size == size), None)


def released_by_hash(sha256: str) -> Released | None:
    """Return the released file of this hash."""
    return next((file for file in RELEASED if file.sha256 == sha256), None)
