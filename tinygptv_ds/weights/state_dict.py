"""The state dict in what a PyTorch file holds: the content itself, or under the keys that trainers put it under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing

# In the order of preference: of a file with "model" and "state_dict", the first that holds tensors is taken.
_KEYS = ("model", "module", "state_dict", "model_state_dict", "model_state")


def find_state(content: Any, path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return the tensors of a file's state dict by name, and what the file holds next to the state dict.

    A state dict may be nested in others: `{"state_dict": {"model": {...}}}`. Under a key that is not among the usual
    ones it is found if no other dictionary there holds tensors.

    Raises:
        WeightsError: there is none, or there are several.
    """
    notes: dict[str, Any] | None = None
    while (key := _nested(content, path)) is not None:
        if notes is None:
            notes = {other: value for other, value in content.items() if other != key}
        content = content[key]
    state = _tensors(content)
    if not state:
        held = f"; it holds {listing(map(str, content))}" if isinstance(content, dict) and content else ""
        raise WeightsError(
            f"{path}: no state dict (tensors by name, or such a dict under {', '.join(map(repr, _KEYS))}){held}. Save "
            "the weights with torch.save(model.state_dict(), FILE)"
        )
    return state, notes or {}


def _nested(content: Any, path: Path) -> str | None:
    """Return the key of `content` that the state dict is under; None if `content` is one itself, or holds none."""
    if not isinstance(content, dict):
        return None
    usual = next((key for key in _KEYS if _holds_state(content.get(key))), None)
    if usual is not None or _tensors(content):
        return usual
    others = [key for key, value in content.items() if isinstance(key, str) and _holds_state(value)]
    if len(others) > 1:
        raise WeightsError(
            f"{path}: {len(others)} state dicts, under {listing(others)}; save the one that is meant as a file of its "
            f"own, e.g. torch.save(torch.load(FILE, weights_only=True)[{others[0]!r}], OUT)"
        )
    return others[0] if others else None


def _holds_state(value: Any) -> bool:
    return isinstance(value, dict) and (bool(_tensors(value)) or any(_holds_state(value.get(key)) for key in _KEYS))


def _tensors(content: Any) -> dict[str, Stored]:
    """Return the tensors by name of a dictionary; those of an optimizer are numbered, not named."""
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Stored)}
