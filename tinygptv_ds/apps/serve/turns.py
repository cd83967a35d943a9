"""From the messages of a request to turns, each a question with its images and its answer.

Clients send orders of messages that the model was not trained on. They are brought into its form without losing a text
that could change an answer: consecutive messages of a role become one, and a system text goes in front of the question
that follows it, as in the training of conversations (`data/sets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from tinygptv_ds.apps.serve.request_schema import SYSTEM_ROLES, Message
from tinygptv_ds.generate.conversation import Turn


@dataclass
class _Draft:
    """A turn while its messages are joined."""

    questions: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def turns_of(
    messages: Sequence[Message], images: Sequence[Sequence[Image.Image]], *, has_system: bool
) -> tuple[str | None, list[Turn]]:
    """Return the system text, if there is one with a place of its own, and the turns.

    A greeting of the assistant before the first question is left out, because no conversation of the training begins
    with an answer.

    Args:
        messages: from `parse_request`; the last one that is no system message is a user's.
        images: the images of each message.
        has_system: whether the template has a place for a system text; otherwise it goes before the first question.
    """
    first = next(number for number, message in enumerate(messages) if message.role == "user")
    opening = _joined([message.text for message in messages[:first] if message.role in SYSTEM_ROLES])
    drafts = [_Draft([] if has_system else [opening])]
    waiting: list[str] = []  # system texts for the next question
    for message, seen in zip(messages[first:], images[first:], strict=True):
        if message.role in SYSTEM_ROLES:
            waiting.append(message.text)
        elif message.role == "assistant":
            drafts[-1].answers.append(message.text)
        else:
            if drafts[-1].answers:
                drafts.append(_Draft())
            drafts[-1].questions += [*waiting, message.text]
            drafts[-1].images += seen
            waiting = []
    drafts[-1].questions += waiting
    turns = [Turn(_joined(draft.questions), draft.images, _joined(draft.answers)) for draft in drafts]
    return opening if has_system and opening else None, turns


def _joined(texts: Sequence[str]) -> str:
    return "\n".join(text for text in texts if text)
