"""Writes the pages of the site that are made from code: commands, keys of a recipe, keys of DeepSpeed's JSON.

`python docs/generate_reference.py` rewrites them; with `--check` it only reports what differs, with exit code 1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from tinygptv_ds.cli import VERBS
from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.config.deepspeed_keys import KNOWN, REFUSED
from tinygptv_ds.config.evaluation_section import ScoredSection
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.config.render import field_docs
from tinygptv_ds.files import write_atomically
from tinygptv_ds.train.setup.job import stage_parser

DOCS = Path(__file__).resolve().parent
STAGES = ("stage1", "stage2", "stage3", "stage4")
_COMMANDS = """# Commands

The verbs of `tinygptv-ds` and their options, as `tinygptv-ds VERB --help` prints them. Options may be written with
hyphens or underscores.

<!-- Written by docs/generate_reference.py from the parsers; edit the help of an option there. -->
"""
_RECIPE = """# Keys of a recipe

A recipe is the YAML file that describes a stage completely. `--set SECTION.KEY=VALUE` changes one value of it on a
command line, and `deepspeed.KEY` a value of DeepSpeed's JSON; an unknown key is an error that names the nearest one.

"Published" is what `stages/stage1.yaml` to `stages/stage4.yaml` give: one value, or that of each stage in turn. Where
it is empty, they leave the default or name paths.

<!-- Written by docs/generate_reference.py from the dataclasses in tinygptv_ds/config/; edit the text below a field. -->
"""
_DEEPSPEED = """# Keys of DeepSpeed's JSON

The JSON holds what is DeepSpeed's: ZeRO, precision, offload, communication. `--deepspeed-config FILE` chooses one, and
`--set deepspeed.KEY=VALUE` changes it, e.g. `--set deepspeed.zero_optimization.overlap_comm=false`.

DeepSpeed ignores unknown keys silently, so only the keys below are accepted, each with a value of its type.

<!-- Written by docs/generate_reference.py from ds_configs/ and tinygptv_ds/config/deepspeed_keys.py. -->
"""


def cell(text: str) -> str:
    """Return a text as one cell of a Markdown table, in which nothing of it is markup but its backticks."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    plain = [re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    parts[::2] = [re.sub(r"\bdocs/([\w/]+\.md)", lambda page: f"[{page[1]}](../{page[1]})", part) for part in plain]
    return "".join(parts).replace("|", "\\|")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    header = list(header)
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield re.sub(r" +\|", " |", f"| {' | '.join(row)} |")
    yield ""


