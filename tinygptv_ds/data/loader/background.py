"""How the images of a dataset are read: as in the original, or upright and on a background."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.data.sets import DATASETS
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.processing.image import WHITE, Color, parse_background


def reading_of(section: DatasetSection) -> dict[str, Any]:
    """Return what the features of a dataset depend on apart from the vision path, as plain values.

    Nothing where images are read as in the original.
    """
    background = background_of(section)
    return {} if background is None else {"background": list(background)}


@lru_cache(maxsize=256)
def background_of(section: DatasetSection) -> Color | None:
    """Return the background of a dataset's images; None: as in the original (see processing/image.py).

    Raises:
        ConfigError: the recipe names no color.
    """
    if section.background == "auto":
        entry = DATASETS.get(section.name)
        return WHITE if entry is None or entry.own else None
    try:
        return parse_background(section.background)
    except ConfigError as error:
        raise ConfigError(f"data.datasets, {section.name}: background: {error}") from None
