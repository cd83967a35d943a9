"""Texts that end an answer, of any number of tokens: they end its generation and are never shown in a stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from tinygptv_ds.processing.detokenize import clean_up, decode, settled_length

_INCOMPLETE = "\ufffd"  # what a tokenizer returns for a character of which bytes are still missing


def cut(text: str, stops: Sequence[str], *, clean: bool = False) -> str:
    """Return the text before the first stop, without surrounding white space; `clean` cleans up its spaces."""
    before = text[: first_stop(text, stops)]
    return (clean_up(before) if clean else before).strip()


def first_stop(text: str, stops: Sequence[str]) -> int:
    """Return where the first stop begins, or the length of a text without one."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=len(text))


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop."""
    longest = max(map(len, stops), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class StreamedText:
    """A growing text in pieces that can be shown: never part of a stop, half a character, or trailing white space.

    All pieces together equal `cut` of the whole text.

    Args:
        stops: texts that end it.
        clean: clean up its spaces; what the next characters may change is then held back, too.
    """

    def __init__(self, stops: Sequence[str], *, clean: bool = False) -> None:
        self._stops = stops
        self._clean = clean
        self._shown = ""
        self.stopped = False

    def piece(self, text: str, *, complete: bool = False) -> str:
        """Return what can be shown in addition, given the whole text so far and whether it is complete."""
        if not complete:
            text = text.rstrip(_INCOMPLETE)
        at = until = first_stop(text, self._stops)
        if not complete:  # a longer stop may have begun before the one found
            until = min(at, len(text) - possible_stop(text, self._stops))
        self.stopped = self.stopped or until == at < len(text)
        seen = text[:until]
        if self._clean:
            seen = clean_up(seen if complete or self.stopped else seen[: settled_length(seen)])
        seen = seen.strip()
        new = seen[len(self._shown) :]
        self._shown += new
        return new


class StopAtText(StoppingCriteria):
    """Ends each row independently as soon as its new text holds a stop, however that is tokenized.

    Args:
        tokenizer: the tokenizer of the answers.
        stops: texts that end a row.
        min_new_tokens: no row ends before this many new tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], min_new_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._min_new_tokens = min_new_tokens
        # A token is at least one byte, and the last one may begin anywhere in the stop.
        self._tail = max((len(stop.encode()) for stop in stops), default=0)

    def ends(self, ids: Sequence[int]) -> bool:
        """Return whether an answer of these new tokens has just come to a stop."""
        if not self._tail or len(ids) < max(self._min_new_tokens, 1):
            return False
        text = decode(self._tokenizer, ids[-self._tail :])
        return any(stop in text for stop in self._stops)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return bool `[B]`; `input_ids` holds only new tokens, as in generation from embeddings."""
        return torch.tensor([self.ends(row) for row in input_ids.tolist()], device=input_ids.device)
