"""Print the notes of a release and check that its tag fits: python .github/scripts/release_notes.py v0.2.0

The version is that of `tinygptv_ds/__init__.py`. The tag, CITATION.cff and a section of CHANGELOG.md must name it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def version(root: Path) -> str:
    """Return the version of the package, which is not imported."""
    text = (root / "tinygptv_ds/__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', text, flags=re.M)
    return found


def cited_version(root: Path) -> str:
    """Return the version that CITATION.cff names."""
    (found,) = re.findall(r"^version: (\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), flags=re.M)
    return found


def sections(root: Path) -> dict[str, str]:
    """Return the sections of CHANGELOG.md by their headings without a date, the newest first."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (\S+).*\n", text, flags=re.M)[1:]
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def notes(root: Path, tag: str) -> str:
    """Return the text of a release.

    Raises:
        ValueError: the tag is not that of the version, or a file does not name it; the message says what to change.
    """
    wanted = version(root)
    if tag != f"v{wanted}":
        raise ValueError(f"the tag is {tag}, but tinygptv_ds/__init__.py has version {wanted}: tag v{wanted} instead")
    if cited_version(root) != wanted:
        raise ValueError(f"CITATION.cff has version {cited_version(root)}: change it to {wanted}")
    found = sections(root)
    if next(iter(found)) == "Unreleased" and found["Unreleased"]:
        raise ValueError(f"CHANGELOG.md still has changes under Unreleased: rename that heading to '{wanted} - DATE'")
    if not found.get(wanted):
        raise ValueError(f"CHANGELOG.md has no section {wanted}")
    return found[wanted]


if __name__ == "__main__":
    try:
        print(notes(ROOT, *sys.argv[1:]))
    except (ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
