"""What the documents name is there."""

import argparse
import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_and_files_that_are_named(document: Path) -> None:
    text = document.read_text()
    for file, test in set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)):
        assert test in functions(ROOT / file), f"{file}::{test}"
    for path in set(
        re.findall(r"`((?:tinygptv_ds|stages|eval|docs|benchmarks|ds_configs|launch|tests)/[\w/.]+)`", text)
    ):
        assert (ROOT / path.replace("stageN", "stage1")).exists(), path


def test_paths_of_tests_are_in_the_appendix_alone() -> None:
    """Pages for users state what holds; docs/reference/tests.md has the test of each statement."""
    for document in ROOT.glob("docs/**/*.md"):
        if document.parent.name != "reference":
            assert re.findall(r"`(tests/[\w/]+\.py\S*)`", document.read_text()) == [], (
                f"{document.name}: docs/reference/tests.md holds them"
            )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_half_merged_page(document: Path) -> None:
    assert re.findall(r"^(?:<{7}|>{7}|={7}$)", document.read_text(), flags=re.M) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_and_lists_are_read_as_such(document: Path) -> None:
    """A table has a header, rows of one width and an empty line before it; so has a list, for the site's Markdown."""
    lines = ["", *re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.M | re.S).splitlines(), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert not before and re.match(r"\|[\s:|-]+\|$", after), line
        elif line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", before)), line
        elif re.match(r"[-*] ", line) and before:
            assert re.match(r"[-*] | {2,}|#", before), line


def anchors(document: Path) -> set[str]:
    """The addresses of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:|\.\./\.\./actions)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        to = (document.parent / target).resolve() if target else document
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), f"{target}#{anchor}"


def test_the_messages_of_the_faq_are_printed_by_the_code() -> None:
    texts = "\0".join(
        node.value
        for path in ROOT.glob("tinygptv_ds/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    cells = re.findall(r"^\| (`.+?) \| .+ \| .+ \|$", (ROOT / "docs/faq.md").read_text(), flags=re.M)
    ours = [cell for cell in cells if "(of torch)" not in cell]
    assert len(ours) > 25
    assert [part for cell in ours for part in re.findall(r"`([^`]+)`", cell) if part not in texts] == []


# Options of other programs, and of scripts under benchmarks/ and tests/, that the documents mention.
OTHER_OPTIONS = {"train-standins", "golden", "no-build-isolation", "resample", "model-args", "gen-kwargs", "prefix"}
OTHER_OPTIONS |= {"nproc-per-node", "signals-to-handle", "shutdown-timeout", "max-restarts", "signal", "requeue"}
OTHER_OPTIONS |= {"kill-on-bad-exit", "launched", "minutes", "only", "repo", "sort"}
OTHER_OPTIONS |= {"user", "shm-size", "ipc", "install"}  # docker, wsl


def all_options() -> set[str]:
    """Every option of every verb, of the stages and of DeepSpeed's launcher, with hyphens and without the first two."""
    from tinygptv_ds.cli import VERBS
    from tinygptv_ds.train.launcher.options import _FLAGS, _VALUES
    from tinygptv_ds.train.setup.job import stage_parser

    parsers = [stage_parser(ROOT / "stages/stage1.yaml")]
    for _, module in VERBS.values():
        parsers.append(argparse.ArgumentParser())
        import_module(module).add_arguments(parsers[-1])
    found = {*_FLAGS, *_VALUES, "--restarts"}
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return {option.lstrip("-").replace("_", "-") for option in found}


def test_options_and_keys_in_prose_exist() -> None:
    from tinygptv_ds.config.render import recipe_docs

    options, keys = all_options() | OTHER_OPTIONS, {".".join(path) for path in recipe_docs()}
    unknown = []
    for document in DOCUMENTS:
        if document.name != "CHANGELOG.md":  # which also names what is gone
            prose = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.M | re.S)
            for code in re.findall(r"`([^`\n]+)`", prose):
                named = re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", code)
                unknown += [(document.name, name) for name in named if name.replace("_", "-") not in options]
                sections = re.findall(r"\b((?:model|data|optimizer|train|text|evaluation)\.[a-z_]+)\b(?![./])", code)
                unknown += [(document.name, key) for key in sections if key not in keys and "/" not in code]
    assert unknown == []


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert len(listed) == len(set(listed))
    assert not set(pages) - set(listed), "add them to nav in mkdocs.yml"


def test_generated_pages_are_those_of_the_code() -> None:
    command = [sys.executable, "docs/generate_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run python docs/generate_reference.py and commit the pages"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links and anchors between pages included; links to other servers are checked by a workflow."""
    pytest.importorskip("material", reason="mkdocs-material is of docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/reference/benchmarks/index.html").is_file()
    assert not list((tmp_path / "site").glob("**/*.py"))


def test_the_table_of_weights_names_every_kind() -> None:
    """One row at least for every form and kind that the verbs know."""
    from tinygptv_ds.weights.export.export import FORMS
    from tinygptv_ds.weights.kinds import KINDS

    text = (ROOT / "docs/weights.md").read_text()
    assert all(f"| `{form}` |" in text for form in FORMS)
    words = {"phi": "Phi-2", "eva_vit": "eva_vit_g.pth", "blip2": "blip2_pretrained_flant5xxl.pth"}
    words |= {"projection": "MiniGPT-4's projection", "trained": "checkpoint_N.pth", "model": "exported `hf` folder"}
    words |= {"adapter": "adapter of peft on linear layers"}
    assert words.keys() == KINDS.keys()
    assert all(word in text for word in words.values())


def test_the_page_of_data_names_everything() -> None:
    """Every dataset with its files, every verb and every reason for which a sample drops out."""
    from tinygptv_ds.cli import VERBS
    from tinygptv_ds.data.sets import DATASETS
    from tinygptv_ds.data.shards.records import REASONS

    text = (ROOT / "docs/data/prepare.md").read_text() + (ROOT / "docs/data/stream.md").read_text()
    data_verbs = [verb for verb, (_, module) in VERBS.items() if ".data." in module]
    files = {file for dataset in DATASETS.values() for file in (*dataset.files, *dataset.optional)}
    for word in (*data_verbs, *DATASETS, *REASONS):
        assert f"`{word}" in text, word
    assert [file for file in files if file not in text and "*" not in file] == []
