"""Hooks of mkdocs: pages of the site that are kept outside docs/, links that lead out of docs/, unbroken names.

Links in `docs/` are written as GitHub follows them, relative to the file. Those to a file of `PAGES` become links to
its page of the site; those to any other file outside `docs/` become links to the repository, or plain text where
`repo_url` is not set.
"""

import os
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# A file of the repository, and the address of its page in the site.
PAGES = {
    "benchmarks/README.md": "reference/benchmarks.md",
    "CHANGELOG.md": "project/changes.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
_SHORT_CODE = re.compile(r"<code>(?=[^<]{1,30}</code>)")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are kept outside docs/."""
    root = os.path.dirname(config.docs_dir)  # noqa: PTH120
    for path, address in PAGES.items():
        files.append(File.generated(config, address, abs_src_path=os.path.join(root, path)))  # noqa: PTH118
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page that lead out of docs/, or into it from outside."""
    address = page.file.src_uri
    source = {address: path for path, address in PAGES.items()}.get(address, f"docs/{address}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if to is not None:
            return f"[{text}]({posixpath.relpath(to, posixpath.dirname(address) or '.')}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})" if config.repo_url else text

    return _LINK.sub(rewritten, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark short pieces of code, which a line must not break: a browser breaks `--set` after its hyphens."""
    return _SHORT_CODE.sub('<code class="short">', html)
