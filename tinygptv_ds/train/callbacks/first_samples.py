"""At the start of a run: one sample of every dataset as the model will see it, with what is learnt marked."""

from __future__ import annotations

import torch
from torch.utils.tensorboard import SummaryWriter

from tinygptv_ds.data.checks.preview_samples import CUT, LEARNT, PROMPT, Preview
from tinygptv_ds.data.checks.preview_text import first_of_each, marked
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.sample_panel import cell


def show_first_samples(stream: OpenStream, tokens: Tokens, board: SummaryWriter) -> None:
    """To the log and to TensorBoard (`data/first_samples`, `data/first_images`). For rank 0 alone."""
    previews = list(first_of_each(stream, tokens))
    rows = ["| dataset | sample | tokens | row, learnt parts in <<...>> |", "|-|-|-|-|"]
    LOGGER.info("the first sample of each dataset; what is learnt stands in <<...>>:")
    for preview in previews:
        told = _told(preview)
        LOGGER.info("  %s", " | ".join(told))
        rows.append(f"| {' | '.join(cell(text) for text in told)} |")
    board.add_text("data/first_samples", "\n".join(rows), 0)
    images = [torch.from_numpy(image) for preview in previews for image in preview.images]
    if images:
        board.add_images("data/first_images", torch.stack(images), 0)


def _told(preview: Preview) -> tuple[str, str, str, str]:
    """Dataset, shard with key, number of tokens, and the row or why it is left out."""
    where = f"{preview.shard}: {preview.key}"
    if preview.skipped:
        return preview.ref.dataset, where, "left out", preview.skipped[1]
    counts = preview.counts
    cut = f", {counts[CUT]} cut off" if counts[CUT] else ""
    amount = f"{counts[PROMPT] + counts[LEARNT]} tokens, {counts[LEARNT]} learnt{cut}"
    return preview.ref.dataset, where, amount, marked(preview.pieces)
