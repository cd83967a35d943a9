"""From the texts of a sample to token ids, labels and positions, laid out as TinyGPT-V was trained.

A training row is `BOS | prompt with 32 rows per image | answer + end_sym`; the targets are the answer and `end_sym`. In
a conversation every later question follows as a BOS that nothing attends to (the original's attention hole) and the
wrapped question: here that BOS is left out and its position skipped, which is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import (
    IMAGE_PLACEHOLDER,
    IMAGE_TAG,
    Draw,
    Rendered,
    load_prompts,
    split_plain_text,
    wrap,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image in a row: `count` times the id `token_id`."""

    token_id: int
    count: int


@dataclass(frozen=True)
class TokenRow:
    """One training sample as a row of tokens, ready for a packed batch.

    Attributes:
        input_ids: int64 `[T]`, image positions hold the image token id.
        labels: int64 `[T]`, -100 where a token is no target.
        position_ids: int64 `[T]`, from 0; may skip.
        image_rows: int64 `[R]`, positions of the image tokens in the row.
        image_index: int64 `[R]`, the row of the sample's images (image * count + row) that goes there.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    image_rows: np.ndarray
    image_index: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return token ids without special tokens in front; an empty text has none.

    A special token that the text holds becomes that token, unless `as_plain_text` has made it words.
    """
    parts = split_plain_text(text)
    if len(parts) > 1:
        return [number for part in parts for number in tokenize(tokenizer, part)]
    if not text:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation or backend.padding:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # the same ids in half the time


def prompt_text(rendered: Rendered, num_images: int, text: TextSection, draw: Draw) -> str:
    """Return the first question as in the row: wrapped, with a placeholder for each image.

    The prompt of a bare caption is an entry of the recipe's prompt pool, or its image alone.
    """
    question = rendered.turns[0][0]
    if question is not None:
        return wrap(text.prompt_template, question)
    if text.prompts is None:
        return IMAGE_PLACEHOLDER * num_images
    pool = load_prompts()[text.prompts]
    return wrap(text.prompt_template, pool[draw(len(pool))].replace(IMAGE_TAG, IMAGE_TAG * num_images, 1))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, num_images: int, image: ImageTokens) -> list[int]:
    """Return the token ids of a prompt; the text around each placeholder is tokenized separately, as in the original.

    Raises:
        DataError: the prompt does not hold one placeholder per image.
    """
    check_placeholders(prompt, num_images)
    pieces = prompt.split(IMAGE_PLACEHOLDER)
    ids = tokenize(tokenizer, pieces[0])
    for piece in pieces[1:]:
        ids += [image.token_id] * image.count + tokenize(tokenizer, piece)
    return ids


def prompt_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, parts: Sequence[str], image: ImageTokens
) -> list[tuple[int, int]]:
    """Return where the characters of each token of `prompt_ids` of all parts begin and end in `text`.

    Those of an image's tokens are the placeholder's.

    Args:
        tokenizer: a fast one.
        text: the parts one after another, with BOS tokens between them that are not tokenized.
        parts: what is tokenized one by one.
        image: the tokens of an image.
    """
    bos = len(str(tokenizer.bos_token))
    offsets: list[tuple[int, int]] = []
    at = 0
    for part in parts:
        while not text.startswith(part, at):
            at += bos
        for number, piece in enumerate(part.split(IMAGE_PLACEHOLDER)):
            if number:
                offsets += [(at, at + len(IMAGE_PLACEHOLDER))] * image.count
                at += len(IMAGE_PLACEHOLDER)
            found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            offsets += [(at + begin, at + end) for begin, end in found]
            at += len(piece)
    return offsets


def check_placeholders(prompt: str, num_images: int) -> None:
    """Check that a prompt holds one placeholder per image.

    Raises:
        DataError: it does not.
    """
    found = prompt.count(IMAGE_PLACEHOLDER)
    if found != num_images:
        shown = "".join(split_plain_text(prompt))[:200]
        raise DataError(
            f"the prompt holds {found} times {IMAGE_PLACEHOLDER}, but there are {num_images} image(s): {shown!r}"
        )


def build_sequence(
    rendered: Rendered,
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSection,
    image: ImageTokens,
    draw: Draw,
) -> TokenRow:
    """Lay out one training sample.

    Args:
        rendered: the turns of the sample.
        num_images: number of images stored with it.
        tokenizer: the tokenizer of Phi; its BOS token is also the end and padding token.
        text: template, end symbol and lengths of the recipe.
        image: the tokens of an image.
        draw: draws a uniform integer below n, for the prompt pool.

    Raises:
        DataError: placeholders and images do not match.
    """
    bos = tokenizer.bos_token_id
    prompt = prompt_ids(tokenizer, prompt_text(rendered, num_images, text, draw), num_images, image)
    if num_images:
        prompt = prompt[: text.max_context_len]
    row = [bos, *prompt]
    answers, targets, holes = _turns(rendered, lambda t: tokenize(tokenizer, t), text, bos)
    input_ids = np.array(row + answers[: text.max_txt_len], dtype=np.int64)
    labels = np.full(len(input_ids), IGNORE, dtype=np.int64)
    is_target = np.zeros(len(input_ids), dtype=bool)
    is_target[len(row) :] = targets[: text.max_txt_len]
    # The original finds padding by id, so an end token written inside an answer is no target.
    is_target &= input_ids != bos
    labels[is_target] = input_ids[is_target]
    keep = np.ones(len(input_ids), dtype=bool)
    keep[[len(row) + h for h in holes if h < text.max_txt_len]] = False
    position_ids = np.arange(len(input_ids), dtype=np.int64)
    input_ids, labels, position_ids = input_ids[keep], labels[keep], position_ids[keep]
    image_rows = np.flatnonzero(input_ids == image.token_id)
    return TokenRow(input_ids, labels, position_ids, image_rows, np.arange(len(image_rows), dtype=np.int64))


def _turns(
    rendered: Rendered, tokens: Callable[[str], list[int]], text: TextSection, bos: int
) -> tuple[list[int], list[bool], list[int]]:
    """Return everything after the prompt: ids, whether each is a target, and where the holes are."""
    ids: list[int] = []
    targets: list[bool] = []
    holes: list[int] = []
    for number, (question, answer) in enumerate(rendered.turns):
        if number:
            holes.append(len(ids))
            asked = [bos, *tokens(wrap(text.prompt_template, question or ""))]
            ids += asked
            targets += [False] * len(asked)
        answered = tokens(answer + text.end_sym)
        ids += answered
        targets += [True] * len(answered)
    return ids, targets, holes
