"""From prompts with images to answers: in batches, or as a stream of text.

model, processor = load_model(Path("my_model"))
conversation = Conversation(choose_template(None, processor.prompt_template, processor.end_sym))
prompt = conversation.ask("[vqa] what is it?", ["cat.jpg"])
for piece in stream(model, processor, prompt, conversation.images, Generation(max_new_tokens=50)):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.load import load_model
from tinygptv_ds.generate.sampling import drawn, row_seeds
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.generate.stopping import Shown, StopAtText, StopWhenTold, cut
from tinygptv_ds.generate.templates import Prompt
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import Image, TinyGPTVProcessor

__all__ = ["Answer", "answers", "describe", "load_model", "prompt_row", "stream"]

Question = tuple[str | Prompt, Sequence[Image]]  # a prompt with `<ImageHere>` and its images


def answers(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    questions: Sequence[Question],
    *,
    stop: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    add_bos_token: bool = False,
    generation: Generation | None = None,
    numbers: Sequence[int] | None = None,
    in_step: bool = False,
) -> Iterator[str]:
    """Answers, one per question, in order; what a question is answered does not depend on its batch.

    Args:
        model: from `load_model`.
        processor: from `load_model`.
        questions: whole prompts with `<ImageHere>`, and their images.
        stop: ends an answer; the text before it is kept. "###" in stages 3 and 4, "" for the end token alone. None:
            what `generation` says.
        max_new_tokens: at most (default: what `generation` says).
        batch_size: prompts at once.
        add_bos_token: put the BOS token in front of prompts that are plain text, as in training.
        generation: all other settings (default: greedy, 20 tokens).
        numbers: which question each is, where that is not its place here; draws depend on it.
        in_step: every rank generates as often and as long, as ranks of ZeRO-3 must, which gather weights together.

    Raises:
        DataError: placeholders and images do not match, an image cannot be decoded, or a prompt is too long.
    """
    generation = generation or Generation(max_new_tokens=20)
    if max_new_tokens is not None:
        generation = replace(generation, max_new_tokens=max_new_tokens)
    if stop is not None:
        generation = replace(generation, stop=(stop,) if stop else ())
    asked = [(as_prompt(prompt, processor, add_bos_token), images) for prompt, images in questions]
    seeds = row_seeds(generation.seed, range(len(asked)) if numbers is None else numbers)
    for first in range(0, len(asked), batch_size):
        chunk = slice(first, first + batch_size)
        batch = _Batch(model, processor, asked[chunk], generation, seeds[chunk], in_step=in_step)
        texts = processor.tokenizer.batch_decode(batch.generate(), skip_special_tokens=True)
        yield from (cut(text, stops) for text, stops in zip(texts, batch.stops, strict=True))


def stream(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    prompt: str | Prompt,
    images: Sequence[Image] = (),
    generation: Generation | None = None,
    *,
    add_bos_token: bool = False,
) -> Answer:
    """One answer in pieces of text as it is generated; with beams in one piece.

    A stop is never shown, nor a part of one. Together the pieces are the answer of `answers`. To end it early, leave
    the loop and call `close`.

    Args:
        model: from `load_model`; one answer at a time is generated on it.
        processor: from `load_model`.
        prompt: a whole prompt with `<ImageHere>`.
        images: one for each `<ImageHere>`.
        generation: settings (default: greedy).
        add_bos_token: put the BOS token in front of a prompt that is plain text, as in training.

    Raises:
        DataError: placeholders and images do not match, an image cannot be decoded, or the prompt is too long.
    """
    generation = generation or Generation()
    question = (as_prompt(prompt, processor, add_bos_token), images)
    return Answer(_Batch(model, processor, [question], generation, row_seeds(generation.seed, [0])))


def as_prompt(prompt: str | Prompt, processor: TinyGPTVProcessor, add_bos_token: bool) -> Prompt:
    """Plain text as a prompt of one part that the checkpoint's end symbol stops."""
    return Prompt((prompt,), add_bos_token, (processor.end_sym,)) if isinstance(prompt, str) else prompt


def prompt_row(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    prompt: Prompt,
    images: int,
    new_tokens: int,
) -> list[int]:
    """Token ids of a prompt.

    Raises:
        DataError: placeholders and images do not match, or the prompt with its answer exceeds the model's context.
    """
    row = processor.row(prompt.parts, images, add_bos_token=prompt.add_bos_token)
    context = model.config.text_config.max_position_embeddings
    if len(row) + new_tokens > context:
        raise DataError(
            f"the prompt of {len(row)} tokens ({images * processor.num_query_tokens} of them for {images} "
            f"image(s)) and an answer of up to {new_tokens} exceed the model's {context}; shorten the prompt, "
            "begin a new conversation, or lower max_new_tokens"
        )
    if not row:
        raise DataError("the prompt is empty; give it words or an image")
    return row


def describe(prompt: Prompt, processor: TinyGPTVProcessor, images: int) -> str:
    """A prompt to the letter, its length in tokens, and what ends the answer."""
    tokens = len(processor.row(prompt.parts, images, add_bos_token=prompt.add_bos_token))
    begin = ", BOS token in front" if prompt.add_bos_token else ""
    seen = f", {images * processor.num_query_tokens} of them for {images} image(s)" if images else ""
    stops = " ".join(map(repr, prompt.stop))
    return f"--- prompt: {tokens} tokens{seen}{begin}; stops at {stops}\n{prompt.text}\n---"


