"""MLflow as a tracker, at `MLFLOW_TRACKING_URI`, or in the database `mlflow.db` of the current folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from tinygptv_ds.config.load import dotted_values
from tinygptv_ds.train.trackers.tracker import TrackedRun

# The package's own 7 attempts of 2 minutes each take too long where no server answers.
_ATTEMPTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_LONGEST, _MOST = 500, 100  # characters of a parameter, parameters of a call: what every server takes


class MlflowRun:
    """A run in an experiment of MLflow, which a resumed run continues; steps may be logged again."""

    def __init__(self, run: TrackedRun) -> None:
        for name, value in _ATTEMPTS.items():
            os.environ.setdefault(name, value)
        self._client = MlflowClient()
        self._id = self._resumed(run.stored_id("mlflow")) or self._created(run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics with their step."""
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def finish(self, *, completed: bool) -> None:
        """Close the run."""
        self._client.set_terminated(self._id, "FINISHED" if completed else "KILLED")

    def _resumed(self, stored: str | None) -> str | None:
        """Open the run of an earlier attempt again; None: there is none, or it has been deleted."""
        if stored is None:
            return None
        try:
            self._client.update_run(stored, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return stored

    def _created(self, run: TrackedRun) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        number = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        created = self._client.create_run(number, run_name=run.run_dir.resolve().name).info.run_id
        run.store_id("mlflow", created)
        settings = [Param(key, _short(value)) for key, value in dotted_values(run.config).items()]
        for start in range(0, len(settings), _MOST):
            self._client.log_batch(created, params=settings[start : start + _MOST])
        return created


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
