"""The first line of a function's docstring says what the function does, in the imperative."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Words that begin a phrase which names a value instead, where "Return ..." or "Yield ..." is meant.
NO_VERB = re.compile(
    r"(The|A|An|Of|Whether|What|How|Where|When|Each|All|In|On|Its|If|For|No|Every|One|As|Two|To|From|Those|This|That|It|At)"
    r"\b|[`\"( ]"
)


def test_functions_say_what_they_do() -> None:
    """Properties are named as values."""
    found = []
    for path in (path for folder in ("tinygptv_ds", "eval") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            if NO_VERB.match(ast.get_docstring(node, clean=False) or ""):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert found == []
