"""How a step's samples are distributed over ranks and micro-batches: balanced by cost, the same on every rank.

The stream fixes the samples of a step; this module decides only which rank computes which. A pure function of the
shards' indexes, so every rank computes the whole arrangement independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygptv_ds.config.recipe import Recipe, TextSection
from tinygptv_ds.processing.lengths import estimate_tokens, pool_tokens
from tinygptv_ds.processing.text import IMAGE_TAG

IMAGE_ROWS = 32  # of the published Q-Former; another one moves the balance a little, nothing else
# A patch through the ViT forward, in units of a token through Phi-2 forward and backward (frozen weights need no
# gradient): 1.01 / (2 x 2.78) billion parameters.
_PATCH_COST = 0.18
_PATCH = 14


@dataclass(frozen=True)
class LengthEstimate:
    """What a recipe makes of the lengths in an index (`ShardIndex.lengths`).

    Attributes:
        text: templates and lengths of the recipe.
        image_cost: tokens of the language model that take as long as the vision path of one image.
    """

    text: TextSection
    image_cost: float

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of each sample, float64 `[n]`, from lengths `[n, 3]`."""
        images, question, answer = lengths.astype(np.float64).T
        asked = self._asked(images, question)
        return 1 + asked + self._answered(answer)

    def targets(self, lengths: np.ndarray) -> np.ndarray:
        """Return the target tokens of each sample, float64 `[n]`."""
        return self._answered(lengths[:, 2].astype(np.float64))

    def cost(self, lengths: np.ndarray) -> np.ndarray:
        """Return what each sample costs in time, in tokens of the language model, float64 `[n]`."""
        return self.tokens(lengths) + lengths[:, 0] * self.image_cost

    def _answered(self, answer: np.ndarray) -> np.ndarray:
        return np.minimum(answer + estimate_tokens(self.text.end_sym), self.text.max_txt_len)

    def _asked(self, images: np.ndarray, question: np.ndarray) -> np.ndarray:
        tag = estimate_tokens(IMAGE_TAG.replace("<ImageHere>", "")) if self.text.prompt_template else 0
        template = estimate_tokens(self.text.prompt_template or "")
        pool = pool_tokens(self.text.prompts) if self.text.prompts else 0
        words = np.where(question > 0, question + template, template + pool)
        return np.minimum(words + images * (IMAGE_ROWS + tag), self.text.max_context_len)


def estimate_for(recipe: Recipe) -> LengthEstimate:
    """Return the estimate of a recipe; features and pixels have the same, so that the same samples go together."""
    patches = (recipe.model.image_size // _PATCH) ** 2 + 1
    return LengthEstimate(recipe.text, patches * _PATCH_COST)


@dataclass(frozen=True)
class StepPacking:
    """Where the samples of one step go.

    Attributes:
        place: int64 `[samples]`, micro-batch * world size + rank.
        micro_batches: of each rank, the same for all.
        world_size: ranks.
    """

    place: np.ndarray
    micro_batches: int
    world_size: int

    def share(self, micro: int, rank: int) -> np.ndarray:
        """Return the samples of one micro-batch of one rank, in the order of the stream."""
        return np.flatnonzero(self.place == micro * self.world_size + rank)

    def rank_share(self, rank: int) -> np.ndarray:
        """Return all samples of one rank, in the order of the stream."""
        return np.flatnonzero(self.place % self.world_size == rank)

    def imbalance(self, cost: np.ndarray) -> float:
        """Return the cost of the slowest rank relative to the mean, minus one."""
        loads = np.bincount(self.place % self.world_size, cost, self.world_size)
        return float(loads.max() / loads.mean() - 1)


def pack(
    cost: np.ndarray, tokens: np.ndarray, *, world_size: int, micro_batch_size: int | None, max_tokens: int | None
) -> StepPacking:
    """Assign the samples of a step to micro-batches and ranks.

    Args:
        cost: of each sample, float64 `[n]`; balanced over the micro-batches and over the ranks.
        tokens: of each sample, float64 `[n]`, for `max_tokens`.
        world_size: ranks.
        micro_batch_size: samples of each micro-batch; fewer in some where n is no multiple of all micro-batches.
        max_tokens: instead of it: as few micro-batches as hold at most so many tokens. A sample that is longer
            is alone.
    """
    if micro_batch_size is not None:
        micro_batches = -(-len(cost) // (micro_batch_size * world_size))
        return _dealt(spread(cost, micro_batches * world_size), cost, micro_batches, world_size)
    if max_tokens is None:
        raise ValueError("either micro_batch_size or max_tokens is needed")
    rows = np.minimum(tokens, max_tokens)
    enough = -(-len(cost) // world_size)  # a micro-batch for every sample
    micro_batches = min(enough, max(1, int(np.ceil(rows.sum() / max_tokens / world_size))))
    while (which := _fitting(cost, rows, micro_batches * world_size, max_tokens)) is None:
        micro_batches += 1
    return _dealt(which, cost, micro_batches, world_size)


def _fitting(cost: np.ndarray, rows: np.ndarray, bins: int, max_tokens: int) -> np.ndarray | None:
    """Return a bin for each sample, balanced by cost if that fits, else by tokens; None if neither does."""
    for weight in (cost, rows):
        which = spread(weight, bins)
        if np.bincount(which, rows, bins).max() <= max_tokens or bins >= len(rows):
            return which
    return None


def spread(weight: np.ndarray, bins: int) -> np.ndarray:
    """Return a bin for each weight, int64 `[n]`: sums about equal, and counts that differ by one at most.

    Greedy in rounds: each round gives every bin one more, the heaviest of those left to the lightest bin.
    """
    which = np.empty(len(weight), dtype=np.int64)
    loads = np.zeros(bins)
    heaviest_first = np.argsort(-weight, kind="stable")
    for start in range(0, len(weight), bins):
        items = heaviest_first[start : start + bins]
        lightest_first = np.argsort(loads, kind="stable")[: len(items)]
        which[items] = lightest_first
        loads[lightest_first] += weight[items]
    return which


def _dealt(which: np.ndarray, cost: np.ndarray, micro_batches: int, world_size: int) -> StepPacking:
    """Map bins to (micro-batch, rank): bins of one micro-batch cost about the same, and so do the ranks in total."""
    loads = np.bincount(which, cost, micro_batches * world_size)
    heaviest_first = np.argsort(-loads, kind="stable").reshape(micro_batches, world_size)
    place = np.empty(micro_batches * world_size, dtype=np.int64)
    of_ranks = np.zeros(world_size)
    for micro, bins in enumerate(heaviest_first):
        ranks = np.argsort(of_ranks, kind="stable")
        place[bins] = micro * world_size + ranks
        of_ranks[ranks] += loads[bins]
    return StepPacking(place[which], micro_batches, world_size)
