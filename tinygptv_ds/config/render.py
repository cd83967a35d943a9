"""The comments of the recipes: every key gets the documentation of its field, so that it is written only once.

`python -m tinygptv_ds.config.render` rewrites the comment lines of all recipes. Values, their order and the
remarks after values stay as they are; a remark says what is particular to a stage (`# published: 17`).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import write_atomically
from tinygptv_ds.resources import project_root

WIDTH = 120
_KEY = re.compile(r"(?P<indent>(?:  )?)(?P<name>\w+):(?:\s|$)")
_COMMENT = re.compile(r"\s*#")


def recipes() -> list[Path]:
    """Return the recipes whose comments are rendered: the four stages', the quick start's and that of fine-tuning."""
    stages = project_root() / "stages"
    return sorted([*stages.glob("stage?.yaml"), *stages.glob("tiny/stage?.yaml"), stages / "finetune.yaml"])


def field_docs(section: type) -> dict[str, str]:
    """Return the documentation of each field of a dataclass, in one line: the string literal below the field."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[ast.unparse(statement.target)] = " ".join(str(below.value.value).split())
    return docs


def recipe_docs() -> dict[tuple[str, ...], str]:
    """Return the documentation of every key of a recipe, by its path: `("train", "batch_size")`."""
    docs: dict[tuple[str, ...], str] = {(name,): text for name, text in field_docs(Recipe).items()}
    for name, kind in get_type_hints(Recipe).items():
        if is_dataclass(kind) and isinstance(kind, type):
            docs |= {(name, field): text for field, text in field_docs(kind).items()}
    return docs


def render(text: str) -> str:
    """Return a recipe's YAML with the documentation of each key as comment lines above it.

    Args:
        text: the recipe; comment lines directly above a key, and indented as it is, are replaced. Others are kept.

    Raises:
        ConfigError: a key has no documentation, because no recipe has it.
    """
    return "\n".join(_rendered(text.split("\n"), recipe_docs()))


def _rendered(lines: list[str], docs: dict[tuple[str, ...], str]) -> Iterator[str]:
    section, comments = "", list[str]()
    for line in lines:
        key = _KEY.match(line)
        if _COMMENT.match(line):
            comments.append(line)
            continue
        if key is None:
            yield from comments
        else:
            path = (section, key["name"]) if key["indent"] else (key["name"],)
            if path not in docs:
                raise ConfigError(f"{'.'.join(path)} is no key of a recipe, so there is no documentation of it")
            indent = key["indent"]
            yield from (comment for comment in comments if not comment.startswith(f"{indent}#"))
            section = section if indent else key["name"]
            yield from textwrap.wrap(
                docs[path], WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
            )
        comments = []
        yield line
    yield from comments


def main() -> None:
    """Rewrite the recipes."""
    for path in recipes():
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            write_atomically(path, new.encode())
        print(f"{path}: {'rendered' if new != old else 'up to date'}")


if __name__ == "__main__":
    main()
