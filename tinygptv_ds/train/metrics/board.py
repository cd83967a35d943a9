"""TensorBoard's writer for a run that must survive a full disk, and what it shows of the run before any step."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from tinygptv_ds.board_tags import BY_DATASET, DATA, LOSS, PERFORMANCE, SCORES, board_tag
from tinygptv_ds.config.load import dotted_values, recipe_dict
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.setup.job import Job

FLUSH_SECONDS = 120.0  # as SummaryWriter's own default
# What runs are compared by: the settings that people vary, of which TensorBoard's table shows the first few.
_HPARAMS = (
    *("stage", "seed", "model.lora_r", "model.lora_alpha", "optimizer.lr", "optimizer.min_lr", "optimizer.schedule"),
    *("optimizer.warmup_steps", "optimizer.weight_decay", "train.batch_size", "train.micro_batch_size"),
    *("train.max_tokens", "train.cycles", "train.epochs", "train.steps_per_epoch"),
)
# The tab "Custom scalars": (category, chart, expressions that the tags of its lines match)
_LAYOUT = (
    ("Loss", "training and validation", [f"{LOSS}/.*"]),
    ("Loss", "training, by dataset", [f"{BY_DATASET}/train_.*"]),
    ("Loss", "validation, by dataset", [f"{BY_DATASET}/val_.*"]),
    ("Mixture", "per cent of the samples", [f"{DATA}/mix_.*"]),
    ("Mixture", "skipped samples, all and by reason", [f"{DATA}/skipped.*"]),
    ("Speed", "samples per second", [f"{PERFORMANCE}/samples_s"]),
    ("Speed", "per cent: MFU, wait for data", [f"{PERFORMANCE}/mfu", f"{PERFORMANCE}/data_wait_pct"]),
)
_CAPTION_SCORE = "cider"  # what captions, which no rule scores one by one, are compared by
_PROBE = 8192  # bytes; the first records of a file take less


class _Guarded:
    """TensorBoard's record writer, which a thread of its own uses; once it fails, records are dropped.

    Args:
        writer: TensorBoard's own.
        folder: for the message.
    """

    def __init__(self, writer: Any, folder: Path) -> None:
        self._writer, self._folder = writer, folder
        self._failed = False
        self._flushed = time.monotonic()

    def write(self, data: bytes) -> None:
        """Write a record, unless writing has failed before."""
        self._try(lambda: self._writer.write(data))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:  # TensorBoard's thread goes by the time of the day
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        self._flushed = time.monotonic()
        self._try(self._writer.flush)

    def close(self) -> None:
        """Write what is waiting, and close the file."""
        self._try(self._writer.close)

    def _try(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except OSError as error:
            self._failed = True
            LOGGER.warning("%s cannot be written (%s); training continues without it", self._folder, error.strerror)


def open_board(folder: Path, purge_step: int | None) -> SummaryWriter:
    """Open TensorBoard's writer in a folder.

    Args:
        folder: gets a file of events.
        purge_step: from this step on, TensorBoard ignores what earlier files hold.

    Raises:
        ConfigError: the folder cannot be made, or written to at all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # TensorBoard's thread would end in a traceback
            probe.write(bytes(_PROBE))
        board = SummaryWriter(folder, purge_step=purge_step)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); make room, or move it away") from None
    # Errors are caught where the thread meets them. Remove when tensorboard no longer prints them as tracebacks.
    writer: Any = board.file_writer  # torch annotates it as None
    queue = writer.event_writer._async_writer
    queue._writer = queue._worker._record_writer = _Guarded(queue._writer, folder)
    return board


def describe_run(board: SummaryWriter, job: Job) -> None:
    """Write the layout of the custom scalars, and the entry of hyperparameters next to losses and scores."""
    layout: dict[str, dict[str, list]] = {"Loss": {}, "Scores": {}}  # the order of the page
    for category, chart, tags in (*_LAYOUT, *_score_charts(job)):
        layout.setdefault(category, {})[chart] = ["Multiline", tags]
    board.add_custom_scalars(layout)
    recipe = dotted_values(recipe_dict(job.recipe))
    values = {key: value if isinstance(value := recipe[key], bool | int | float | str) else "null" for key in _HPARAMS}
    values |= {"precision": job.precision, "zero_stage": job.zero_stage, "world_size": job.ranks.world_size}
    names = ["train/loss", "val/loss"]
    names += _main_scores(job).values()
    writer: Any = board.file_writer  # torch annotates it as None
    for summary in hparams(values, {board_tag(name): 0.0 for name in names}):
        writer.add_summary(summary)


def _main_scores(job: Job) -> dict[str, str]:
    """Return the metric that each benchmark of the recipe is compared by, by the benchmark's name."""
    return {t.name: f"eval/{t.name}/{next(iter(t.benchmark.rules), _CAPTION_SCORE)}" for t in job.scored}


def _score_charts(job: Job) -> Iterator[tuple[str, str, list[str]]]:
    """Yield a chart for each benchmark of the recipe, or one for the scores that `tinygptv-ds eval` adds later.

    They do not share a chart: TensorBoard leaves outliers out of an axis, and of two points in a chart it shows none.
    """
    for name, metric in _main_scores(job).items():
        yield "Scores", name, [re.escape(board_tag(metric))]
    if not job.scored:
        yield "Scores", "strict", [f"{SCORES}/.*/strict"]
