"""From the bytes of a body to a JSON object, in time and memory in proportion to the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from tinygptv_ds.apps.serve.api_errors import RequestError

Path: TypeAlias = tuple[int | str, ...]
_Place: TypeAlias = "tuple[_Place, int | str] | None"  # the last step of a path, after its other ones
_DIGITS = 1000  # of an integer, whose conversion takes the square of them
_STRUCTURE = (b",", b"[", b"{")


def read_json(body: bytes, max_values: int) -> dict[str, Any]:
    """Return the object that a body holds.

    Args:
        body: JSON in UTF-8.
        max_values: the most commas and opening brackets that it may have, those of its texts included.

    Raises:
        RequestError: it is not JSON, is no object, has a key twice, half a character, or too many values.
    """
    if (count := sum(map(body.count, _STRUCTURE))) > max_values:  # a value in JSON of two bytes takes 60 in memory
        raise RequestError(
            f"the body has {count:,} commas and brackets, above the limit of {max_values:,}: send fewer",
            code="too_many_values",
        )
    try:
        decoded = json.loads(
            body.decode("utf-8-sig"),
            parse_int=_integer,
            parse_constant=_no_constant,
            object_pairs_hook=_without_repeats,
        )
        half = next((_path(place) for place, text in _texts(decoded) if not _is_unicode(text)), None)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON: {reason}", code="invalid_json") from None
    if half is not None:
        raise RequestError(
            f"{field_name(half)} contains half a character, a lone surrogate such as \\ud800: remove it",
            param=field_name(half),
            code="invalid_value",
        )
    if not isinstance(decoded, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return decoded


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, each of whose keys must be there once: otherwise a proxy might have checked another value."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name[:100]!r} is there more than once in an object")
        made[name] = value
    return made


def _texts(decoded: Any) -> Iterator[tuple[_Place, str]]:
    """Yield all texts of a JSON value with their places; the place of a key is its object's."""
    left: list[tuple[_Place, Any]] = [(None, decoded)]
    while left:  # a recursion, or whole paths, would take the depth times the number of values
        place, value = left.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, dict):
            yield from ((place, key) for key in value)
            left += [((place, key), each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [((place, number), each) for number, each in enumerate(value)]


def _path(place: _Place) -> Path:
    steps: list[int | str] = []
    while place is not None:
        place, step = place
        steps.insert(0, step)
    return tuple(steps)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def field_name(path: Path) -> str:
    """Return a field's name, e.g. `messages[0].content[1].image_url.url`."""
    name = ""
    for step in path:
        key = step or '""'
        name += f"[{step}]" if isinstance(step, int) else f".{key}" if name else str(key)
    return name or "the body"
