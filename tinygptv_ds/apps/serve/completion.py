"""A request of OpenAI's API as a prompt with settings, and an answer as pieces and a reason for its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from tinygptv_ds.apps.serve.api_errors import Refused
from tinygptv_ds.apps.serve.request_schema import ChatRequest
from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.conversation import Prompt, Turn
from tinygptv_ds.generate.settings import Generation


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to be answered."""

    prompt: Prompt
    generation: Generation
    prompt_tokens: int


@dataclass(frozen=True)
class Finish:
    """How an answer ended: "stop" or "length", after so many tokens."""

    reason: str
    tokens: int


def prepare(
    answerer: Answerer, request: ChatRequest, images: Sequence[Sequence[Image.Image]], defaults: Generation, most: int
) -> Prepared:
    """See that the model can take a request.

    Args:
        answerer: the model.
        request: checked.
        images: those of each message.
        defaults: what the request does not say.
        most: tokens that a request may ask for.

    Raises:
        Refused: the prompt does not fit, or cannot be made.
    """
    system, turns = _turns(request, images)
    try:
        prompt = answerer.prompt(turns, system)
        length = answerer.prompt_length(prompt)
    except DataError as error:
        code = "context_length_exceeded" if "exceed" in str(error) else "invalid_value"
        raise Refused(str(error), param="messages", code=code) from None
    room = answerer.context - length
    wanted = request.max_completion_tokens or request.max_tokens
    if wanted is not None and wanted > min(most, room):
        limit = f"this server's limit of {most}" if wanted > most else f"{room}, what the prompt of {length} leaves"
        raise Refused(f"max_tokens is {wanted}, above {limit}", param="max_tokens", code="context_length_exceeded")
    said = {name: getattr(request, name) for name in ("temperature", "top_p", "repetition_penalty", "seed")}
    said = {name: value for name, value in said.items() if value is not None}
    generation = Generation(
        **vars(defaults)
        | said
        | {
            "max_new_tokens": wanted or min(defaults.max_new_tokens, most, room),
            "stop": tuple(dict.fromkeys((*prompt.stop, *request.stop))),
        }
    )
    return Prepared(prompt, generation, length)


def answer(answerer: Answerer, prepared: Prepared) -> Iterator[str | Finish]:
    """The pieces of text, then how it ended; closing this ends the generation."""
    under_way = answerer.stream(prepared.prompt, prepared.generation)
    yield from under_way
    yield Finish(under_way.finish, under_way.new_tokens)


def _turns(request: ChatRequest, images: Sequence[Sequence[Image.Image]]) -> tuple[str | None, list[Turn]]:
    """The system message, and each question with the answer that follows it."""
    messages = list(zip(request.messages, images, strict=True))
    system = messages.pop(0)[0].text if messages[0][0].role in ("system", "developer") else None
    questions, answers = messages[::2], [message.text for message, _ in messages[1::2]]
    padded = [*answers, None]
    return system, [Turn(said.text, seen, given) for (said, seen), given in zip(questions, padded, strict=True)]
