"""Metadata of the package that depend on where the repository is: the description's links and the project's URLs.

PyPI shows README.md outside the repository, where its relative links and images lead nowhere. A build with REPO_URL,
as the release workflow sets it, makes them absolute, at the tag of the version; a build without it leaves them as they
are. hatchling calls the hook for clones only: an sdist has the result in its PKG-INFO.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

IMAGES = (".png", ".svg")
_TARGET = re.compile(r'(?P<before>\]\(|(?:src|srcset|href)=")(?P<target>(?![a-z]+:|#|/)[^)"\s]+)')


def absolute(markdown: str, repository: str, tag: str) -> str:
    """Return Markdown with absolute links: to files, they lead to `repository` at `tag`; to images, to their contents.

    Links of the form `../../actions` are those that GitHub resolves from a file's page, to the repository's own pages.
    """

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if target.startswith("../../"):
            return f"{match['before']}{repository}/{target.removeprefix('../../')}"
        kind = "raw" if target.endswith(IMAGES) else "blob"
        return f"{match['before']}{repository}/{kind}/{tag}/{target}"

    return _TARGET.sub(replaced, markdown)


class RepositoryMetadataHook(MetadataHookInterface):
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in both fields of the project's table."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["urls"] = {"Paper": "https://arxiv.org/abs/2312.16862"}
        repository = os.environ.get("REPO_URL", "").rstrip("/")
        if repository:
            tag = f"v{metadata['version']}"
            readme = absolute(readme, repository, tag)
            metadata["urls"] |= {
                "Repository": repository,
                "Documentation": f"{repository}/blob/{tag}/docs/index.md",
                "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