class _Batch:
    """Prompts as embeddings, and how they are to be continued."""

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        processor: TinyGPTVProcessor,
        asked: Sequence[tuple[Prompt, Sequence[Image]]],
        generation: Generation,
        seeds: Sequence[int],
        *,
        in_step: bool = False,
    ) -> None:
        rows = [prompt_row(model, processor, p, len(seen), generation.max_new_tokens) for p, seen in asked]
        pixels = processor.pixels([image for _, images in asked for image in images])
        if in_step and pixels is None:  # the others' may have images: the ViT has to run here too
            pixels = torch.zeros(0, 3, processor.image_size, processor.image_size, dtype=torch.uint8)
        inputs = {name: tensor.to(model.device) for name, tensor in processor.pad(rows).items()}
        with torch.no_grad():
            seen = None if pixels is None else pixels.to(model.device)
            self.embeds = model.embed(inputs["input_ids"], seen)
        self.model, self.processor, self.generation, self.seeds = model, processor, generation, seeds
        self.mask, self._in_step = inputs["attention_mask"], in_step
        self.lengths = [len(row) for row in rows]
        self.stops = [prompt.stop if generation.stop is None else generation.stop for prompt, _ in asked]

    def generate(self, streamer: BaseStreamer | None = None, told: StopWhenTold | None = None) -> Tensor:
        """New tokens `[B, T]`, padded on the right with the end token."""
        wanted, tokenizer = self.generation, self.processor.tokenizer
        shared = sorted(set.intersection(*map(set, self.stops)))  # others are cut when the text is there
        beams = wanted.num_beams > 1
        steps = LogitsProcessorList()
        if (
            wanted.repetition_penalty != 1
        ):  # from embeddings, so it sees what is new alone: no word or image asked about
            steps.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
        if wanted.samples and not beams:
            steps.extend(drawn(wanted, self.seeds, self.model.device))
        config = GenerationConfig(
            max_new_tokens=wanted.max_new_tokens,
            min_new_tokens=wanted.min_new_tokens or None,
            do_sample=wanted.samples and beams,
            temperature=wanted.temperature if wanted.samples and beams else None,
            top_p=wanted.top_p if wanted.samples and beams else None,
            top_k=wanted.top_k if wanted.samples and beams else None,
            num_beams=wanted.num_beams,
            length_penalty=wanted.length_penalty if beams else None,
            repetition_penalty=1.0,  # below, as a processor of its own
            eos_token_id=self._end_tokens(shared),
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        criteria = [StopAtText(tokenizer, shared, wanted.min_new_tokens), *([told] if told else [])]
        with torch.random.fork_rng(enabled=beams and wanted.samples):
            if beams and wanted.samples:
                torch.manual_seed(self.seeds[0])
            return self.model.generate(
                inputs_embeds=self.embeds,
                attention_mask=self.mask,
                generation_config=config,
                logits_processor=steps,
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
                synced_gpus=self._in_step,
            )

    def _end_tokens(self, stops: Sequence[str]) -> list[int]:
        ends = {number for stop in stops for number in self.processor.stop_ids(stop)}
        return sorted(ends | {self.processor.tokenizer.eos_token_id})


class Answer:
    """An answer under way, to be iterated over once.

    Attributes:
        prompt_tokens: tokens of the prompt, images included.
        new_tokens: so far.
        finish: why it ended: "stop" (end token or stop), "length" (max_new_tokens), "closed"; "" while it goes on.
    """

    def __init__(self, batch: _Batch) -> None:
        self.prompt_tokens = batch.lengths[0]
        self.new_tokens = 0
        self.finish = ""
        self._batch = batch
        self._told = StopWhenTold()
        self._queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="answer", daemon=True)

    def __iter__(self) -> Iterator[str]:
        """The pieces of text."""
        shown, ids = Shown(self._batch.stops[0]), []
        self._thread.start()
        try:
            while (token := self._queue.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                ids.append(token)
                self.new_tokens = len(ids)
                if not shown.stopped and (piece := shown.piece(self._text(ids))):
                    yield piece
            if not shown.stopped and (piece := shown.piece(self._text(ids), complete=True)):
                yield piece
            full = len(ids) >= self._batch.generation.max_new_tokens
            self.finish = "length" if full and not shown.stopped and not self._ended(ids) else "stop"
        finally:
            self.close()

    def close(self) -> None:
        """End it now; waits for the token under way."""
        self._told.told = True
        if self._thread.is_alive():
            self._thread.join()
        self.finish = self.finish or "closed"

    def _text(self, ids: list[int]) -> str:
        return self._batch.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] == self._batch.processor.tokenizer.eos_token_id

    def _work(self) -> None:
        """In the thread: generate, and pass the tokens on."""
        try:
            if self._batch.generation.num_beams > 1:
                for token in self._batch.generate(told=self._told)[0].tolist():
                    self._queue.put(token)
            else:
                self._batch.generate(_Queued(self._queue), self._told)
        except BaseException as error:
            self._queue.put(error)
        self._queue.put(None)


class _Queued(BaseStreamer):
    """Puts new tokens into a queue; the first call gives the prompt's ids, of which embeddings have none."""

    def __init__(self, queue: SimpleQueue) -> None:
        self._queue = queue

    def put(self, value: Tensor) -> None:
        """Tokens `[1]`."""
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        """The worker says so itself."""
