"""A run's `model/` folder: what was trained, its configuration, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.files import sha256, whole_folder
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.weights.detect import WEIGHTS
from tinygptv_ds.weights.io import Stored, in_memory
from tinygptv_ds.weights.provenance import write_provenance
from tinygptv_ds.weights.safetensors_writer import write_file


def save_trained(state: Mapping[str, Tensor], config: TinyGPTVConfig, out: Path, provenance: Mapping[str, Any]) -> None:
    """Write a run's `model/` folder, complete or not at all; one that is there is replaced.

    Args:
        state: what was trained, by canonical name; stored in fp32.
        config: the model's.
        out: the folder; it gets `trained.safetensors`, `config.json` and `provenance.json`.
        provenance: from `provenance_of`; the hash of the weights and the versions are added.
    """
    weights = {name: in_memory(tensor.detach().cpu()) for name, tensor in state.items()}
    with whole_folder(out) as partial:
        write_model(partial, weights, config, provenance, dtype=torch.float32)


def write_model(
    folder: Path,
    weights: Mapping[str, Stored],
    config: TinyGPTVConfig,
    notes: Mapping[str, Any],
    *,
    dtype: torch.dtype | None,
) -> None:
    """Write the three files into a folder that is there; `dtype` None keeps each weight's own."""
    write_file(folder / WEIGHTS, weights, dtype=dtype)
    config.save_pretrained(folder)
    write_provenance(folder, {**notes, "sha256": {WEIGHTS: sha256(folder / WEIGHTS)}})
