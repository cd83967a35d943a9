"""Log-probabilities of the tokens of an answer, as the model itself gives them.

They are of its distribution before temperature, penalties, top-k and top-p, as in OpenAI's API and in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tinygptv_ds.generate.settings import MAX_LOGPROBS
from tinygptv_ds.generate.stopping import first_stop, possible_stop


@dataclass(frozen=True)
class Candidate:
    """A token and its log-probability."""

    id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Candidate):
    """A token of an answer; `likeliest` are the likeliest ones at its place, in order."""

    likeliest: tuple[Candidate, ...]


class RawScores:
    """The logits of those rows of a batch that ask for log-probabilities.

    Args:
        logits: fp32 `[rows, vocabulary]`, the model's own; they may be changed later.
        counts: of how many of the likeliest tokens each row asks for them, at most `MAX_LOGPROBS`; None: of no token.
    """

    def __init__(self, logits: Tensor, counts: Sequence[int | None]) -> None:
        self._asking = {number: count for number, count in enumerate(counts) if count is not None}
        self._rows = len(counts)
        self._scores = logits[list(self._asking)] if self._asking else None

    def logprobs(self, tokens: Sequence[int]) -> Sequence[TokenLogprob | None]:
        """Return the log-probability of each row's new token; None where it is not asked for."""
        if self._scores is None:
            return [None] * self._rows
        scores = self._scores.log_softmax(-1)
        asked = scores.new_tensor([tokens[number] for number in self._asking], dtype=torch.long)
        chosen = scores.gather(1, asked[:, None])[:, 0].tolist()
        top = scores.topk(min(MAX_LOGPROBS, scores.shape[1]))  # as many for every row: equal ones are in one order
        found: list[TokenLogprob | None] = [None] * self._rows
        for place, (number, count) in enumerate(self._asking.items()):
            ids, values = top.indices[place, :count].tolist(), top.values[place, :count].tolist()
            found[number] = TokenLogprob(tokens[number], chosen[place], tuple(map(Candidate, ids, values)))
        return found


class TokenBytes:
    """The bytes of each token of a byte-level tokenizer, such as Phi's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def __call__(self, token: int) -> bytes | None:
        """Return the bytes of a token; None for an entry of the vocabulary that is no token of the tokenizer."""
        if token in self._added:
            return self._added[token].encode()
        if token >= len(self._tokenizer):
            return None
        return bytes(self._byte_of[each] for each in self._tokenizer.convert_ids_to_tokens(token))


class AnswerLogprobs:
    """Those of an answer that is being generated, without those of what ends it.

    Args:
        tokenizer: the tokenizer of the answer.
        stops: texts that end it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._bytes, self._special = TokenBytes(tokenizer), frozenset(tokenizer.all_special_ids)
        self._stops = [stop.encode().decode("latin-1") for stop in stops]
        self._text = ""  # a character a byte
        self._starts: list[int] = []
        self._waiting: list[TokenLogprob] = []

    def take(self, found: TokenLogprob) -> None:
        """Append those of a new token."""
        self._waiting.append(found)
        self._starts.append(len(self._text))
        if found.id not in self._special:  # of which the answer's text has nothing, either
            self._text += (self._bytes(found.id) or b"").decode("latin-1")

    def settled(self, *, complete: bool) -> list[TokenLogprob]:
        """Return those that earlier calls have not returned, of tokens that begin before any stop.

        Args:
            complete: whether the answer is; otherwise tokens that may be the beginning of a stop are held back.
        """
        until = first_stop(self._text, self._stops)
        if not complete:
            until = min(until, len(self._text) - possible_stop(self._text, self._stops))
        count = sum(start < until for start in self._starts)
        settled = self._waiting[:count]
        del self._waiting[:count], self._starts[:count]
        return settled
