"""Samples as the model will see them: their tokens with the target tokens and what is cut off, images and boxes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice, pairwise

import numpy as np

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.data.loader.sample import Tokens, load_sample
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.processing.boxes import Box, FoundBox, find_boxes
from tinygptv_ds.processing.sequence import IGNORE, TokenRow

PROMPT, TARGET, CUT, IMAGE, TURN = "prompt", "target", "cut", "image", "turn"
_READ = (PROMPT, TARGET)
_ENDLESS = 1 << 40  # tokens
_TORN = "\ufffd"  # what the decoder gives for a part of a character


@dataclass(frozen=True)
class Piece:
    """Some words of a row.

    Attributes:
        text: what they say.
        kind: "prompt" (read), "target", "cut" (beyond a limit of the recipe), "image" (the rows of one image), or
            "turn" (no text: a later question begins).
        token: number of the token in the row; pieces of one token share it.
        box: number of the box in `Preview.boxes` that they belong to.
        image: number of the image that they represent.
    """

    text: str
    kind: str
    token: int
    box: int | None = None
    image: int | None = None


@dataclass(frozen=True)
class Preview:
    """One sample of the stream.

    Attributes:
        ref: which one.
        step: the optimizer step that it is part of.
        shard: the tar.
        key: its key there.
        pieces: its row, cut tokens included.
        counts: tokens by kind: "prompt" with those of images, "target" and "cut".
        images: uint8 `[3, S, S]` each, as the model gets them.
        boxes: (number of the image, box in per cent of it) of each box that the model reads or learns.
        skipped: where training leaves the sample out: one word, and the whole message.
    """

    ref: SampleRef
    step: int
    shard: str
    key: str
    pieces: list[Piece] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    images: list[np.ndarray] = field(default_factory=list)
    boxes: list[tuple[int, Box]] = field(default_factory=list)
    skipped: tuple[str, str] | None = None


def previews(
    stream: OpenStream, tokens: Tokens, *, first_step: int, number: int, datasets: Collection[str] = ()
) -> Iterator[Preview]:
    """Return `number` samples from step `first_step` on, in the order of training; of `datasets` alone if given."""
    reader = ShardReader(cache=stream.cache)
    refs = (ref for step in count(first_step) for ref in stream.order.step(step))
    wanted = (ref for ref in refs if not datasets or ref.dataset in datasets)
    for ref in islice(wanted, number):
        yield preview(stream, reader, ref, tokens)


def preview(stream: OpenStream, reader: ShardReader, ref: SampleRef, tokens: Tokens) -> Preview:
    """Return one sample, or the reason why it drops out."""
    tar = stream.shards[ref.dataset][ref.shard]
    step = ref.position // stream.batch_size
    key = reader.key(tar, ref.index)
    try:
        sample = load_sample(stream, reader, ref, tokens)
        answers, whole = (
            load_sample(stream, reader, ref, replace(tokens, text=text)).sequence for text in _unlimited(tokens)
        )
    except SampleError as error:
        return Preview(ref, step, str(tar), key, skipped=(error.reason, str(error)))
    kinds = kinds_of(sample.sequence, answers, whole, tokens.text.max_context_len)
    counts = {kind: int((kinds == kind).sum()) for kind in (PROMPT, TARGET, CUT)}
    pieces, boxes = _with_boxes(_pieces(whole, kinds, tokens), len(sample.pixels))
    return Preview(ref, step, str(tar), key, pieces, counts, list(sample.pixels), boxes)


def _unlimited(tokens: Tokens) -> tuple[TextSection, TextSection]:
    """Return the text section without the answers' limit, and without any."""
    answers = replace(tokens.text, max_txt_len=_ENDLESS)
    return answers, replace(answers, max_context_len=_ENDLESS)


