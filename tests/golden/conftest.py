"""Reference values of the original TinyGPT-V; `pytest --golden=DIR` checks against another set of the same layout."""

import json
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).parent / "data"


def _folder(config: pytest.Config) -> Path:
    return Path(config.getoption("golden") or _DEFAULT)


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    return _folder(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each dataset (`map_name`, `shard_name`) and oddity of the set in use."""
    wanted = {"map_name", "shard_name", "oddity"} & set(metafunc.fixturenames)
    if not wanted:
        return
    files = sorted((_folder(metafunc.config) / "datasets/expected").glob("*.json"))
    content = {path.stem: json.loads(path.read_bytes()) for path in files}
    oddities = [case for case in content.pop("oddities") if "content" in case]
    if "oddity" in wanted:
        metafunc.parametrize("oddity", oddities, ids=lambda case: f"{case['dataset']}: {case['case']}")
    if "map_name" in wanted:
        metafunc.parametrize("map_name", [name for name, dataset in content.items() if dataset["kind"] == "map"])
    if "shard_name" in wanted:
        metafunc.parametrize("shard_name", [name for name, dataset in content.items() if dataset["kind"] != "map"])
