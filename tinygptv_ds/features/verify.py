"""Training from features: only from those that this very vision path would have made."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.features.format import refuse_stale
from tinygptv_ds.features.vision_fingerprint import vision_facts
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.setup.job import Job


def check_features(model: TinyGPTVForConditionalGeneration, job: Job) -> None:
    """Hold the model's vision path against what the features of `data.features` were made with, where it names some.

    To be called on all ranks, before DeepSpeed divides the weights.

    Raises:
        ConfigError: the vision path learns, so that features would be wrong after the first step.
        DataError: features are stale; says in what they differ and how to make them again.
    """
    data = job.recipe.data
    if data.features is None:
        return
    if not model.vision_is_frozen:
        raise ConfigError(
            "data.features is set, but the ViT or the Q-Former is trained, whose outputs change with every step; set "
            "data.features to null, or freeze them"
        )
    here = vision_facts(model, job.precision)
    for section in data.used:
        refuse_stale(Path(data.features) / section.name, here)
