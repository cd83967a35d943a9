"""What a run has written into its directory."""

import json
from pathlib import Path
from typing import Any


class Written:
    """The base of whatever knows a run's `folder`."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def column(self, name: str) -> list[float]:
        """One metric of every line."""
        return [line[name] for line in self.metrics]
