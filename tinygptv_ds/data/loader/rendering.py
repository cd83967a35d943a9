"""A raw sample put into words, or the reason for which training leaves it out. No torch."""

from __future__ import annotations

from tinygptv_ds.data.shards.reader import RawSample, SampleError
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import Draw, Rendered, render


def in_words(raw: RawSample, draw: Draw, *, clean: bool, where: str) -> Rendered:
    """The turns of a sample.

    Args:
        raw: as read from its shard.
        draw: makes its random choices.
        clean: apply the original's text cleaning, as the recipe says of the dataset.
        where: shard and key, for messages.

    Raises:
        SampleError: bad_record, or empty_answer where no answer holds a word. (The original trains on the end symbol
            alone then.)
    """
    try:
        rendered = render(raw.record, len(raw.images), draw, clean=clean)
    except DataError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error
    if not any(answer.strip() for _, answer in rendered.turns):
        raise SampleError("empty_answer", f"{where}: its caption or answer is empty")
    return rendered
