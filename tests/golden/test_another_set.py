"""`pytest tests/golden --golden DIR` runs what a set lists: the same set under other names passes as well."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.forked import apart
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
LEFT_OUT = (
    "test_another_set",
    "test_datasets",
    "test_training",
)  # the last starts processes of its own, which takes long


def test_other_names(tmp_path: Path) -> None:
    renamed = rename_all(tmp_path / "set")
    options = [f"{ROOT}/tests/golden", f"--golden={renamed}", f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    options += [f"--ignore={ROOT}/tests/golden/{name}.py" for name in LEFT_OUT]
    options += ["-p", "no:xdist"]  # this process may be one of its workers
    assert apart(run_pytest, options) == 0
    names = [path.name for path in renamed.rglob("*")]
    assert not {"right_padded.safetensors", "b_instruction.json", "minigptv2", "cmyk.jpg"} & set(names)


def run_pytest(options: list[str]) -> int:
    """Run tests in this process, which has imported none of them yet; what they print is the caller's output."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    return int(pytest.main(options))


def rename_all(folder: Path) -> Path:
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("datasets", "training"))
    for part in ("phi", "lora"):
        rename_cases(folder / part, keep={"weights"})
    models = {path.parent.name: f"model_of_{path.parent.name}" for path in folder.glob("full/*/weights.safetensors")}
    for old, new in models.items():
        (folder / "full" / old).rename(folder / "full" / new)
        rename_cases(folder / "full" / new / "cases", keep=set())
    rename_checkpoint(folder / "checkpoint/expected.json", models)
    rename_curves(folder / "schedule/lr.json")
    rename_images(folder / "preprocess")
    return folder


def rename_cases(folder: Path, keep: set[str]) -> None:
    """Rename each case, e.g., `x` and `x_grads` to `z_x` and `z_x_grads`."""
    for file in list(folder.glob("*.*")):
        if file.stem not in keep and file.name != "config.json":
            file.rename(file.with_name(f"z_{file.name}"))


def rename_checkpoint(file: Path, models: dict[str, str]) -> None:
    expected = json.loads(file.read_bytes())
    for old, new in models.items():
        expected["goes_with"] = expected["goes_with"].replace(f"full/{old}", f"full/{new}")
    expected["goes_with"] = expected["goes_with"].replace("cases/", "cases/z_")
    file.write_text(json.dumps(expected))
    (pth,) = file.parent.glob("*.pth")
    pth.rename(pth.with_name("saved.pth"))


def rename_curves(file: Path) -> None:
    curves = json.loads(file.read_bytes())
    file.write_text(json.dumps({f"curve {number}": curve for number, curve in enumerate(curves.values())}))


def rename_images(folder: Path) -> None:
    expected, tensors = json.loads((folder / "expected.json").read_bytes()), load_file(folder / "expected.safetensors")
    for name in list(expected["images"]):
        (folder / name).rename(folder / f"z_{name}")
    expected["images"] = {f"z_{name}": value for name, value in expected["images"].items()}
    (folder / "expected.json").write_text(json.dumps(expected))
    save_file({f"z_{name}": tensor for name, tensor in tensors.items()}, folder / "expected.safetensors")
