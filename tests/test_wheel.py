"""Sdist and wheel: their contents, and the command line where only the wheel is installed."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.patience import PATIENCE

ROOT = Path(__file__).parents[1]
DEPENDENCIES = sysconfig.get_paths()["purelib"]
REPOSITORY = "https://github.com/someone/tinygptv_ds"


def build(kind: str, out: Path, source: Path = ROOT) -> Path:
    """Build "sdist" or "wheel" as a release does."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    env = os.environ | {"REPO_URL": REPOSITORY}
    subprocess.run(command, cwd=source, env=env, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    (built,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as pip does from PyPI's sdist."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out)]
    subprocess.run([*command, str(sdist)], check=True, timeout=PATIENCE)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that has the wheel. The packages it needs are those of the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", str(python), "install"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True, timeout=PATIENCE)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(DEPENDENCIES + "\n")  # .pth files there (editable installs) are not read
    launcher = folder / "bin/deepspeed"  # as pip would have written it
    launcher.write_text(f"#!{python}\nfrom deepspeed.launcher.runner import main\n\nmain()\n")
    launcher.chmod(0o755)
    return folder


def run(environment: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run `tinygptv-ds` in an empty folder, without any path of the clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": os.defpath}
    command = [str(environment / "bin/tinygptv-ds"), *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)


def contents(wheel: Path) -> dict[str, int]:
    """Each file's checksum."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert contents(build("wheel", tmp_path)) == contents(wheel)


def test_the_sdist_holds_what_the_wheel_needs_and_nothing_else(sdist: Path) -> None:
    """No tests, data, weights, runs or caches."""
    with tarfile.open(sdist) as archive:
        names = [Path(*Path(name).parts[1:]) for name in archive.getnames()]
    own = {"ds_configs", "eval", "launch", "stages", "tinygptv_ds"}
    own |= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    own |= {"hatch_build.py"}
    own |= {path.name for path in ROOT.glob("requirements*.txt")}
    assert {name.parts[0] for name in names} == own
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    made = {"PKG-INFO"}
    assert {str(name) for name in names} - made <= set(tracked)
    assert not [name for name in names if name.is_relative_to("stages/tiny") or name.suffix == ".safetensors"]


def test_the_description_has_no_relative_links(wheel: Path) -> None:
    """PyPI shows it elsewhere. The wheel is built from the sdist where the repository's address is not set."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    readme = (ROOT / "README.md").read_text()
    text = metadata.get_payload(decode=True).decode()
    links = re.findall(r'\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"', text)
    targets = ["".join(link) for link in links]
    assert all(target.startswith("https://") for target in targets)
    version = metadata["Version"]
    files = [re.fullmatch(rf"{REPOSITORY}/(blob|raw)/v{version}/([^#]+)(#.*)?", target) for target in targets]
    kinds = {match[2]: match[1] for match in files if match}
    assert len(kinds) > 30 and all((ROOT / path).is_file() for path in kinds)
    assert kinds["docs/use/demo.png"] == kinds["docs/images/quickstart-loss-light.svg"] == "raw"
    assert kinds["LICENSE"] == kinds["docs/index.md"] == "blob"
    assert f"{REPOSITORY}/actions/workflows/ci.yml/badge.svg" in targets
    back = re.sub(rf"{REPOSITORY}/((blob|raw)/v{version}/|(?=actions/))", lambda m: "" if m[2] else "../../", text)
    assert back.strip() == readme.strip()
    assert metadata.get_all("Project-URL")[1] == f"Repository, {REPOSITORY}"


def test_the_wheel_installs_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"tinygptv_ds"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_holds_the_files_next_to_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = [
        path
        for pattern in ("stages/*.yaml", "stages/stage*.py", "ds_configs/*.json", "eval/*.py")
        for path in ROOT.glob(pattern)
    ]
    tracked += [path for path in (ROOT / "launch").iterdir() if path.name not in ("setup.sh", "quickstart.sh")]
    tracked += ROOT.glob("requirements*.txt")
    assert len(tracked) > 25
    assert {f"tinygptv_ds/_project/{path.relative_to(ROOT)}" for path in tracked} <= names
    package = [path for path in (ROOT / "tinygptv_ds").rglob("*") if path.suffix in (".py", ".yaml", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in package} <= names


def test_help(environment: Path, tmp_path: Path) -> None:
    shown = run(environment, tmp_path, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "train" in shown.stdout and "check-data" in shown.stdout
    options = run(environment, tmp_path, "train", "stage3", "--help")
    assert options.returncode == 0, options.stderr
    assert "--deepspeed-config" in options.stdout
    absent = ("--data", "mine.json", "--from", "weights", "--out", "my_model")
    wrong = run(environment, tmp_path, "finetune", *absent)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --data mine.json: no such file or folder; correct the path\n",
    )


def test_a_recipe_of_the_wheel_is_checked(environment: Path, tmp_path: Path) -> None:
    """The recipe is found; that its data are missing here is a message with a remedy."""
    checked = run(environment, tmp_path, "check-data", "stages/stage3.yaml")
    assert "Traceback" not in checked.stderr
    assert "cc_sbu_align" in checked.stdout + checked.stderr
    wrong = run(environment, tmp_path, "check-data", "stages/stage3.yaml", "--set", "train.batchsize=3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "unknown key train.batchsize; did you mean batch_size?" in wrong.stderr


def test_training_reports_what_is_missing(environment: Path, tmp_path: Path) -> None:
    """Through the launcher of the same environment, although its folder is not on PATH."""
    ended = run(environment, tmp_path, "train", "stage1", "--num-gpus=1", "--deepspeed-config=ds_configs/cpu.json")
    assert ended.returncode != 0
    assert "weights/phi-2" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_estimate(environment: Path, tmp_path: Path) -> None:
    estimated = run(environment, tmp_path, "estimate", "stages/stage4.yaml", "--gpu", "A100-80GB")
    assert estimated.returncode == 0, estimated.stderr
    assert "A100-80GB" in estimated.stdout
