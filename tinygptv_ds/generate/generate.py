"""From prompts to answers, in batches or as a stream of text. Every answer of the package is generated here.

loaded = load_model(Path("my_model"))
template = choose_template(None, loaded.processor.prompt_template, loaded.processor.end_sym)
prompt = Conversation(template).ask("[vqa] what is it?", ["cat.jpg"])
for piece in stream(*loaded, prompt, Generation(max_new_tokens=50)):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.sampling import row_seeds, sampling_processors
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.generate.stopping import StopAtText, StopOnRequest, StreamedText, cut
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.detokenize import cleans_up, decode
from tinygptv_ds.processing.processor import ImageInput, TinyGPTVProcessor


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
    seeds = row_seeds(generation.seed, range(len(prompts)) if numbers is None else numbers)
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        batch = _Batch(model, processor, prompts[chunk], generation, seeds[chunk], in_step=in_step)
        for ids, stops in zip(batch.generate().tolist(), batch.stops, strict=True):
            kept = ids[1:] if as_benchmark and ids[:1] == [0] else ids
            yield cut(decode(processor.tokenizer, kept), stops, clean=cleans_up(processor.tokenizer))


def stream(
    model: TinyGPTVForConditionalGeneration, processor: TinyGPTVProcessor, prompt: Prompt, generation: Generation
) -> AnswerStream:
    """Generate one answer in pieces of text; with beam search in one piece.

    A stop is never shown, nor part of one. All pieces together equal the answer of `answers`. To end it early, leave
    the loop and call `close`.

    Args:
        model: from `load_model`; it generates one answer at a time.
        processor: the processor of the model.
        prompt: from `Conversation.ask`, for example.
        generation: settings.

    Raises:
        DataError: placeholders and images do not match, an image cannot be decoded, or the prompt is too long.
    """
    return AnswerStream(_Batch(model, processor, [prompt], generation, row_seeds(generation.seed, [0])))


def prompt_tokens(
    model: TinyGPTVForConditionalGeneration, processor: TinyGPTVProcessor, prompt: Prompt, new_tokens: int
) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        DataError: placeholders and images do not match, or the prompt with its answer exceeds the model's context.
    """
    images = len(prompt.images)
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


def describe(prompt: Prompt, processor: TinyGPTVProcessor) -> str:
    """Return the exact text of a prompt, its length in tokens, and what ends the answer."""
    images = len(prompt.images)
    tokens = len(processor.row(prompt.parts, images, add_bos_token=prompt.add_bos_token))
    begin = ", BOS token in front" if prompt.add_bos_token else ""
    seen = f", {images * processor.num_query_tokens} of them for {images} image(s)" if images else ""
    stops = " ".join(map(repr, prompt.stop))
    return f"--- prompt: {tokens} tokens{seen}{begin}; stops at {stops}\n{prompt.text}\n---"


