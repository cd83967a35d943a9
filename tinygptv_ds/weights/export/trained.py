"""The export of trained weights alone, which are loaded on the same base weights."""

from __future__ import annotations

from pathlib import Path

import torch

from tinygptv_ds.files import whole_folder
from tinygptv_ds.weights.resolve import Resolved
from tinygptv_ds.weights.trained import write_model


def export_trained(resolved: Resolved, out: Path, *, dtype: torch.dtype | None) -> None:
    """Write the files of a run's `model/` folder, with the hashes of the base weights that they belong to.

    Args:
        resolved: the model.
        out: the folder; its provenance.json has the paths of the base weights.
        dtype: of the weights; None keeps each one's own.
    """
    with whole_folder(out) as partial:
        write_model(partial, resolved.trained.weights, resolved.config, resolved.provenance(), dtype=dtype)
