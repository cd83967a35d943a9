"""A tiny model for the evaluation scripts."""

from pathlib import Path

import pytest
from helpers import tiny


@pytest.fixture(scope="session")
def exported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export_model(weights, tmp_path_factory.mktemp("exported") / "model")
