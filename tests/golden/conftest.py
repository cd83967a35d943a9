"""Reference values of the original TinyGPT-V; `pytest tests/golden --golden DIR` takes another set of this layout.

Nothing in these tests may assume the sizes, names or cases of the set that is next to them.
"""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

_DEFAULT = Path(__file__).parent / "data"


def _folder(config: pytest.Config) -> Path:
    return Path(config.getoption("golden") or _DEFAULT)


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    return _folder(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize over the cases of the set in use: one test for each."""
    _generate_language_model(metafunc)
    _generate_full_model(metafunc)
    _generate_datasets(metafunc)
    if "training_set" in metafunc.fixturenames:
        sets = sorted((_folder(metafunc.config) / "training").glob("*/recipe.json"))
        metafunc.parametrize("training_set", [path.parent.name for path in sets])


def _generate_language_model(metafunc: pytest.Metafunc) -> None:
    """Parametrize the language model's tests: `phi_case` and `lora_case` have a loss, `greedy_case` has tokens."""
    for fixture, part, sign in (
        ("phi_case", "phi", "loss"),
        ("lora_case", "lora", "loss"),
        ("greedy_case", "phi", "new_tokens"),
    ):
        if fixture in metafunc.fixturenames:
            files = sorted((_folder(metafunc.config) / part).glob("*.safetensors"))
            metafunc.parametrize(fixture, [file.stem for file in files if sign in names_in(file)])


def _generate_full_model(metafunc: pytest.Metafunc) -> None:
    """Parametrize the full model's tests: `full_name` is a model, the others are cases by the content of their JSON."""
    root = _folder(metafunc.config) / "full"
    if "full_name" in metafunc.fixturenames:
        metafunc.parametrize("full_name", sorted(path.parent.name for path in root.glob("*/weights.safetensors")))
    signs = {"training_case": "samples", "greedy_prompts": "new_tokens", "candidates_case": "candidates_by_index"}
    signs["prompt_case"] = "texts"
    for fixture in signs.keys() & set(metafunc.fixturenames):
        cases = [
            path for path in sorted(root.glob("*/cases/*.json")) if signs[fixture] in json.loads(path.read_bytes())
        ]
        if fixture == "prompt_case":
            cases = [path for path in cases if "layout" in json.loads(path.read_bytes())]
        metafunc.parametrize(fixture, cases, ids=[f"{path.parents[1].name}/{path.stem}" for path in cases])


def names_in(file: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file."""
    with safe_open(file, framework="np") as opened:
        return set(opened.keys())


def _generate_datasets(metafunc: pytest.Metafunc) -> None:
    """Parametrize over the datasets (`map_name`, `shard_name`) and oddities."""
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
