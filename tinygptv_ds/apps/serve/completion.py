"""From a request of OpenAI's API to the row of its answer, with prompt, images and settings."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.request_schema import ChatRequest
from tinygptv_ds.apps.serve.turns import turns_of
from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.settings import Generation


def prepare(
    answerer: Answerer,
    request: ChatRequest,
    images: Sequence[Sequence[Image.Image]],
    defaults: Generation,
    max_tokens: int,
    *,
    strict: bool = False,
) -> Row:
    """Check that the model can answer a request, and return the row of its answer.

    Args:
        answerer: the model.
        request: from `parse_request`.
        images: the images of each message.
        defaults: settings of generation that the request leaves out.
        max_tokens: the server's limit for an answer.
        strict: whether a system text is refused where the template has no place for it.

    Raises:
        RequestError: the prompt is too long or cannot be made.
    """
    try:
        has_system = strict or bool(answerer.template.system)  # a template without a place for it raises an error below
        system, turns = turns_of(request.messages, images, has_system=has_system)
        prompt = answerer.prompt(turns, system)
        prompt_ids = answerer.prompt_ids(prompt)
    except DataError as error:
        code = "context_length_exceeded" if "exceed" in str(error) else "invalid_value"
        raise RequestError(str(error), param="messages", code=code) from None
    length = len(prompt_ids)
    available = answerer.context - length
    wanted = request.new_tokens
    if wanted is not None and wanted > min(max_tokens, available):
        limit = (
            f"this server's limit of {max_tokens}"
            if wanted > max_tokens
            else f"{available}, what the prompt of {length} leaves"
        )
        raise RequestError(f"max_tokens is {wanted}, above {limit}", param="max_tokens", code="context_length_exceeded")
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    settings = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    longest = wanted or min(defaults.max_new_tokens, max_tokens, available)
    if request.logprobs and defaults.num_beams > 1:
        message = "logprobs: an answer of beam search has none, and this server was started with --num-beams"
        raise RequestError(message, param="logprobs", code="unsupported_parameter")
    generation = Generation(
        **vars(defaults)
        | settings
        | {
            "max_new_tokens": longest,
            "min_new_tokens": min(defaults.min_new_tokens, longest),
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
            "stop": tuple(dict.fromkeys((*prompt.stop, *request.stop))),
        }
    )
    return answerer.row(prompt, generation, prompt_ids)
