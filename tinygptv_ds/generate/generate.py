"""From prompts to answers, in batches or as a stream of text. Every answer of the package is generated here.

loaded = load_model(Path("my_model"))
template = choose_template(None, loaded.processor.prompt_template, loaded.processor.end_sym)
prompt = Conversation(template).ask("[vqa] what is it?", ["cat.jpg"])
for piece in stream(*loaded, prompt, Generation(max_new_tokens=50)):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.inputs import prompt_tokens
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.sampling import row_seeds
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.generate.stopping import cut
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.detokenize import cleans_up, decode
from tinygptv_ds.processing.processor import TinyGPTVProcessor


def answers(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    prompts: Sequence[Prompt],
    generation: Generation,
    *,
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
    in_step: bool = False,
    as_benchmark: bool = False,
) -> Iterator[str]:
    """Generate the answer to each prompt, in order; an answer does not depend on its batch.

    Spaces are cleaned up as in everything that the original decodes (`detokenize.clean_up`).

    Args:
        model: from `load_model`, or in evaluation mode.
        processor: the processor of the model.
        prompts: from `Conversation.ask`, for example.
        generation: settings.
        batch_size: prompts per batch.
        numbers: the number of each prompt, on which its random draws depend (default: its position in `prompts`).
        in_step: every rank runs the same number of forward passes, as required under ZeRO-3, whose ranks gather
            weights together.
        as_benchmark: drop a first token of id 0 (`!`), as the original does in its benchmarks.

    Raises:
        DataError: placeholders and images do not match, an image cannot be decoded, or a prompt is too long.
    """
    tokenizer = processor.tokenizer
    seeds = row_seeds(generation.seed, range(len(prompts)) if numbers is None else numbers)
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        rows = [
            new_row(model, processor, prompt, generation, seed)
            for prompt, seed in zip(prompts[chunk], seeds[chunk], strict=True)
        ]
        decoder = Decoder(model, processor, in_step=in_step)
        decoder.add(rows)
        while decoder.running():
            decoder.step()
        for row in rows:
            kept = row.ids[1:] if as_benchmark and row.ids[:1] == [0] else row.ids
            yield cut(decode(tokenizer, kept), row.stops, clean=cleans_up(tokenizer))


def stream(
    model: TinyGPTVForConditionalGeneration, processor: TinyGPTVProcessor, prompt: Prompt, generation: Generation
) -> AnswerStream:
    """Generate one answer in pieces of text; with beam search in one piece.

    A stop is never shown, nor part of one. All pieces together equal the answer of `answers`. To end it early, leave
    the loop.

    Args:
        model: from `load_model`; it generates one answer at a time.
        processor: the processor of the model.
        prompt: from `Conversation.ask`, for example.
        generation: settings.

    Raises:
        DataError: placeholders and images do not match, an image cannot be decoded, or the prompt is too long.
    """
    row = new_row(model, processor, prompt, generation, row_seeds(generation.seed, [0])[0])
    return AnswerStream(Decoder(model, processor), row)


def new_row(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    prompt: Prompt,
    generation: Generation,
    seed: int,
) -> Row:
    """Return the row of an answer, without any token of it; raises as `stream` does."""
    ids = prompt_tokens(model, processor, prompt, generation.max_new_tokens)
    return Row(processor, prompt, ids, generation, seed)


class AnswerStream:
    """An answer that is being generated; iterate over it once."""

    def __init__(self, decoder: Decoder, row: Row) -> None:
        self._decoder, self._row = decoder, row

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of text."""
        try:
            self._decoder.add([self._row])
            while True:
                if piece := self._row.piece():
                    yield piece
                if self._row.ended:
                    return
                self._decoder.step()
        finally:
            self._decoder.clear()
            self._row.closed = True

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of the prompt, including images."""
        return len(self._row.prompt_ids)

    @property
    def new_tokens(self) -> int:
        """The number of tokens generated so far."""
        return len(self._row.ids)

    @property
    def finish(self) -> str:
        """Why it ended: "stop" (end token or stop text), "length" (max_new_tokens), "closed"; "" while it runs."""
        return self._row.finish
