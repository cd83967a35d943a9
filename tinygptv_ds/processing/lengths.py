"""Estimated token counts of records, by which batches are balanced: no tokenizer and no random draw is needed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from tinygptv_ds.processing.text import clean_caption, load_prompts

# The pieces that GPT-2's tokenizer (Phi-2's) cuts a text into before it merges bytes: mostly one token each.
_PIECES = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+")


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text under GPT-2's vocabulary, within about 10 % for English, boxes and task tokens.

    A piece beyond ASCII takes more than one token: half a token a byte is added.
    """
    beyond = 0 if text.isascii() else len(text.encode("utf-8", "replace")) - sum(c < "\x80" for c in text)
    return len(_PIECES.findall(text)) + beyond // 2


def text_lengths(record: dict[str, Any]) -> tuple[int, int]:
    """Estimate (tokens of the first question, tokens of all that follows), without images and templates.

    Where training draws among several texts, their mean counts. A record that cannot be used counts as empty.
    """
    if "caption" in record:
        return 0, _mean_tokens(record["caption"], clean="answer" in _listed(record.get("clean", ["answer"])))
    cleaned = _listed(record.get("clean", []))
    if "conversation" in record:
        turns = [_mean_tokens(text, clean=False) for turn in _listed(record["conversation"]) for text in _listed(turn)]
        return (turns[0], sum(turns[1:])) if turns else (0, 0)
    question = _mean_tokens(record.get("text", ""), clean="text" in cleaned) + _pool_tokens(record.get("pool"))
    return question, _mean_tokens(record.get("answer", ""), clean="answer" in cleaned)


def _mean_tokens(value: object, *, clean: bool) -> int:
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    counts = [estimate_tokens(clean_caption(text) if clean else text) for text in texts]
    return round(sum(counts) / len(counts)) if counts else 0


@lru_cache(maxsize=64)
def pool_tokens(name: str) -> int:
    """Return the mean token count of the entries of a pool of prompts.yaml; 0 for an unknown pool."""
    entries = load_prompts().pools.get(name, ())
    return round(sum(map(estimate_tokens, entries)) / len(entries)) if entries else 0


def _pool_tokens(pool: object) -> int:
    return pool_tokens(pool) if isinstance(pool, str) else 0


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
