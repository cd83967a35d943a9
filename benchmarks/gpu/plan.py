"""The cases that are measured, the most valuable first. Needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

SIZES = ("published", "tiny")
PUBLISHED_BATCH = {1: 64, 4: 2}  # samples of a forward pass on one GPU in the stages' recipes
COMPUTE = {1: 64, 4: 16}  # samples that keep a large GPU busy
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
        original: whether this is the original's procedure (original.py), the baseline of its stage and batch.
        lever: one of `LEVERS` that is tried, or "".
    """

    stage: int
    zero: int
    precision: str
    source: str
    batch: int
    recompute: bool = False
    original: bool = False
    lever: str = ""

    @property
    def group(self) -> str:
        """Return the name of the group; its cases are measured in one process, on one engine."""
        if self.original:
            return f"the original's procedure, stage {self.stage}, {self.batch} samples"
        lever = f", {self.lever}" if self.lever else ""
        return f"ZeRO-{self.zero}, {self.precision}, stage {self.stage}{lever}"

    @property
    def twin(self) -> tuple[object, ...]:
        """Return a key that is equal for cases that differ only in the ZeRO stage and so must have the same losses."""
        return (self.stage, self.precision, self.source, self.batch, self.recompute, self.original, self.lever)

    def halved(self) -> Case | None:
        """Return the case with half the batch, or None if the batch is one sample."""
        return replace(self, batch=self.batch // 2) if self.batch > 1 else None

    @property
    def baseline(self) -> tuple[int, int]:
        """Return the stage and the batch, by which a case is compared with the original's procedure."""
        return self.stage, self.batch

    def __str__(self) -> str:
        if self.original:
            return self.group
        recompute = ", recomputed" if self.recompute else ""
        return f"{self.group}, {self.source}, {self.batch} samples{recompute}"


COMPILED, GRAPHS, QUANTIZED, FP8 = "compiled", "CUDA graphs", "4 bit", "fp8"
LEVERS = (COMPILED, GRAPHS, QUANTIZED, FP8)  # what makes a step faster or smaller


def obstacle(case: Case, size: str) -> str | None:
    """Return why a case cannot be measured here, None if it can.

    Args:
        case: the case.
        size: one of `SIZES`; without a GPU it is "tiny".
    """
    if case.lever == FP8 and size == "tiny":
        return "fp8 needs a GPU and the published model"
    if case.lever == GRAPHS and size == "tiny":
        return "CUDA graphs need a GPU and the published model"
    if case.lever == QUANTIZED and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if case.lever == QUANTIZED and size == "tiny":
        return "the tiny model's layers are smaller than a block of quantized weights"
    return None


@dataclass(frozen=True)
class Group:
    """Cases of one process, whether a checkpoint is saved after them, and whether they are measured by default."""

    cases: tuple[Case, ...]
    save: bool = False
    by_default: bool = True

    @property
    def name(self) -> str:
        """Return the name of the group."""
        return self.cases[0].group

    @property
    def module(self) -> str:
        """Return the module of this package that measures the cases."""
        return "original" if self.cases[0].original else "steps"


def groups() -> Iterator[Group]:
    """Yield all groups: of each stage the original's procedure before and after ours, then levers, then the rest."""
    for stage in (1, 4):
        sizes = sorted({PUBLISHED_BATCH[stage], COMPUTE[stage]})
        originals = [Case(stage, 0, "fp16", "pixels", batch, original=True) for batch in sizes]
        yield from (Group((case,)) for case in originals)
        yield _ours(stage, 2, "bf16")
        yield from (Group((case,)) for case in originals)
    for lever in LEVERS:
        for stage in (4, 1):
            sizes = sorted({PUBLISHED_BATCH[stage], COMPUTE[stage]})
            yield Group(tuple(Case(stage, 2, "bf16", "pixels", batch, lever=lever) for batch in sizes))
    for precision, zero in (("bf16", 3), ("fp16", 2), ("fp16", 3)):
        for stage in (1, 4):
            yield replace(_ours(stage, zero, precision), by_default=False)


def _ours(stage: int, zero: int, precision: str) -> Group:
    """Return the cases of an engine. Those with a twin come first, so that both follow the same steps."""
    plain = Case(stage, zero, precision, "pixels", PUBLISHED_BATCH[stage])
    cases = [plain, replace(plain, source="features")]
    first = precision == "bf16" and zero == 2
    if stage == 4 and first:
        cases += [replace(each, batch=COMPUTE[stage]) for each in cases]
    if stage == 4 and precision == "bf16":
        cases.append(replace(plain, recompute=True))
    return Group(tuple(cases), save=stage == 4 and (first or (precision == "fp16" and zero == 3)))
