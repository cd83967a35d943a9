"""Every command of the documents is one that is taken: its verb, script, options, and the recipe's keys."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import check_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def commands(document: Path) -> Iterator[str]:
    """Those in the shell's blocks, joined where a line goes on; what they print is left out."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", document.read_text(), flags=re.M | re.S)
    for line in (
        "".join(text for language, text in blocks if language in ("", "bash")).replace("\\\n", " ").splitlines()
    ):
        if re.match(r" *(tinygptv-ds|python|bash|deepspeed|torchrun|sbatch|pip|hf|wget|source|docker) ", line):
            yield line.strip()


def words(command: str) -> list[str]:
    """Those in brackets may be left out, and stand for themselves here."""
    return [word for word in shlex.split(command.replace(" [options]", ""), comments=True) if word != "..."]


CASES = [pytest.param(line, id=f"{path.name}: {line[:60]}") for path in DOCUMENTS for line in commands(path)]


def test_they_are_found() -> None:
    assert len(CASES) > 60


@pytest.mark.parametrize("command", CASES)
def test_it_is_taken(command: str) -> None:
    check_command(words(command))
