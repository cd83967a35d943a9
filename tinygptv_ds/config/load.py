"""From a YAML file and `--set key=value` to a checked `Recipe`, without torch, so that errors are reported at once."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.config.paths import local_path
from tinygptv_ds.config.plain_yaml import LONGEST, parse_yaml
from tinygptv_ds.config.recipe import WEIGHTS, Recipe
from tinygptv_ds.errors import ConfigError, shown
from tinygptv_ds.files import read_text
from tinygptv_ds.resources import find_project_file

_DEEPEST = 40  # keys of --set
_LONGEST_TEXT = 10_000  # characters of a value, e.g. of shards in braces
_MAY_BE_EMPTY = ("text.end_sym",)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides with dotted keys.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown (the nearest known one is named), or a value has
            the wrong type or is out of range.
    """
    path = find_project_file(Path(path))
    return build_recipe(apply_overrides(_read_yaml(path), overrides), str(path))


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `recipe` and `--set`, for a verb that calls `load_recipe`."""
    parser.add_argument("recipe", type=Path, help="a stage's YAML, e.g. stages/stage4.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")


def build_recipe(raw: dict, source: str) -> Recipe:
    """Turn nested plain values into a `Recipe` whose weights are at `local_path`; `source` is named in errors."""
    try:
        recipe = _build(Recipe, _with_trackers(raw), "")
        weights = {name: getattr(recipe.model, name) for name in WEIGHTS}
        found = {name: str(local_path(path)) for name, path in weights.items() if path is not None}
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **found))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _with_trackers(raw: dict) -> dict:
    """Read `train.wandb`, which earlier versions wrote into run directories, as the two keys that replaced it."""
    train = raw.get("train")
    if not isinstance(train, dict) or not isinstance(train.get("wandb", 0), str | None):
        return raw
    project = train["wandb"]
    kept = {key: value for key, value in train.items() if key != "wandb"}
    replaced = {} if project is None else {"trackers": ["wandb"], "tracker_project": project}
    return raw | {"train": kept | replaced}


def apply_overrides(raw: dict, overrides: Sequence[str]) -> dict:
    """Set dotted keys, e.g. `train.batch_size=32` or `data.datasets.0.weight=2`; values are YAML."""
    raw = dict(raw)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text}: write key=value, for instance --set train.batch_size=32")
        try:
            parsed = parse_yaml(value)
        except ConfigError as error:
            raise ConfigError(f"--set {key}={_short(value)}: {error}") from None
        keys = key.strip().split(".")
        if len(keys) > _DEEPEST:
            raise ConfigError(f"--set {_short(key)}: {len(keys)} keys deep; a recipe has at most {_DEEPEST} levels")
        raw = _set(raw, keys, parsed, key)
    return raw


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain nested values, for a file."""
    return dataclasses.asdict(recipe)


def dotted_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key, e.g. `optimizer.betas`; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = dotted_values(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        found |= inner or {prefix + key: value}
    return found


def _read_yaml(path: Path) -> dict:
    try:
        raw = parse_yaml(read_text(path, LONGEST))
    except FileNotFoundError:
        raise ConfigError(
            f"no recipe at {path}; the published ones are stages/stage1.yaml to stages/stage4.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte in the path
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no recipe: the file must be a mapping of keys to values")
    return raw


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


def _set(node: Any, keys: list[str], value: Any, whole: str) -> Any:
    head, *rest = keys
    if isinstance(node, list):
        if not re.fullmatch(r"[0-9]{1,6}", head) or int(head) >= len(node):
            raise ConfigError(f"--set {_short(whole)}: {shown(head)} is not an index of a list of {len(node)}")
        items = list(node)
        items[int(head)] = _set(items[int(head)], rest, value, whole) if rest else value
        return items
    if node is not None and not isinstance(node, dict):
        raise ConfigError(f"--set {whole}: there is nothing below {shown(node)} to set")
    node = dict(node or {})
    node[head] = _set(node.get(head), rest, value, whole) if rest else value
    return node


def _build(kind: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where or 'the recipe'} must be a mapping of keys to values, not {_describe(raw)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in fields:
            written = _short(key) if key.isprintable() and key.strip() else shown(key)
            raise ConfigError(f"unknown key {prefix}{written}{nearest(_short(key), fields)}")
    for name, f in fields.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name} is missing")
    return kind(**{key: _convert(hints[key], value, prefix + key) for key, value in raw.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        if bool in options and int in options:
            return _number_or_switch(value, where)
        if bool in options and str in options:
            return _word_or_switch(value, where)
        (kind,) = [option for option in options if option is not type(None)]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, not {_describe(value)}")
        (item,) = typing.get_args(kind)
        return [_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
        else:
            if not math.isfinite(value):
                raise ConfigError(f"{where} must be a finite number")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
        raise ConfigError(f"{where} must be {names[kind]}, not {_describe(value)}")
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _check_text(value: str, where: str) -> None:
    if not value and where not in _MAY_BE_EMPTY:
        raise ConfigError(f"{where} must not be empty text")
    if "\0" in value:
        raise ConfigError(f"{where} holds a null character: {shown(value)}")
    if len(value) > _LONGEST_TEXT:
        raise ConfigError(f"{where} must have at most {_LONGEST_TEXT:,} characters, not {len(value):,}")


def _number_or_switch(value: Any, where: str) -> bool | int:
    if not isinstance(value, int):
        raise ConfigError(f"{where} must be true, false or a whole number, not {_describe(value)}")
    return value


def _word_or_switch(value: Any, where: str) -> bool | str:
    if not isinstance(value, bool | str):
        raise ConfigError(f"{where} must be true, false or a word, not {_describe(value)}")
    return value


def _describe(value: Any) -> str:
    return "empty" if value is None else f"{shown(value)} ({type(value).__name__})"
