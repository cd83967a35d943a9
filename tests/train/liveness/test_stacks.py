"""The file of a rank's stacks where the run directory is in the way."""

from pathlib import Path

import pytest

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.liveness.stacks import Stacks


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); make room, or move .*/stacks away"):
        Stacks(tmp_path, 0)
    assert (tmp_path / "stacks").read_text() == "mine"
