"""The content of a message: texts and images, in the spellings in which clients send them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Parts of OpenAI's Responses API and of the messages of transformers: the type that they have here, and the field with
# their text or URL.
_OTHER_SPELLINGS = {
    "input_text": ("text", "text"),
    "output_text": ("text", "text"),
    "refusal": ("text", "refusal"),
    "input_image": ("image_url", "image_url"),
    "image": ("image_url", "url"),
}


class Strict(BaseModel):
    """An object of a request, without the fields that change nothing.

    Attributes:
        ignored: fields that change no answer, whatever their value.
        neutral: values with which a field changes no answer. For any field, null, false, 0 and empty values are such.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    ignored: ClassVar[Collection[str]] = ()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not cls.has_no_effect(name, value, given)}

    @classmethod
    def has_no_effect(cls, name: str, value: Any, given: Mapping[str, Any]) -> bool:
        """Return whether a field of what is given changes no answer."""
        if value is None:
            return True
        if name in cls.model_fields:
            return False
        return name in cls.ignored or not value or value in cls.neutral.get(name, ())


class TextPart(Strict):
    """A text."""

    ignored = ("annotations", "cache_control")
    type: Literal["text"]
    text: str


def _as_object(url: Any) -> Any:
    return {"url": url} if isinstance(url, str) else url


class ImageURL(Strict):
    """The URL of an image: `data:` or http(s)."""

    ignored = ("format", "media_type", "mime_type")  # the image's own bytes say what it is
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"  # the model has one image size


class ImagePart(Strict):
    """An image."""

    ignored = ("cache_control", "detail", "uuid")
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_as_object)]


def _as_parts(content: Any) -> Any:
    parts = [content] if isinstance(content, str) else content
    return [_as_part(part) for part in parts] if isinstance(parts, list) else parts


def _as_part(part: Any) -> Any:
    """Return a part in OpenAI's chat spelling, if it has another known one; a text is a part of its own."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    spelled = _OTHER_SPELLINGS.get(part["type"]) if isinstance(part, dict) and _is_text(part.get("type")) else None
    if spelled is None:
        return part
    kind, field = spelled
    if field not in part and part["type"] == "image" and _is_text(part.get("image")):
        field = "image"
    value = {kind: part[field]} if field in part else {}
    return {name: each for name, each in part.items() if name != field} | {"type": kind} | value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


Content = Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_as_parts)]


def given_texts(content: Any) -> list[str]:
    """Return all texts of a content that has not been checked, to count their characters."""
    parts = content if isinstance(content, list) else [content]
    found = [part for part in parts if isinstance(part, str)]
    values = (part.get(name) for part in parts if isinstance(part, dict) for name in ("text", "refusal"))
    return found + [value for value in values if isinstance(value, str)]
