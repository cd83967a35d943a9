"""The body of `/v1/chat/completions`: which fields of OpenAI's API there are, and what they may hold.

A field that would change nothing is taken (`n: 1`, `tools: []`, null); one that could not be followed is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tinygptv_ds.apps.serve.api_errors import Refused

MOST_STOPS = 4


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _whole(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it holds half a character (a lone surrogate)")
    return text


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_whole)]


class ImageURL(_Strict):
    """Where an image is: a `data:` URL or one of http(s)."""

    url: str
    detail: Literal["auto"] = "auto"  # images have one size


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageURL


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """One turn; a string for `content` is one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(min_length=1),
        BeforeValidator(_as_parts),
    ]

    @property
    def text(self) -> str:
        """All words of the turn."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """The turn's images, in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Strict):
    """Only for `stream: true`."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Strict):
    """Answers are text."""

    type: Literal["text"]


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(_Strict):
    """A request that can be carried out, as far as its form tells."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)] = None  # of vLLM's and others' servers
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS), BeforeValidator(_as_list)
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks; changes nothing
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none"] = "none"
    response_format: TextFormat | None = None
    store: Literal[False] = False


def parse_request(body: bytes) -> ChatRequest:
    """A checked request.

    Raises:
        Refused: what is wrong first, with the field's name.
    """
    try:
        request = ChatRequest.model_validate(_without_nulls(_decode(body)))
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options and not request.stream:
        raise Refused("stream_options is for stream: true alone", param="stream_options")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise Refused("give max_tokens or max_completion_tokens, not both", param="max_tokens")
    _check_turns(request.messages)
    return request


def _decode(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        decoded = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {str(error) or 'nested too deeply'}", code="invalid_json") from None
    if not isinstance(decoded, dict):
        raise Refused("the body must be a JSON object", code="invalid_json")
    return decoded


def _without_nulls(value: Any) -> Any:
    """Null is the same as nothing, wherever it stands in an object."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _refusal(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_context=False)[0]
    param = _name(first["loc"])
    if first["type"] == "extra_forbidden":
        return Refused(f"{param} is not supported by this server", param=param, code="unsupported_parameter")
    if first["type"] == "missing":
        return Refused(f"{param} is missing", param=param, code="missing_required_parameter")
    given = first["input"] if isinstance(first["input"], int | float | bool) else None
    had = f", not {given}" if given is not None else ""
    return Refused(f"{param}: {first['msg']}{had}", param=param, code="invalid_value")


def _name(path: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].image_url.url`; the kind of a part, which pydantic puts in between, left out."""
    name = ""
    for at, step in enumerate(path):
        if path[max(at - 2, 0)] == "content" and isinstance(path[at - 1], int):
            continue
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def _check_turns(messages: list[Message]) -> None:
    """A system message or none, then user and assistant in turn, a user last; images with the user alone."""
    turns = messages[messages[0].role in ("system", "developer") :]
    first = len(messages) - len(turns)
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.urls and message.role != "user":
            raise Refused(f"{where}: only the user may send images", param=f"{where}.content")
        if number < first:
            continue
        expected = ("user", "assistant")[(number - first) % 2]
        if message.role != expected:
            raise Refused(
                f"{where}: the role must be {expected!r} here, not {message.role!r}; a conversation is at most one "
                "system message, then user and assistant in turn",
                param=f"{where}.role",
            )
    if len(turns) % 2 == 0:
        raise Refused("the last message must be the user's", param="messages")
