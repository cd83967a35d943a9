"""Sampling that depends only on each row's own seed, so that a prompt has the same answer in any batch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tinygptv_ds.generate.settings import Generation

_SPREAD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: the seeds of neighboring prompts are far apart


def row_seeds(seed: int | None, numbers: Sequence[int]) -> list[int]:
    """Return one seed for each number; from the system's entropy if `seed` is None."""
    base = secrets.randbits(63) if seed is None else seed
    return [(base + _SPREAD * (number + 1)) % 2**63 for number in numbers]


def sampling_processors(generation: Generation, seeds: Sequence[int], device: torch.device) -> list[LogitsProcessor]:
    """Return the processors that turn greedy search into sampling: temperature, top-k, top-p, and noise per row."""
    narrow: list[LogitsProcessor] = [TemperatureLogitsWarper(generation.temperature)]
    if generation.top_k:
        narrow.append(TopKLogitsWarper(generation.top_k))
    if generation.top_p < 1:
        narrow.append(TopPLogitsWarper(generation.top_p))
    return [*narrow, _RowNoise(seeds, device)]


class _RowNoise(LogitsProcessor):
    """Adds Gumbel noise, with which the largest score is a sample of the softmax (Gumbel-max trick, Gumbel 1954)."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map scores `[B, vocabulary]` to noisy ones, fp32."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()
