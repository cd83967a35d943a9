"""Where an answer ends: at texts of any number of tokens, while it is generated and while it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

_HALF = "\ufffd"  # what a tokenizer gives for a character of which bytes are still missing


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops, without white space around it."""
    return text[: _first(text, stops)].strip()


def _first(text: str, stops: Sequence[str]) -> int:
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=len(text))


class Shown:
    """What of a growing text may be shown: never a part of a stop, half a character, or white space at the end.

    All pieces together are `cut` of the whole text.

    Args:
        stops: texts that end it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._shown = ""
        self.stopped = False

    def piece(self, text: str, *, complete: bool = False) -> str:
        """What can be shown now that the text is `text`, or `complete` at that."""
        if not complete:
            text = text.rstrip(_HALF)
        at = until = _first(text, self._stops)
        if not complete:  # a longer stop may have begun before the one that is there
            until = min(at, len(text) - self._open(text))
        self.stopped = self.stopped or until == at < len(text)
        seen = text[:until].strip()
        new = seen[len(self._shown) :]
        self._shown += new
        return new

    def _open(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop."""
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class StopAtText(StoppingCriteria):
    """Ends each row of a batch by itself as soon as its new text holds a stop, however that came in tokens.

    Args:
        tokenizer: of the answers.
        stops: texts.
        least: no row ends before so many new tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], least: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._least = least
        # A token is a byte at least, and the last one may begin anywhere in the stop.
        self._tail = max((len(stop.encode()) for stop in stops), default=0)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Bool `[B]`; `input_ids` are new tokens alone, as generation from embeddings gives them."""
        if not self._tail or input_ids.shape[1] < max(self._least, 1):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = self._tokenizer.batch_decode(input_ids[:, -self._tail :], skip_special_tokens=True)
        found = [any(stop in text for stop in self._stops) for text in tails]
        return torch.tensor(found, device=input_ids.device)


class StopWhenTold(StoppingCriteria):
    """Ends all rows once `told` is set."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Bool `[B]`."""
        return torch.full((len(input_ids),), self.told, device=input_ids.device)