class _Batch:
    """Prompts as embeddings, with the settings of their answers."""

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        processor: TinyGPTVProcessor,
        prompts: Sequence[Prompt],
        generation: Generation,
        seeds: Sequence[int],
        *,
        in_step: bool = False,
    ) -> None:
        rows = [prompt_tokens(model, processor, prompt, generation.max_new_tokens) for prompt in prompts]
        images = vision_inputs(processor, prompts)
        if in_step and not images:  # other ranks' prompts may have images: the ViT must run here, too
            images["pixel_values"] = torch.zeros(0, 3, processor.image_size, processor.image_size, dtype=torch.uint8)
        inputs = {name: tensor.to(model.device) for name, tensor in processor.pad(rows).items()}
        with torch.no_grad():
            images = {name: tensor.to(model.device) for name, tensor in images.items()}
            self.embeds = model.embed(inputs["input_ids"], **images)
        self.model, self.processor, self.generation, self.seeds = model, processor, generation, seeds
        self.mask, self._in_step = inputs["attention_mask"], in_step
        self.lengths = [len(row) for row in rows]
        self.stops = [prompt.stop if generation.stop is None else generation.stop for prompt in prompts]

    def generate(self, streamer: BaseStreamer | None = None, cancel: StopOnRequest | None = None) -> Tensor:
        """Return new tokens `[B, T]`, padded on the right with the end token."""
        wanted, tokenizer = self.generation, self.processor.tokenizer
        shared = sorted(set.intersection(*map(set, self.stops)))  # the others are cut from the finished text
        beams = wanted.num_beams > 1
        steps = LogitsProcessorList()
        if wanted.repetition_penalty != 1:  # generating from embeddings, it sees only new tokens, not the prompt's
            steps.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
        if wanted.samples and not beams:
            steps.extend(sampling_processors(wanted, self.seeds, self.model.device))
        config = GenerationConfig(
            max_new_tokens=wanted.max_new_tokens,
            min_new_tokens=wanted.min_new_tokens or None,
            do_sample=wanted.samples and beams,
            temperature=wanted.temperature if wanted.samples and beams else None,
            top_p=wanted.top_p if wanted.samples and beams else None,
            top_k=wanted.top_k if wanted.samples and beams else None,
            num_beams=wanted.num_beams,
            length_penalty=wanted.length_penalty if beams else None,
            repetition_penalty=1.0,  # applied by the processor above
            eos_token_id=self._end_tokens(shared),
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        criteria = [StopAtText(tokenizer, shared, wanted.min_new_tokens), *([cancel] if cancel else [])]
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


def vision_inputs(processor: TinyGPTVProcessor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return the images of all prompts as `pixel_values` or `image_features`; empty without images."""
    pixels: list[ImageInput] = []
    features: list[Tensor] = []
    for image in (image for prompt in prompts for image in prompt.images):
        if isinstance(image, Tensor):
            features.append(image)
        else:
            pixels.append(image)
    if features:
        return {"image_features": torch.stack(features)}
    stacked = processor.pixels(pixels)
    return {} if stacked is None else {"pixel_values": stacked}


class AnswerStream:
    """An answer that is being generated; iterate over it once.

    Attributes:
        prompt_tokens: tokens of the prompt, including images.
        new_tokens: tokens generated so far.
        finish: why it ended: "stop" (end token or stop text), "length" (max_new_tokens), "closed"; "" while it runs.
    """

    def __init__(self, batch: _Batch) -> None:
        self.prompt_tokens = batch.lengths[0]
        self.new_tokens = 0
        self.finish = ""
        self._batch = batch
        self._cancel = StopOnRequest()
        self._queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="answer", daemon=True)

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of text."""
        clean = cleans_up(self._batch.processor.tokenizer)
        shown, ids = StreamedText(self._batch.stops[0], clean=clean), list[int]()
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
        """End the answer now; wait until the current token is done."""
        self._cancel.requested = True
        if self._thread.is_alive():
            self._thread.join()
        self.finish = self.finish or "closed"

    def _text(self, ids: list[int]) -> str:
        return decode(self._batch.processor.tokenizer, ids)

    def _ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] == self._batch.processor.tokenizer.eos_token_id

    def _work(self) -> None:
        """Generate and pass on the tokens; runs in the thread."""
        try:
            if self._batch.generation.num_beams > 1:
                for token in self._batch.generate(cancel=self._cancel)[0].tolist():
                    self._queue.put(token)
            else:
                self._batch.generate(_Queued(self._queue), self._cancel)
        except BaseException as error:
            self._queue.put(error)
        self._queue.put(None)


class _Queued(BaseStreamer):
    """Puts new tokens into a queue; the first call has the prompt's ids, of which embeddings have none."""

    def __init__(self, queue: SimpleQueue) -> None:
        self._queue = queue

    def put(self, value: Tensor) -> None:
        """Add tokens `[1]`."""
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        """Do nothing: the thread itself reports the end."""