def kinds_of(kept: TokenRow, answers: TokenRow, whole: TokenRow, max_context_len: int) -> np.ndarray:
    """Return "prompt", "target" or "cut" for each token of `whole`: str `[T]`.

    Args:
        kept: the row that is trained on, whose labels mark the targets.
        answers: the same row with the answers uncut, of which `kept` is the beginning.
        whole: the row with the prompt uncut, too.
        max_context_len: where the prompt was cut, not counting the BOS token.
    """
    kinds = np.full(len(whole), CUT, dtype="<U6")
    lost = len(whole) - len(answers)
    uncut = np.delete(np.arange(len(whole)), slice(max_context_len + 1, max_context_len + 1 + lost))
    kinds[uncut[: len(kept)]] = np.where(kept.labels != IGNORE, TARGET, PROMPT)
    return kinds


def _pieces(row: TokenRow, kinds: np.ndarray, tokens: Tokens) -> list[Piece]:
    """Return the row in words, token by token; the rows of an image are one piece."""
    image_of = dict(zip(row.image_rows.tolist(), (row.image_index // tokens.image.count).tolist(), strict=True))
    starts = np.flatnonzero(np.diff(row.position_ids) > 1) + 1  # a skipped position: a later question begins
    turn_of = np.searchsorted(starts, np.arange(len(row)), side="right").tolist()
    pieces: list[Piece] = []
    turn_before = 0
    alike = groupby(range(len(row)), lambda i: (turn_of[i], image_of.get(i), str(kinds[i])))
    for (turn, image, kind), group in alike:
        where = list(group)
        if turn != turn_before:
            pieces.append(Piece("", TURN, where[0]))
            turn_before = turn
        if image is None:
            pieces += _words([(i, int(row.input_ids[i])) for i in where], kind, tokens)
        else:
            cut = " cut off" if kind == CUT else ""
            text = f"image {image + 1}: {len(where)} tokens{cut}"
            pieces.append(Piece(text, CUT if cut else IMAGE, where[0], image=image))
    return pieces


def _words(ids: list[tuple[int, int]], kind: str, tokens: Tokens) -> Iterator[Piece]:
    """Return one piece for each token; tokens that are parts of one character share one."""
    waiting: list[int] = []
    for number, (place, token) in enumerate(ids):
        waiting.append(token)
        text = str(tokens.tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        if not text.endswith(_TORN) or number + 1 == len(ids) or len(waiting) == 4:
            yield Piece(text, kind, place)
            waiting = []


def _with_boxes(pieces: list[Piece], images: int) -> tuple[list[Piece], list[tuple[int, Box]]]:
    """Split the pieces where boxes begin and end; return them and the boxes, each on the image before it in the row."""
    found = find_boxes("".join(piece.text for piece in pieces if piece.kind in _READ)) if images else []
    boxes: list[tuple[int, Box]] = []
    number_of: dict[FoundBox, int] = {}
    marked: list[Piece] = []
    place = image = 0
    for piece in pieces:
        image = image if piece.image is None else piece.image
        if piece.kind not in _READ:
            marked.append(piece)
            continue
        here = [box for box in found if box.start < place + len(piece.text) and place < box.end]
        for box in here:
            if box not in number_of:
                boxes += [(image, box.box)] if (image, box.box) not in boxes else []
                number_of[box] = boxes.index((image, box.box))
        marked += _split(piece, place, {box: number_of[box] for box in here})
        place += len(piece.text)
    return marked, boxes


def _split(piece: Piece, place: int, boxes: dict[FoundBox, int]) -> Iterator[Piece]:
    """Split a piece that begins at character `place` into parts that belong to one box or none."""
    inside = {edge - place for box in boxes for edge in (box.start, box.end)}
    edges = sorted({0, len(piece.text), *(edge for edge in inside if 0 < edge < len(piece.text))})
    for start, end in pairwise(edges):
        number = next((boxes[box] for box in boxes if box.start <= place + start < box.end), None)
        yield replace(piece, text=piece.text[start:end], box=number)
