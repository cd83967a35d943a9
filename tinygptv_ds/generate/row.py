"""One answer while it is generated: its prompt, its settings, its tokens so far, and the text that they make."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.inputs import vision_inputs
from tinygptv_ds.generate.logprobs import AnswerLogprobs, TokenLogprob
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.generate.stopping import StopAtText, StreamedText
from tinygptv_ds.processing.detokenize import cleans_up, decode
from tinygptv_ds.processing.processor import TinyGPTVProcessor


class Row:
    """One answer of a batch while it is generated.

    Args:
        processor: the processor of the model.
        prompt: its images are decoded here.
        prompt_ids: its tokens, from `prompt_tokens`.
        generation: settings.
        seed: the seed of its random draws, from `row_seeds`.

    Attributes:
        images: of `vision_inputs`.
        stops: texts that end the answer.
        end_ids: tokens that end the answer.
        ids: the new tokens so far.
        ended: whether the answer is complete.
        closed: whether no client waits for the answer any more; may be set from another thread.

    Raises:
        DataError: an image cannot be decoded.
    """

    def __init__(
        self, processor: TinyGPTVProcessor, prompt: Prompt, prompt_ids: list[int], generation: Generation, seed: int
    ) -> None:
        self.prompt_ids, self.generation, self.seed = prompt_ids, generation, seed
        self.images: dict[str, Tensor] = vision_inputs(processor, [prompt])
        self.stops = prompt.stop if generation.stop is None else generation.stop
        self.end_ids = processor.end_ids(self.stops)
        self.ids: list[int] = []
        self.ended = self.closed = False
        self._tokenizer = processor.tokenizer
        self._stop_text = StopAtText(self._tokenizer, self.stops, generation.min_new_tokens)
        self._shown = StreamedText(self.stops, clean=cleans_up(self._tokenizer))
        self._stopped = False
        self._logprobs = None if generation.logprobs is None else AnswerLogprobs(self._tokenizer, self.stops)
        self._generator: torch.Generator | None = None

    def take(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Append a new token, with its log-probability if `generation` asks for it; no effect on a complete answer."""
        if self.ended:
            return
        self.ids.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.take(logprob)
        self._stopped = token in self.end_ids or self._stop_text.ends(self.ids)
        self.ended = self._stopped or len(self.ids) >= self.generation.max_new_tokens

    def take_all(self, tokens: Iterable[int]) -> None:
        """Take a complete answer; what follows its end is padding."""
        for token in tokens:
            self.take(token)
        self.ended = True

    def piece(self) -> str:
        """Return the text that can be shown in addition to that of earlier calls."""
        if self._shown.stopped:
            return ""
        return self._shown.piece(decode(self._tokenizer, self.ids), complete=self.ended)

    def new_logprobs(self) -> list[TokenLogprob]:
        """Return the log-probabilities, if asked for, that earlier calls have not returned; of its end there are none.

        Their tokens together have the bytes of the text before it is stripped and cleaned up.
        """
        return [] if self._logprobs is None else self._logprobs.settled(complete=self.ended)

    @property
    def finish(self) -> str:
        """Why it ended: "stop" (end token or stop text), "length" (max_new_tokens), "closed"; "" while it runs."""
        if not self.ended:
            return "closed" if self.closed else ""
        return "stop" if self._stopped or self._shown.stopped else "length"

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the source of its random draws, which no other row uses."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator
