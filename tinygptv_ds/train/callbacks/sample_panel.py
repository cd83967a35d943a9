"""The panel on TensorBoard: images, prompts, the true and the generated answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.tensorboard import SummaryWriter

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.sample import Sample, Tokens, load_sample
from tinygptv_ds.data.shards.reader import SampleError, ShardReader
from tinygptv_ds.data.stream.mixture import SampleRef, sample_rng
from tinygptv_ds.data.stream.plan import OpenStream, open_stream
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.log import note
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import prompt_text
from tinygptv_ds.processing.text import render
from tinygptv_ds.train.engine import Engine

_NEW_TOKENS = 40


@dataclass(frozen=True)
class Shown:
    """One sample of the panel: how it is asked, what is right, and its images."""

    prompt: str
    truth: str
    sample: Sample


class Panel:
    """A few fixed samples, of the validation sets where the recipe names some, answered again each time.

    Args:
        engine: generates; all ranks take part with the same samples.
        stream: the training stream, for recipes without validation sets.
        tokens: how samples become rows.
    """

    def __init__(self, engine: Engine, stream: OpenStream, tokens: Tokens) -> None:
        recipe = engine.job.recipe
        self._engine = engine
        self._tokens = tokens
        exact = replace(tokens, decoding="exact")  # as inference will see images
        self._samples = _choose(_shown(recipe, stream), exact, recipe.train.sample_count)

    def write(self, board: SummaryWriter | None, step: int) -> None:
        """Generate and write. To be called on all ranks; `board` is rank 0's."""
        if not self._samples:
            return
        answered = self._answers()
        rows = ["| | prompt | true | generated |", "|-|-|-|-|"]
        for number, (shown, answer) in enumerate(zip(self._samples, answered, strict=True)):
            cells = [cell(text) for text in (shown.prompt, shown.truth, answer)]
            rows.append(f"| {number} | {' | '.join(cells)} |")
            note(f"sample {number} at step {step}: {shown.prompt!r} -> {answer!r} (true: {shown.truth!r})")
        if board is not None:
            board.add_text("samples/answers", "\n".join(rows), step)
            images = [torch.from_numpy(shown.sample.pixels) for shown in self._samples if len(shown.sample.pixels)]
            if images:
                board.add_images("samples/images", torch.cat(images), step)

    def _answers(self) -> list[str]:
        tokens = self._tokens
        processor = TinyGPTVProcessor.for_model(self._engine.module.config, tokens.tokenizer)
        prompts = [_prompt(shown, tokens.text.end_sym) for shown in self._samples]
        generation = Generation(max_new_tokens=_NEW_TOKENS)
        in_step = self._engine.job.zero_stage == 3
        with self._engine.inference() as model:
            return list(answers(model, processor, prompts, generation, batch_size=len(prompts), in_step=in_step))


def _prompt(shown: Shown, end_sym: str) -> Prompt:
    """Return the prompt of training with its images: as pixels, or as the features that training uses."""
    sample = shown.sample
    images = tuple(sample.pixels) if sample.features is None else tuple(sample.features)
    return Prompt((shown.prompt,), images, add_bos_token=True, stop=(end_sym,))


def _shown(recipe: Recipe, stream: OpenStream) -> OpenStream:
    """The samples to choose from: validation datasets, else those held out, else the training's own."""
    if recipe.data.validation:
        return open_stream(recipe, recipe.data.validation)
    return open_stream(recipe, held_out=True) if recipe.data.validation_share else stream


def _choose(stream: OpenStream, tokens: Tokens, count: int) -> list[Shown]:
    """The first readable samples of the order, the datasets by turns."""
    reader = ShardReader(cache=stream.cache)
    chosen: list[Shown] = []
    refs = (
        SampleRef(0, name, *stream.orders[name].locate(k))
        for k in range(2 * count)
        for name in stream.names
        if k < len(stream.orders[name])
    )
    for ref in refs:
        if len(chosen) == count:
            break
        try:
            sample = load_sample(stream, reader, ref, tokens)
            raw = reader.read(stream.shards[ref.dataset][ref.shard], ref.index)
        except SampleError:
            continue
        draw = sample_rng(stream.seed, ref)
        rendered = render(raw.record, len(raw.images), draw, clean=stream.sections[ref.dataset].clean)
        prompt = prompt_text(rendered, len(raw.images), tokens.text, draw)
        chosen.append(Shown(prompt, rendered.turns[0][1], sample))
    return chosen


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