def commands() -> str:
    """Return the page of all verbs."""
    lines = [_COMMANDS, *table(("verb", "what it does"), ((f"[`{v}`](#{v})", cell(h)) for v, (h, _) in VERBS.items()))]
    for verb, (summary, module) in VERBS.items():
        parser = argparse.ArgumentParser(prog=f"tinygptv-ds {verb}")
        import_module(module).add_arguments(parser)
        lines += [f"## {verb}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if verb == "train":
            lines += options(parser)
            lines += ["Options of every stage; those of DeepSpeed's launcher are in [Stages](../train/stages.md).", ""]
            lines += options(stage_parser(Path("stages/stageN.yaml")))
        elif kinds:
            for kind, own in kinds[0].choices.items():
                lines += [f"### {verb} {kind}", "", *options(own)]
        else:
            lines += options(parser)
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the table of a parser's options."""
    shown = [
        action
        for action in parser._actions
        if action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
    ]
    yield f"`{usage(parser, shown)}`"
    yield ""
    yield from table(("option", "what it does"), ((name(action), explanation(action)) for action in shown))


def usage(parser: argparse.ArgumentParser, shown: list[argparse.Action]) -> str:
    """Return the shortest command line: what is required, and where options go."""
    prog = "tinygptv-ds train stageN" if parser.prog.startswith("launch/") else parser.prog
    required = [action for action in shown if action.required and action.nargs != argparse.REMAINDER]
    words = [prog, *(spelled(action) for action in required)]
    return " ".join([*words, "[options]"])


def spelled(action: argparse.Action) -> str:
    """Return an option with its value, or the name of a positional argument."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    value = " ".join(value) if isinstance(value, tuple) else value
    if not action.option_strings:
        return f"{{{','.join(action.choices)}}}" if action.choices and not action.metavar else value
    if action.nargs == 0:
        return action.option_strings[0]
    value = ",".join(map(str, action.choices)) if action.choices and not action.metavar else value
    value = {"?": f"[{value}]", "+": f"{value} ...", "*": f"[{value} ...]"}.get(str(action.nargs), value)
    return f"{action.option_strings[0]} {value}"


def name(action: argparse.Action) -> str:
    """Return the first cell of an option, with its other spellings."""
    others = [f"`{other}`" for other in action.option_strings[1:] if other != action.option_strings[0]]
    return ", ".join([f"`{spelled(action)}`".replace("|", "\\|"), *others])


def explanation(action: argparse.Action) -> str:
    """Return an option's help, with its default, as argparse expands it."""
    text = (action.help or "") % vars(action)
    return cell(text + (" (required)" if action.required and action.option_strings else ""))


def recipe_keys() -> str:
    """Return the page of all keys of a recipe."""
    published = [yaml.safe_load((DOCS.parent / f"stages/{stage}.yaml").read_text(encoding="utf-8")) for stage in STAGES]
    sections = {each.name: hints for each in fields(Recipe) if (hints := section_of(each)) is not None}
    lines = [_RECIPE]
    top = {each.name: each for each in fields(Recipe) if each.name not in sections}
    lines += ["## Top level", "", *keys(Recipe, "", top, lambda key: [recipe.get(key) for recipe in published])]
    for section, kind in sections.items():
        own = {each.name: each for each in fields(kind)}
        lines += [f"## {section}", "", cell(field_docs(Recipe)[section]), ""]
        lines += keys(kind, f"{section}.", own, lambda key, s=section: [r.get(s, {}).get(key) for r in published])
        for inner, place in ((DatasetSection, "data"), (ScoredSection, "evaluation")):
            if place == section:
                listed = "data.datasets and data.validation" if place == "data" else "evaluation.benchmarks"
                lines += [f"### An entry of {listed}", "", f"{(inspect.getdoc(inner) or '').splitlines()[0]}", ""]
                lines += keys(inner, "", {each.name: each for each in fields(inner)}, None)
    return "\n".join(lines)


def section_of(each: Field[Any]) -> type | None:
    """Return the dataclass of a field of `Recipe` that is a section."""
    kind = Recipe.__init__.__globals__.get(str(each.type)) if isinstance(each.type, str) else each.type
    return kind if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__") else None


def keys(
    kind: type, prefix: str, own: dict[str, Field[Any]], published: Callable[[str], list[Any]] | None
) -> Iterator[str]:
    """Yield the table of a section's keys."""
    docs = field_docs(kind)
    header = ("key", "default", "published", "what it does") if published else ("key", "default", "what it does")
    rows = []
    for key, each in own.items():
        default = default_of(each)
        middle = [stated(published(key), default)] if published else []
        rows.append([f"`{prefix}{key}`", default, *middle, cell(docs[key])])
    yield from table(header, rows)


def default_of(each: Field[Any]) -> str:
    """Return a field's default as YAML, or that it has none."""
    if each.default is MISSING and each.default_factory is MISSING:
        return "required"
    return plain(each.default if each.default is not MISSING else each.default_factory())  # type: ignore[misc]


def plain(value: object) -> str:
    """Return a value in YAML's spelling on one line."""
    if isinstance(value, float):
        return f"`{value:g}`"
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10_000).strip()
    return f"`{text.removesuffix('...').strip()}`".replace("|", "\\|")


def stated(values: list[Any], default: str) -> str:
    """Return what the published recipes give for a key: one value, or four."""
    if any(isinstance(value, str) and "/" in value for value in values):
        return ""
    if any(isinstance(value, (list, dict)) and value for value in values):
        return ""
    texts = [plain(float(value) if type(value) is int else value) for value in values]
    if len(set(texts)) > 1:
        return ", ".join(texts)
    return "" if texts[0] == default else texts[0]


def deepspeed_keys() -> str:
    """Return the page of the keys of DeepSpeed's JSON."""
    files = sorted((DOCS.parent / "ds_configs").glob("*.json"))
    ready = ((f"`ds_configs/{file.name}`", cell(json.loads(file.read_text())["comment"])) for file in files)
    refused = ((f"`{key}`", cell(reason)) for key, reason in REFUSED.items())
    lines = [_DEEPSPEED, "## Ready files", "", *table(("file", "what it is"), ready)]
    lines += ["## Supported keys", "", *table(("key", "value"), typed_keys(KNOWN))]
    lines += ["## Refused keys", "", *table(("key", "why"), refused)]
    return "\n".join(lines)


def typed_keys(known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every supported key of DeepSpeed's JSON with what its value may be."""
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", list: "list"}
    for key, kind in known.items():
        if isinstance(kind, dict):
            yield from typed_keys(kind, f"{prefix}{key}.")
        else:
            choices = ", ".join(f"`{word}`" for word in kind) if isinstance(kind, tuple) else words[kind]
            yield f"`{prefix}{key}`", choices


PAGES = {
    "reference/commands.md": commands,
    "reference/recipe.md": recipe_keys,
    "reference/deepspeed.md": deepspeed_keys,
}


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description="Write the pages of docs/reference/ that are made from code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    check, different = parser.parse_args().check, []
    for page, made in PAGES.items():
        path, text = DOCS / page, made().rstrip("\n") + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            different.append(page)
            if not check:
                write_atomically(path, text.encode())
    print(f"{', '.join(different) or 'no page'}: {'differs' if check else 'written'}")
    sys.exit(bool(check and different))


if __name__ == "__main__":
    main()
