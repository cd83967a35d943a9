"""The cases that are measured, the most valuable first. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SIZES = ("published", "tiny")
PUBLISHED_BATCH = {1: 64, 4: 2}  # samples of a forward pass on one GPU in the stages' recipes
LARGER = 8  # times the published batch of stage 4, which is too small for a large GPU
CHECKS = "checks"  # name of the part with the machine, attention, and the whole model packed and padded


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        stage: 1 or 4.
        zero: ZeRO stage.
        precision: "bf16" or "fp16".
        source: "pixels" or "features".
        batch: samples of a forward pass on one GPU.
        recompute: whether Phi's blocks are recomputed in the backward pass.
    """

    stage: int
    zero: int
    precision: str
    source: str
    batch: int
    recompute: bool = False

    @property
    def group(self) -> str:
        """Return the name of the group; its cases are measured in one process, on one engine."""
        return f"ZeRO-{self.zero}, {self.precision}, stage {self.stage}"

    @property
    def twin(self) -> tuple[object, ...]:
        """Return a key that is equal for cases that differ only in the ZeRO stage and so must have the same losses."""
        return (self.stage, self.precision, self.source, self.batch, self.recompute)

    def halved(self) -> Case | None:
        """Return the case with half the batch, or None if the batch is one sample."""
        return replace(self, batch=self.batch // 2) if self.batch > 1 else None

    def __str__(self) -> str:
        recompute = ", recomputed" if self.recompute else ""
        return f"{self.group}, {self.source}, {self.batch} samples{recompute}"


@dataclass(frozen=True)
class Group:
    """Cases of one process, and whether a checkpoint is saved after them."""

    cases: tuple[Case, ...]
    save: bool = False

    @property
    def name(self) -> str:
        """Return the name of the group."""
        return self.cases[0].group


def groups() -> Iterator[Group]:
    """Yield all groups. Cases with a twin come first in a group, so that both follow the same steps."""
    for precision in ("bf16", "fp16"):
        for zero in (2, 3):
            for stage in (1, 4):
                plain = Case(stage, zero, precision, "pixels", PUBLISHED_BATCH[stage])
                cases = [plain, replace(plain, source="features")]
                first = precision == "bf16" and zero == 2
                if stage == 4 and precision == "bf16":
                    cases.append(replace(plain, recompute=True))
                if stage == 4 and first:
                    cases.append(replace(plain, batch=LARGER * plain.batch))
                yield Group(tuple(cases), save=stage == 4 and (first or (precision == "fp16" and zero == 3)))
