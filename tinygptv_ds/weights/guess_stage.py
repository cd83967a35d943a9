"""Which stage trained weights are of, as far as a file tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinygptv_ds.models.parameters import lora
from tinygptv_ds.weights.detect import Opened
from tinygptv_ds.weights.source import Source


@dataclass(frozen=True)
class StageGuess:
    """The stages that weights may be of, and by what that shows."""

    stages: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        return f"{' or '.join(map(str, self.stages))} ({self.why})"


def guess_stage(opened: Opened, source: Source) -> StageGuess:
    """From a run's notes, the size of a released file, the configuration inside an original's file, or the names.

    Args:
        opened: where the weights lie.
        source: the same weights under canonical names.
    """
    if isinstance(opened.notes.get("stage"), int):
        return StageGuess((opened.notes["stage"],), "its provenance.json")
    if opened.released is not None:
        return StageGuess((opened.released.stage,), f"the size of the released {opened.released.name}")
    has_lora = any(map(lora, source.weights))
    stage = _by_configuration(opened.notes.get("config"), has_lora)
    if stage is not None:
        return StageGuess((stage,), "the configuration in the file")
    if any(name.startswith("qformer.") for name in source.weights):
        return StageGuess((4,), "a trained Q-Former, as in the first release")
    if has_lora:
        return StageGuess((2, 3, 4), "LoRA; what the three train is alike")
    return StageGuess((1,), "no LoRA")


def _by_configuration(config: Any, has_lora: bool) -> int | None:
    """The original saves its whole configuration, of which the model class and the datasets differ by stage."""
    if not isinstance(config, dict):
        return None
    model, datasets = config.get("model"), config.get("datasets")
    if isinstance(model, dict) and model.get("arch") == "minigpt_v2":
        return 4
    if not isinstance(datasets, dict):
        return None
    if "cc_sbu_align" in datasets:
        return 3
    return (2 if has_lora else 1) if {"laion", "cc_sbu"} & datasets.keys() else None
