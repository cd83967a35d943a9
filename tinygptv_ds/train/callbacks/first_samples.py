"""The first sample of every dataset as the model will see it, its target tokens marked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinygptv_ds.board_tags import SAMPLES
from tinygptv_ds.data.checks.preview_samples import CUT, PROMPT, TARGET, Preview
from tinygptv_ds.data.checks.preview_text import first_of_each, marked
from tinygptv_ds.data.loader.batch import Batch, MicroBatch
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.callbacks.sample_panel import cell
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.run import Run


class FirstSamples(Callback):
    """Shows one sample of every dataset, and how many have an image, before the first step of a run, on rank 0.

    Settings: none. TensorBoard: `first_of_each_dataset` and `first_images`, among the samples; the log has the texts.
    Metrics: none.

    Args:
        run: the run on this rank.
        stream: the training stream.
        tokens: how samples become rows.
        reporter: holds TensorBoard's writer.
    """

    def __init__(self, run: Run, stream: OpenStream, tokens: Tokens, reporter: Reporter) -> None:
        self._due = run.first_step == 0 and run.ranks.is_main
        self._stream = stream
        self._tokens = tokens
        self._board = reporter.board

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Write the log and TensorBoard once."""
        if not self._due or self._board is None:
            return
        self._due = False
        LOGGER.info("the first step, on this rank: %s", count_images([item.batch for item in micro_batches]))
        previews = list(first_of_each(self._stream, self._tokens))
        rows = ["| dataset | sample | tokens | row, target tokens in <<...>> |", "|-|-|-|-|"]
        LOGGER.info("the first sample of each dataset; target tokens are in <<...>>:")
        for preview in previews:
            cells = _cells(preview)
            LOGGER.info("  %s", " | ".join(cells))
            rows.append(f"| {' | '.join(cell(text) for text in cells)} |")
        self._board.add_text(f"{SAMPLES}/first_of_each_dataset", "\n".join(rows), 0)
        images = [torch.from_numpy(image) for preview in previews for image in preview.images]
        if images:
            self._board.add_images(f"{SAMPLES}/first_images", torch.stack(images), 0)


def count_images(batches: Sequence[Batch]) -> str:
    """Return how many samples of each dataset have an image, and how many none."""
    having: dict[str, list[bool]] = {}
    for batch in batches:
        for ref, has_image in zip(batch.sample_ids, batch.has_image().tolist(), strict=True):
            having.setdefault(ref.dataset, []).append(has_image)
    counts = (f"{name} {sum(each)} with image, {len(each) - sum(each)} text only" for name, each in having.items())
    return "; ".join(counts) or "no sample can be used"


def _cells(preview: Preview) -> tuple[str, str, str, str]:
    """Return dataset, shard with key, number of tokens, and the row or why it is left out."""
    where = f"{preview.shard}: {preview.key}"
    if preview.skipped:
        return preview.ref.dataset, where, "left out", preview.skipped[1]
    counts = preview.counts
    cut = f", {counts[CUT]} cut off" if counts[CUT] else ""
    amount = f"{counts[PROMPT] + counts[TARGET]} tokens, {counts[TARGET]} target tokens{cut}"
    return preview.ref.dataset, where, amount, marked(preview.pieces)
