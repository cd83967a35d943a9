"""Imports point one way, heavy packages stay where they belong, and no test names a path of one machine."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinygptv_ds"
BASE = {"errors", "config", "log", "distributed", "files", "retry", "dtypes", "resources", "arguments", "git_lfs"}
BASE |= {"board_tags", "charts", "console", "processes", "remote_code", "plain_pickle", "object_storage"}
MIDDLE = BASE | {"processing", "features.format", "data", "models"}
# What each part of the package may import apart from itself; `__init__` (the version) is open to all.
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "resources": set(),
    "board_tags": set(),  # written by `train` and by `eval`
    "charts": set(),  # drawn by `report` and by `estimate`, which know nothing of each other
    "console": set(),  # what every verb prints with, `cli` before it has imported anything else
    "processes_elsewhere": set(),
    "processes": {
        "processes_elsewhere"
    },  # /proc and the end of a parent: the loader, the launcher and finetune ask for them
    "plain_pickle": {"errors"},
    "arguments": set(),
    "git_lfs": set(),
    "config": {"errors", "files", "resources"},
    "log": {"errors", "console"},
    "distributed": {"errors", "processes"},
    "files": {"errors"},
    "retry": {"errors"},
    "object_storage": {"errors", "files", "retry"},
    "dtypes": set(),
    "remote_code": {"resources"},  # reads the source of other modules, imports none
    "processing": BASE,
    "features.format": BASE | {"data"},  # the file format, read by the loader; computing the features comes later
    "train.schedule": BASE,  # pure functions of the recipe, as are the warnings about it
    "train.recipe_warnings": BASE | {"train.schedule"},
    "train.liveness.stack_files": set(),  # names of files that a run writes and `doctor` reads
    "data": BASE | {"processing", "features.format", "train.recipe_warnings"},
    "models": BASE | {"processing"},
    "weights": MIDDLE,
    "generate": MIDDLE | {"weights"},
    "evaluation": MIDDLE | {"weights", "generate"},
    "features": MIDDLE | {"weights"},
    # Scores while training; evaluation knows nothing of train.
    "train": MIDDLE
    | {"weights", "generate", "evaluation", "train.schedule", "train.recipe_warnings", "train.liveness.stack_files"},
    "estimate": MIDDLE | {"train.recipe_warnings"},
    "apps": MIDDLE | {"weights", "generate", "evaluation"},
    "doctor": MIDDLE | {"train.liveness.stack_files"},
    "finetune": MIDDLE | {"weights", "evaluation", "estimate"},  # the verbs themselves run in processes of their own
    "cli": MIDDLE
    | {"train", "weights", "generate", "evaluation", "features", "estimate", "apps", "doctor", "finetune"},
    "__main__": {"cli"},
}
ONLY_IN = {
    "deepspeed": ["tinygptv_ds/train/engine.py", "stages/minimal.py"],
    "flash_attn": ["tinygptv_ds/models/attention.py"],
    "gradio": ["tinygptv_ds/apps/demo/"],
    "wandb": ["tinygptv_ds/train/trackers/wandb.py"],
    "mlflow": ["tinygptv_ds/train/trackers/mlflow.py"],
    "swanlab": ["tinygptv_ds/train/trackers/swanlab.py"],
}
SOURCES = sorted(
    path for folder in ("tinygptv_ds", "stages", "eval", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(("tinygptv_ds", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The longest name of `MAY_IMPORT` that a module lies in: `tinygptv_ds.data.loader.batch.Batch` -> `data`."""
    names = module.split(".")[1:]
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in MAY_IMPORT), "__init__")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction(path: Path) -> None:
    part = part_of(module_of(path))
    assert part != "__init__" or path.name == "__init__.py", f"{path}: say in MAY_IMPORT what it may import"
    own = {module for module in imported(path) if module.split(".")[0] == "tinygptv_ds"}
    assert {part_of(module) for module in own} <= MAY_IMPORT[part] | {part, "__init__"}
    assert not {module.split(".")[0] for module in imported(path)} & {"stages", "eval", "benchmarks", "tests"}


def test_no_cycles() -> None:
    """No module imports itself through others, not even inside a function or for type checkers alone."""
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: {m if m in paths else m.rpartition(".")[0] for m in imported(path)} for name, path in paths.items()}
    # `from tinygptv_ds.package import module` runs the package's own __init__ as well, which imports nothing back.
    sorter = TopologicalSorter({name: found & paths.keys() for name, found in graph.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_a_cycle_would_be_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("package", ONLY_IN)
def test_only_in_its_place(package: str) -> None:
    users = [path for path in SOURCES if any(m.split(".")[0] == package for m in imported(path))]
    names = [str(path.relative_to(ROOT)) for path in users]
    assert [name for name in names if not name.startswith(tuple(ONLY_IN[package]))] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_freely(path: Path) -> None:
    """torch.load with weights_only=True alone, and pickle's own loaders nowhere."""
    for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), f"line {call.lineno}: {name}"
        if name == "torch.load":
            assert {"weights_only=True"} <= {f"{word.arg}={ast.unparse(word.value)}" for word in call.keywords}, (
                f"line {call.lineno}: {name}"
            )


def test_the_package_is_all_here() -> None:
    """Were the folders renamed, the tests above would pass over nothing."""
    assert len(SOURCES) > 40
    assert "deepspeed" in {module.split(".")[0] for module in imported(PACKAGE / "train/engine.py")}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_name_no_path_of_one_machine(path: Path) -> None:
    strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    fixed = [s for s in strings if isinstance(s, str) and re.match(r"/(home|root|tmp|work|mnt|data|usr|opt)(/|$)", s)]
    assert fixed == []


def test_test_files_have_different_names() -> None:
    """pytest imports them by name alone, since the folders are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
