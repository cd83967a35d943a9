"""The next token of each row of a batch, greedy or drawn, by the row's own settings and seed.

What a row gets depends on nothing but its own logits, settings, tokens and seed, so a prompt has the same answer in any
batch.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tinygptv_ds.generate.row import Row

_SPREAD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: the seeds of neighboring prompts are far apart


def row_seeds(seed: int | None, numbers: Sequence[int]) -> list[int]:
    """Return one seed for each number; from the system's entropy if `seed` is None."""
    base = secrets.randbits(63) if seed is None else seed
    return [(base + _SPREAD * (number + 1)) % 2**63 for number in numbers]


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: fp32 `[rows, vocabulary]`, changed in place.
        rows: the rows that they belong to.
    """
    drawn: defaultdict[tuple[float, int, float], list[int]] = defaultdict(list)
    for number, (row, scores) in enumerate(zip(rows, logits, strict=True)):
        wanted = row.generation
        if len(row.ids) < wanted.min_new_tokens:
            scores[row.end_ids] = -torch.inf
        if wanted.repetition_penalty != 1:
            _penalize(scores, row.ids, wanted.repetition_penalty)
        if wanted.samples:
            drawn[wanted.temperature, wanted.top_k, wanted.top_p].append(number)
    for settings, numbers in drawn.items():  # together, because sorting for top-p is the same for all
        logits[numbers] = _narrowed(logits[numbers], *settings) - _noise(logits, [rows[number] for number in numbers])
    return logits.argmax(-1).tolist()


def _penalize(scores: Tensor, ids: Sequence[int], penalty: float) -> None:
    """Make the tokens of the answer less likely; those of the prompt do not count."""
    taken = scores[list(ids)]
    scores[list(ids)] = torch.where(taken < 0, taken * penalty, taken / penalty)


def _narrowed(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Apply temperature, top-k and top-p to `[rows, vocabulary]`, in this order."""
    unused = torch.empty(0)  # transformers' processors also take the tokens so far
    scores = TemperatureLogitsWarper(temperature)(unused, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(unused, scores)
    return TopPLogitsWarper(top_p)(unused, scores) if top_p < 1 else scores


def _noise(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return noise; scores minus it are largest where the softmax draws (Gumbel-max trick, Gumbel 1954)."""
    noise = logits.new_empty(len(rows), logits.shape[1])
    for row, drawn in zip(rows, noise, strict=True):
        drawn.exponential_(generator=row.generator(logits.device))
    return noise.log()
