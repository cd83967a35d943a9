"""The body of `/v1/chat/completions`: the supported fields of OpenAI's API and their values.

A field that changes nothing is accepted (`n: 1`, `tools: []`, null); one that cannot be honored is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tinygptv_ds.apps.serve.api_errors import RequestError

MAX_STOPS = 4


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _checked_text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it holds half a character (a lone surrogate)")
    return text


class TextPart(_Strict):
    """A text."""

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_checked_text)]


class ImageURL(_Strict):
    """The URL of an image: `data:` or http(s)."""

    url: str
    detail: Literal["auto"] = "auto"  # the model has one image size


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageURL


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """One message; a string as `content` becomes one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(min_length=1),
        BeforeValidator(_as_parts),
    ]

    @property
    def text(self) -> str:
        """All text of the message."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """The URLs of the message's images, in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Strict):
    """Options of a stream, for `stream: true` only."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Strict):
    """The only format of answers: text."""

    type: Literal["text"]


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(_Strict):
    """A request whose fields are valid by themselves."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)] = None  # as in vLLM's and other servers
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # changes nothing
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none"] = "none"
    response_format: TextFormat | None = None
    store: Literal[False] = False


def parse_request(body: bytes) -> ChatRequest:
    """Parse and check a request.

    Raises:
        RequestError: the body is wrong; names the first wrong field.
    """
    try:
        request = ChatRequest.model_validate(_without_nulls(_decode(body)))
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options and not request.stream:
        raise RequestError("stream_options is for stream: true alone", param="stream_options")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise RequestError("give max_tokens or max_completion_tokens, not both", param="max_tokens")
    _check_turns(request.messages)
    return request


def _decode(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        decoded = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error) or 'nested too deeply'}", code="invalid_json") from None
    if not isinstance(decoded, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return decoded


def _without_nulls(value: Any) -> Any:
    """Remove nulls from objects at any depth; a null field is the same as a missing one."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = _name(first["loc"])
    if first["type"] == "extra_forbidden":
        return RequestError(f"{param} is not supported by this server", param=param, code="unsupported_parameter")
    if first["type"] == "missing":
        return RequestError(f"{param} is missing", param=param, code="missing_required_parameter")
    given = first["input"] if isinstance(first["input"], int | float | bool) else None
    had = f", not {given}" if given is not None else ""
    return RequestError(f"{param}: {first['msg']}{had}", param=param, code="invalid_value")


def _name(path: tuple[int | str, ...]) -> str:
    """Return a field's name, e.g. `messages[0].content[1].image_url.url`, without pydantic's tag of the part."""
    name = ""
    for at, step in enumerate(path):
        if path[max(at - 2, 0)] == "content" and isinstance(path[at - 1], int):
            continue
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def _check_turns(messages: list[Message]) -> None:
    """Check the order of roles: an optional system message, then user and assistant in turn, a user last."""
    turns = messages[messages[0].role in ("system", "developer") :]
    first = len(messages) - len(turns)
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.urls and message.role != "user":
            raise RequestError(f"{where}: only the user may send images", param=f"{where}.content")
        if number < first:
            continue
        expected = ("user", "assistant")[(number - first) % 2]
        if message.role != expected:
            raise RequestError(
                f"{where}: the role must be {expected!r} here, not {message.role!r}; a conversation is at most one "
                "system message, then user and assistant in turn",
                param=f"{where}.role",
            )
    if len(turns) % 2 == 0:
        raise RequestError("the last message must be the user's", param="messages")
