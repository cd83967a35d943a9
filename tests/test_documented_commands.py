"""Every command of the documents is one that is taken: its verb, script, options, and the recipe's keys."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import check_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
DOCUMENTS += sorted(ROOT.glob("examples/*.ipynb"))


def commands(document: Path) -> Iterator[str]:
    """Those in the shell's blocks, joined where a line goes on; what they print is left out."""
    text = read_notebook(document) if document.suffix == ".ipynb" else document.read_text()
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.M | re.S)
    for line in (
        "".join(text for language, text in blocks if language in ("", "bash")).replace("\\\n", " ").splitlines()
    ):
        if re.match(r" *(tinygptv-ds|python|bash|deepspeed|torchrun|sbatch|pip|hf|wget|source|docker) ", line):
            yield line.strip()


def read_notebook(path: Path) -> str:
    """Its text, with the shell's commands of code as blocks, the last of a pipe and without its file of output."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        shell = [line.rpartition(" | ")[2].partition(" > ")[0] for line in re.findall(r"^ *!(.*)", source, flags=re.M)]
        parts += [source] if cell["cell_type"] == "markdown" else ["```bash", *shell, "```"]
    return "\n".join(parts)


def words(command: str) -> list[str]:
    """Those in brackets may be left out, and stand for themselves here."""
    return [word for word in shlex.split(command.replace(" [options]", ""), comments=True) if word != "..."]


CASES = [pytest.param(line, id=f"{path.name}: {line[:60]}") for path in DOCUMENTS for line in commands(path)]


def test_they_are_found() -> None:
    assert len(CASES) > 60
    notebook = [case.values[0] for case in CASES if str(case.id).startswith("finetune_own_images")]
    assert {line.split()[1] for line in notebook} >= {"finetune", "chat", "launch/quickstart.sh"}


@pytest.mark.parametrize("command", CASES)
def test_it_is_taken(command: str) -> None:
    check_command(words(command))
