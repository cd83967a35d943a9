"""The interface of an experiment tracker, and what a tracker gets of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinygptv_ds.files import write_atomically

_EARLIER_WANDB = "wandb.json"  # of a run directory from before there were other trackers: {"id": its id in W&B}


class Tracker(Protocol):
    """One run in one tracker; its class is the function that starts or resumes it, from a `TrackedRun`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics after a step. A resumed run repeats steps: none may be refused."""

    def finish(self, *, completed: bool) -> None:
        """Send what is waiting and close the run, which has reached its last step or not."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets of a run.

    Attributes:
        project: where runs are collected.
        run_dir: its last name is that of the run.
        config: the recipe, nested.
    """

    project: str
    run_dir: Path
    config: Mapping[str, Any]

    def stored_id(self, tracker: str) -> str | None:
        """Return the id that this run has in a tracker since an earlier attempt; None: it has none."""
        found = self._ids().get(tracker)
        if found is None and tracker == "wandb":
            found = _read_object(self.run_dir / _EARLIER_WANDB).get("id")
        return found if isinstance(found, str) else None

    def store_id(self, tracker: str, value: str) -> None:
        """Keep the id for attempts to come."""
        text = json.dumps({**self._ids(), tracker: value}, indent=2)
        write_atomically(self._file, f"{text}\n".encode())

    @property
    def _file(self) -> Path:
        return self.run_dir / "trackers.json"

    def _ids(self) -> dict[str, Any]:
        return _read_object(self._file)


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none yet, or a damaged one."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
