"""The body of `/v1/chat/completions`: the supported fields of OpenAI's API and their values.

A field that changes nothing is accepted (`n: 1`, `tools: []`, null); one that cannot be honored is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.message_parts import Content, ImagePart, Strict, TextPart, given_texts
from tinygptv_ds.apps.serve.request_json import Path, field_name, read_json
from tinygptv_ds.generate.settings import MAX_LOGPROBS

MAX_STOPS = 16
SYSTEM_ROLES = ("system", "developer")


class Message(Strict):
    """One message; a string as `content` becomes one text part, null none."""

    ignored = ("annotations", "id", "name", "reasoning", "reasoning_content", "timestamp")
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(default=[])

    @model_validator(mode="before")
    @classmethod
    def _say_a_refusal(cls, given: Any) -> Any:
        """Take a refusal, which comes in place of content, as what the assistant has said."""
        if not isinstance(given, dict) or not isinstance(given.get("refusal"), str):
            return given
        return {**given, "content": given.get("content") or given["refusal"], "refusal": None}

    @property
    def text(self) -> str:
        """All text of the message."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """The URLs of the message's images, in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(Strict):
    """Options of a stream; without effect otherwise."""

    include_usage: bool = False


def _as_list(stop: Any) -> Any:
    texts = [stop] if isinstance(stop, str) else stop
    return [text for text in texts if text != ""] if isinstance(texts, list) else texts


def _as_integer(value: Any) -> Any:
    """Return None for -1, which several servers take for "no limit" or "any", and an integer for one such as 4.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value == -1:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Optional = BeforeValidator(_as_integer)
_Stop: TypeAlias = Annotated[str, Field(max_length=1000)]  # each piece of an answer is searched for it


class ChatRequest(Strict):
    """A request whose fields are valid by themselves."""

    ignored = (
        "cache_prompt",
        "include_reasoning",
        "keep_alive",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_generation_prompt": (True,),
        "best_of": (1,),
        "chat_template_kwargs": ({"enable_thinking": False},),
        "function_call": ("auto", "none"),
        "length_penalty": (1,),
        "modalities": (["text"],),
        "n": (1,),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "tool_choice": ("auto", "none"),
        "typical_p": (1,),
        "verbosity": ("medium",),
    }

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1), _Optional] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1), _Optional] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0), _Optional] = None  # this and the next as in vLLM and other servers
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63), _Optional] = None
    stop: Annotated[list[_Stop], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] = Field(default=[])
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS), _Optional] = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @classmethod
    def has_no_effect(cls, name: str, value: Any, given: Mapping[str, Any]) -> bool:
        """Return whether a field changes no answer; tools that must not be called, or biases of 0, are such."""
        unused = name in ("tools", "tool_choice") and given.get("tool_choice") == "none"
        unused = unused or (name in ("logprobs", "top_logprobs") and not value)
        unused = unused or (name == "logit_bias" and isinstance(value, dict) and not any(value.values()))
        return unused or super().has_no_effect(name, value, given)

    @property
    def new_tokens(self) -> int | None:
        """The number of tokens of the answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens


@dataclass(frozen=True)
class TextLimits:
    """Bounds of the messages, checked before a prompt is built: what exceeds them cannot fit the model's context.

    Attributes:
        parts: number of messages, and of the texts and images in all of them.
        characters: of all texts.
    """

    parts: int
    characters: int

    @property
    def values(self) -> int:
        """The number of commas and brackets that a request may have, in texts or around values."""
        return self.characters + 20 * self.parts + 10_000


def parse_request(body: bytes, limits: TextLimits, *, strict: bool = False) -> ChatRequest:
    """Parse and check a request.

    Args:
        body: JSON.
        limits: bounds of the messages.
        strict: whether roles must alternate, after at most one system message.

    Raises:
        RequestError: the body is wrong; names the first wrong field.
    """
    decoded = read_json(body, limits.values)
    _check_size(decoded.get("messages"), limits)
    try:
        request = ChatRequest.model_validate(decoded)
    except ValidationError as error:
        raise _refusal(error) from None
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    _check_messages(request.messages)
    if strict:
        _check_alternation(request.messages)
    return request


def _check_size(messages: Any, limits: TextLimits) -> None:
    """Refuse messages that cannot fit the context. Their form is checked later."""
    if not isinstance(messages, list):
        return
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
    characters = 0
    if parts <= limits.parts:
        refusals = [message.get("refusal") for message in messages if isinstance(message, dict)]
        characters = sum(len(text) for content in (*contents, refusals) for text in given_texts(content))
    for count, limit, what in (
        (parts, limits.parts, "messages and parts"),
        (characters, limits.characters, "characters"),
    ):
        if count > limit:
            message = f"{count:,} {what} exceed the model's context, which holds less than {limit:,}: send fewer"
            raise RequestError(message, param="messages", code="context_length_exceeded")


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = field_name(_without_tags(first["loc"]))
    if first["type"] == "extra_forbidden":
        neutral = ChatRequest.neutral.get(param, ())
        only = f"; only {' or '.join(map(json.dumps, neutral))} is accepted" if neutral else ""
        return RequestError(f"{param} is not supported by this server{only}", param=param, code="unsupported_parameter")
    if first["type"] == "union_tag_invalid":
        kind = str(first["input"]["type"])[:50]
        message = f"{param}: parts of type {kind!r} are not supported; there are text and image_url"
        return RequestError(message, param=param, code="unsupported_parameter")
    if first["type"] == "missing":
        return RequestError(f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "model_type":
        return RequestError(f"{param} must be a JSON object", param=param, code="invalid_value")
    given = first["input"] if isinstance(first["input"], int | float | bool) else None
    had = f", not {given}" if given is not None else ""
    return RequestError(f"{param}: {first['msg']}{had}", param=param, code="invalid_value")


def _without_tags(path: Path) -> Path:
    """Remove pydantic's tag of a message's part, which follows its number, from the place of an error."""
    return tuple(
        step
        for at, step in enumerate(path)
        if not (at >= 2 and path[at - 2] == "content" and isinstance(path[at - 1], int))
    )


def _check_messages(messages: list[Message]) -> None:
    """Check that there is a question to answer, and that only users send images."""
    for number, message in enumerate(messages):
        if message.urls and message.role != "user":
            where = f"messages[{number}]"
            raise RequestError(f"{where}: only the user may send images", param=f"{where}.content")
    roles = [message.role for message in messages if message.role not in SYSTEM_ROLES]
    if not roles or roles[-1] != "user":
        raise RequestError("the last message must be the user's", param="messages")


def _check_alternation(messages: list[Message]) -> None:
    first = 1 if messages[0].role in SYSTEM_ROLES else 0
    for number, message in enumerate(messages[first:], first):
        expected = ("user", "assistant")[(number - first) % 2]
        if message.role != expected:
            where = f"messages[{number}]"
            raise RequestError(
                f"{where}: the role must be {expected!r} here, not {message.role!r}; with --strict a conversation is "
                "at most one system message, then user and assistant in turn",
                param=f"{where}.role",
            )
