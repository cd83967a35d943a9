"""The decoding loop: answers are generated together, token by token.

Rows join the batch between two steps and leave it when they end, so a batch may hold rows of any age, length and
settings. All rows end at the last column of the cache; what a row lacks of the longest one is padding on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from tinygptv_ds.generate.beam_search import beam_search
from tinygptv_ds.generate.logprobs import RawScores
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.sampling import next_tokens
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor


class Decoder:
    """A batch of answers that are being generated; for one thread.

    Keys and values take memory for as many tokens as the longest row has, for each row.

    Args:
        model: in evaluation mode.
        processor: the processor of the model.
        in_step: every rank runs the same number of forward passes, as required under ZeRO-3, whose ranks gather
            weights together. Rows then stay in the batch until all rows of all ranks have ended.

    Attributes:
        rows: those in the batch.
    """

    def __init__(
        self, model: TinyGPTVForConditionalGeneration, processor: TinyGPTVProcessor, *, in_step: bool = False
    ) -> None:
        self.rows: list[Row] = []
        self._model, self._processor, self._in_step = model, processor, in_step
        self._cache: Cache | None = None
        self._lengths: list[int] = []  # tokens of each row in the cache

    @torch.no_grad()
    def add(self, rows: Sequence[Row]) -> None:
        """Add at least one row; each gets its first token, or with beam search its whole answer.

        All must have the same number of beams. After an error the batch is as before.
        """
        self._remove_ended()
        inputs = {name: each.to(self._model.device) for name, each in self._inputs(rows).items()}
        mask = inputs.pop("attention_mask")
        if rows[0].generation.num_beams > 1:
            embeds = self._model.embed(**inputs)
            found = beam_search(self._model, self._processor, rows, embeds, mask, in_step=self._in_step)
            for row, tokens in zip(rows, found, strict=True):
                row.take_all(tokens)
            return
        output = self._model(**inputs, attention_mask=mask, use_cache=True, logits_to_keep=1)
        self._cache = output.cache if self._cache is None else _joined(self._cache, output.cache)
        self.rows += rows
        self._lengths += [len(row.prompt_ids) for row in rows]
        for row in rows:
            row.images = {}  # of no further use
        self._take(output.logits[:, -1], rows)

    @torch.no_grad()
    def step(self) -> None:
        """Generate the next token of every row; rows that are closed leave before, and those that end after it."""
        self._remove_ended()
        if not self.rows:
            return
        device = self._model.device
        self._lengths = [length + 1 for length in self._lengths]
        columns = max(self._lengths)
        starts = columns - torch.tensor(self._lengths, device=device)
        mask = (torch.arange(columns, device=device) >= starts[:, None]).long()
        last = torch.tensor([row.ids[-1:] for row in self.rows], device=device)
        output = self._model(last, attention_mask=mask, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._take(output.logits[:, -1], self.rows)

    def running(self) -> bool:
        """Return whether any row needs another token; with `in_step`, of any rank."""
        own = any(not row.ended for row in self.rows)
        if not self._in_step:
            return own
        anywhere = torch.tensor(float(own), device=self._model.device)
        torch.distributed.all_reduce(anywhere)
        return bool(anywhere > 0)

    def clear(self) -> None:
        """Remove all rows."""
        self.rows, self._lengths, self._cache = [], [], None

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        images: dict[str, list[Tensor]] = {}
        for row in rows:
            for name, each in row.images.items():
                images.setdefault(name, []).append(each)
        stacked = {name: torch.cat(each) for name, each in images.items()}
        if self._in_step and not stacked:  # other ranks' prompts may have images: the ViT must run here, too
            size = self._processor.image_size
            stacked["pixel_values"] = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return self._processor.pad([row.prompt_ids for row in rows]) | stacked

    def _take(self, logits: Tensor, rows: Sequence[Row]) -> None:
        scores = RawScores(logits, [row.generation.logprobs for row in rows])  # before the next line changes them
        tokens = next_tokens(logits, rows)
        for row, token, logprob in zip(rows, tokens, scores.logprobs(tokens), strict=True):
            row.take(token, logprob)
        self._remove_ended()

    def _remove_ended(self) -> None:
        """Remove rows without further tokens from the batch, and columns that only these needed from the cache."""
        kept = [number for number, row in enumerate(self.rows) if not (row.ended or row.closed)]
        if self._in_step or len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        self.rows = [self.rows[number] for number in kept]
        self._lengths = [self._lengths[number] for number in kept]
        assert self._cache is not None
        _select(self._cache, torch.tensor(kept, device=self._model.device), max(self._lengths))


class _Layer(Protocol):
    """Keys and values of one layer, both `[rows, heads, columns, head_dim]`."""

    keys: Tensor
    values: Tensor


def _layers(cache: Cache) -> list[_Layer]:
    return cast(list[_Layer], cache.layers)


def _joined(cache: Cache, new: Cache) -> Cache:
    """Append the rows of `new` to those of `cache`, both padded on the left to the longer one."""
    columns = max(cache.get_seq_length(), new.get_seq_length())
    for layer, joining in zip(_layers(cache), _layers(new), strict=True):
        layer.keys = torch.cat([_padded(layer.keys, columns), _padded(joining.keys, columns)])
        layer.values = torch.cat([_padded(layer.values, columns), _padded(joining.values, columns)])
    return cache


def _padded(x: Tensor, columns: int) -> Tensor:
    return F.pad(x, (0, 0, columns - x.shape[-2], 0))


def _select(cache: Cache, rows: Tensor, columns: int) -> None:
    """Keep these rows and the last `columns` columns."""
    for layer in _layers(cache):
        layer.keys = layer.keys[:, :, -columns:].index_select(0, rows)
        layer.values = layer.values[:, :, -columns:].index_select(0, rows)
