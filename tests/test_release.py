"""What a release checks, and its workflow."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tinygptv_ds import __version__

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github/scripts/release_notes.py"
spec = importlib.util.spec_from_file_location("release_notes", SCRIPT)
assert spec and spec.loader
release_notes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_notes)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What names the version, ready for a release."""
    for name in ("CHANGELOG.md", "CITATION.cff", "tinygptv_ds/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "CHANGELOG.md").read_text()
    text = re.sub(r"^## Unreleased\n(.*?)(?=^## )", "", text, flags=re.M | re.S)
    (tmp_path / "CHANGELOG.md").write_text(text)
    return tmp_path


def test_every_file_names_the_same_version() -> None:
    assert release_notes.version(ROOT) == __version__ == release_notes.cited_version(ROOT)
    assert __version__ in release_notes.sections(ROOT)


def test_notes_are_the_section_of_the_changelog(copy: Path) -> None:
    text = release_notes.notes(copy, f"v{__version__}")
    assert text and text in (ROOT / "CHANGELOG.md").read_text() and "## " not in text


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tinygptv_ds/__init__.py", __version__, "9.9.9", "the tag is"),
        ("CITATION.cff", f"version: {__version__}", "version: 9.9.9", "CITATION.cff has version 9.9.9"),
        ("CHANGELOG.md", f"## {__version__}", "## 9.9.9", "has no section"),
        ("CHANGELOG.md", f"## {__version__}", f"## Unreleased\n\n- more\n\n## {__version__}", "under Unreleased"),
    ],
)
def test_what_does_not_fit_is_named(copy: Path, name: str, old: str, new: str, message: str) -> None:
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        release_notes.notes(copy, f"v{__version__}")


def test_the_workflow_publishes_what_was_tested_without_a_token() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    jobs = workflow["jobs"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())[True]
    assert set(jobs["publish"]["needs"]) == {"test", "build"} and jobs["github"]["needs"] == "publish"
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    writers = {name for name, job in jobs.items() if "write" in (job.get("permissions") or {}).values()}
    assert writers == {"publish", "github"}  # neither runs code of the repository
    assert not any("checkout" in step.get("uses", "") for name in writers for step in jobs[name]["steps"])
    commands = " ".join(step.get("run", "") for step in jobs["build"]["steps"])
    assert SCRIPT.relative_to(ROOT).as_posix() in commands and "twine check --strict" in commands
    (built,) = [step for step in jobs["build"]["steps"] if step.get("run") == "python -m build"]
    assert built["env"] == {"REPO_URL": "${{ github.server_url }}/${{ github.repository }}"}  # hatch_build.py reads it
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
