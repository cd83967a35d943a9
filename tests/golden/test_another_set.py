"""`pytest tests/golden --golden DIR` runs what a set lists: the same set under other names passes as well."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"


def test_other_names(tmp_path: Path) -> None:
    renamed = rename_all(tmp_path / "set")
    command = [sys.executable, "-m", "pytest", "tests/golden", "--golden", str(renamed), "-p", "no:cacheprovider"]
    skipped = [f"--ignore=tests/golden/{name}.py" for name in ("test_another_set", "test_datasets")]
    done = subprocess.run([*command, *skipped], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    names = [path.name for path in renamed.rglob("*")]
    assert not {"right_padded.safetensors", "b_instruction.json", "minigptv2", "cmyk.jpg"} & set(names)


def rename_all(folder: Path) -> Path:
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("datasets"))
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
