"""YAML that holds nothing but plain values, read in bounded time; every error names the line and the key."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import yaml

from tinygptv_ds.errors import SHOWN, ConfigError, shown

LONGEST = 300_000  # characters; published recipes have 10,000
_MOST_VALUES = 15_000  # after aliases are expanded; published recipes have 200, and these take half a second
_DEEPEST = 40
_LONGEST_NUMBER = 100  # characters; a longer one is text without quotes, and slow to compute
_PLAIN = (type(None), bool, int, float, str)
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what no file, tokenizer or console can hold
_OCTAL = re.compile(r"[-+]?0[0-7_]*[0-7][0-7_]*")


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document: nested mappings, lists, texts, numbers, booleans and None.

    What YAML 1.1 reads as something else than a reader expects is refused: dates, numbers in base 60 (`1:30`) and in
    octal (`010`), tags, and keys that are no text.

    Raises:
        ConfigError: the text is not YAML, or holds another value, a key twice, an alias of itself, an infinite number,
            or more than any recipe needs. The message names line and key.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{len(text):,} characters are too long for a recipe (at most {LONGEST:,})")
    try:
        _check_size(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem, error.note) if part)
        raise ConfigError(f"not valid YAML (text may need quotes): {where}{problem}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"not valid YAML (text may need quotes): {str(error).splitlines()[0]}") from None


def _check_size(text: str) -> None:
    """Refuse nesting and aliases that would not end, from the events alone: nothing is built and nothing recursive."""
    sizes: dict[str, int] = {}  # of what an anchor names, aliases expanded
    opened: list[tuple[str | None, int]] = []  # anchor of each open collection, and the values before it
    values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                raise ConfigError(f"line {line}: *{event.anchor} is used within what it names")
            values += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
        if len(opened) > _DEEPEST:
            raise ConfigError(f"line {line}: nested more than {_DEEPEST} levels deep")
        if values > _MOST_VALUES:
            raise ConfigError(f"line {line}: more than {_MOST_VALUES:,} values, those that aliases repeat included")


def _value(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        _check_tag(node, "map", where)
        return _mapping(loader, node, where)
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, "seq", where)
        return [_value(loader, each, f"{where}[{number}]") for number, each in enumerate(node.value)]
    return _scalar(loader, node, where)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, where: str) -> dict[str, Any]:
    merged = [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:merge"]
    texts = (key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
    own = Counter(text for text in texts if isinstance(text, str))
    twice = sorted(key for key, count in own.items() if count > 1)
    if twice:
        last = [key for key, _ in node.value if key.value == twice[0]][-1]
        raise ConfigError(f"line {last.start_mark.line + 1}: {', '.join(map(_within(where), twice))} is given twice")
    if merged:
        loader.flatten_mapping(node)
    values = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            written = f"{shown(key.value)} is" if isinstance(key, yaml.ScalarNode) else "a list or mapping is"
            raise ConfigError(f"{_line(key, where)}: a key must be text, which {written} not; quote it")
        values[key.value] = _value(loader, value, _within(where)(key.value))
    return values


def _within(where: str) -> Any:
    return (f"{where}." if where else "").__add__


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    written = node.value
    short = written if len(written) <= SHOWN else f"{written[:SHOWN]}..."
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind in ("int", "float") and len(written) > _LONGEST_NUMBER:
        raise ConfigError(f"{_line(node, where)}: {short!r} is too long for a number; quote text")
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise ConfigError(f"{_line(node, where)}: {short!r} is no valid {kind} of YAML; quote text") from None
    if not isinstance(value, _PLAIN):
        raise ConfigError(f"{_line(node, where)}: YAML reads {short!r} as a {kind}, which no key takes; quote text")
    if isinstance(value, str) and _HALF_CHARACTER.search(value):
        raise ConfigError(f"{_line(node, where)}: {short!r} holds half a character (a surrogate); write the whole one")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_line(node, where)}: {short} is no finite number")
    if kind in ("int", "float") and _BASE_60.fullmatch(written):
        raise ConfigError(f"{_line(node, where)}: YAML reads {short} as {value}, in base 60; write that, or quote text")
    if kind == "int" and _OCTAL.fullmatch(written):
        raise ConfigError(f"{_line(node, where)}: YAML reads {short} as octal {value}; write that, or quote text")
    return value


def _check_tag(node: yaml.Node, kind: str, where: str) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        raise ConfigError(f"{_line(node, where)}: the tag {node.tag} is not supported; leave it out")


def _line(node: yaml.Node, where: str) -> str:
    return f"line {node.start_mark.line + 1}{', ' if where else ''}{where}"
