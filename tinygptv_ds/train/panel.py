"""The panel on TensorBoard: pictures, prompts, the true and the generated answers."""

from __future__ import annotations

import torch
from torch.utils.tensorboard import SummaryWriter

from tinygptv_ds.config.schema import Recipe
from tinygptv_ds.data.loader import Tokens, load_sample
from tinygptv_ds.data.mixture import SampleRef, sample_rng
from tinygptv_ds.data.reader import SampleError, ShardReader
from tinygptv_ds.data.stream import OpenStream, open_stream
from tinygptv_ds.log import note
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import prompt_text
from tinygptv_ds.processing.text import render
from tinygptv_ds.train.engine import Engine

_NEW_TOKENS = 40


class Panel:
    """A few fixed samples, of the validation sets where the recipe names some, answered anew each time.

    Args:
        engine: generates; all ranks take part with the same samples.
        stream: the training stream, for recipes without validation sets.
        tokens: how samples become rows.
    """

    def __init__(self, engine: Engine, stream: OpenStream, tokens: Tokens) -> None:
        recipe = engine.job.recipe
        self._engine = engine
        self._tokens = tokens
        self._stream = _shown(recipe, stream)
        self._samples = _choose(self._stream, tokens, recipe.train.sample_count)

    def write(self, board: SummaryWriter | None, step: int) -> None:
        """Generate and write. To be called on all ranks; `board` is rank 0's."""
        if not self._samples:
            return
        answers = self._answers()
        rows = ["| | prompt | true | generated |", "|-|-|-|-|"]
        for number, ((prompt, truth, _), answer) in enumerate(zip(self._samples, answers, strict=True)):
            cells = [_cell(text) for text in (prompt, truth, answer)]
            rows.append(f"| {number} | {' | '.join(cells)} |")
            note(f"sample {number} at step {step}: {prompt!r} -> {answer!r} (true: {truth!r})")
        if board is not None:
            board.add_text("samples/answers", "\n".join(rows), step)
            pictures = [raw for _, _, images in self._samples for raw in images]
            if pictures:
                board.add_images("samples/pictures", torch.stack([_pixels(p, self._tokens) for p in pictures]), step)

    def _answers(self) -> list[str]:
        tokens = self._tokens
        processor = TinyGPTVProcessor.for_model(self._engine.module.config, tokens.tokenizer)
        prompts, pictures = [p for p, _, _ in self._samples], [list(i) for _, _, i in self._samples]
        inputs = processor(pictures, prompts, begin_token=True)
        inputs = {name: tensor.to(self._engine.device) for name, tensor in inputs.items()}
        with self._engine.inference() as model:
            ids = model.generate(
                **inputs,
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                eos_token_id=processor.stop_ids(tokens.text.end_sym),
                synced_gpus=self._engine.job.zero_stage == 3,
                pad_token_id=tokens.tokenizer.bos_token_id,
            )
        return processor.answers(ids[:, inputs["input_ids"].shape[1] :], tokens.text.end_sym)


def _shown(recipe: Recipe, stream: OpenStream) -> OpenStream:
    """The samples to choose from: validation datasets, else those held out, else the training's own."""
    if recipe.data.validation:
        return open_stream(recipe, recipe.data.validation)
    return open_stream(recipe, held_out=True) if recipe.data.validation_share else stream


def _choose(stream: OpenStream, tokens: Tokens, count: int) -> list[tuple[str, str, tuple[bytes, ...]]]:
    """(prompt, true answer, pictures) of the first readable samples of the order, the datasets by turns."""
    reader = ShardReader(cache=stream.cache)
    chosen: list[tuple[str, str, tuple[bytes, ...]]] = []
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
            load_sample(stream, reader, ref, tokens)
            raw = reader.read(stream.shards[ref.dataset][ref.shard], ref.index)
        except SampleError:
            continue
        draw = sample_rng(stream.seed, ref)
        rendered = render(raw.record, len(raw.images), draw, clean=stream.sections[ref.dataset].clean)
        prompt = prompt_text(rendered, len(raw.images), tokens.text, draw)
        chosen.append((prompt, rendered.turns[0][1], raw.images))
    return chosen


def _pixels(image: bytes, tokens: Tokens) -> torch.Tensor:
    from tinygptv_ds.processing.images import to_pixels

    return torch.from_numpy(to_pixels(image, tokens.image_size))


def _cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
