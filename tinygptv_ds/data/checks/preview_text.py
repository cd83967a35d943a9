"""Previews in one line of plain text, for a log."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from tinygptv_ds.data.checks.preview_samples import CUT, IMAGE, TARGET, TURN, Piece, Preview, preview
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream

_TRIED = 10  # samples of a dataset, where the first ones cannot be used


def first_of_each(stream: OpenStream, tokens: Tokens) -> Iterator[Preview]:
    """Return every dataset's first usable sample in the order of training, or why its first one cannot be used."""
    reader = ShardReader(cache=stream.cache)
    for name, order in stream.orders.items():
        numbers = range(min(_TRIED, len(order)))
        refs = (SampleRef(stream.order.position_of(name, k), name, *order.locate(k)) for k in numbers)
        tried = (preview(stream, reader, ref, tokens) for ref in refs)
        first = next(tried)
        yield first if first.skipped is None else next((one for one in tried if one.skipped is None), first)


def marked(pieces: list[Piece]) -> str:
    """Return one line: targets in <<...>>, tokens cut off in ~~...~~, images and later turns in [...]."""
    parts = []
    for kind, group in groupby(pieces, key=lambda piece: piece.kind):
        text = "".join(f"[{piece.text}]" if kind == IMAGE else piece.text for piece in group).replace("\n", "\\n")
        parts.append({TARGET: f"<<{text}>>", CUT: f"~~{text}~~", TURN: " [next turn] "}.get(kind, text))
    return "".join(parts)
