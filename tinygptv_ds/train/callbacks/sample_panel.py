"""The sample panel on TensorBoard and in the run directory: images, prompts, the true and the generated answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from tinygptv_ds.board_tags import SAMPLES
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.console import MAGENTA, is_terminal
from tinygptv_ds.data.loader.sample import Sample, Tokens, load_sample
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.stream.mixture import SampleRef, sample_rng
from tinygptv_ds.data.stream.plan import OpenStream, open_stream
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.log import log_with_head, note
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import prompt_text
from tinygptv_ds.processing.text import render
from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.callbacks.periodic import Periodic
from tinygptv_ds.train.metrics.panel_files import AnsweredSample, write_panel
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.run import Run

_NEW_TOKENS = 40


@dataclass(frozen=True)
class PanelSample:
    """One sample of the panel: its prompt, the true answer, and the sample with its images."""

    prompt: str
    truth: str
    sample: Sample


class SamplePanel(Periodic):
    """Answers the same few samples each time, of the validation sets where the recipe names some.

    Settings: `train.sample_every`, `train.sample_count`. TensorBoard: `answers` and `images`, among the samples. Run
    directory: `samples/step-N.json` with its images. Metrics: none.

    Args:
        run: the run on this rank; all ranks generate for the same samples.
        stream: the training stream, for recipes without validation sets.
        tokens: how samples become rows.
        reporter: holds TensorBoard's writer.
        callbacks: as of every periodic measurement; there are no scalars.
    """

    def __init__(self, run: Run, stream: OpenStream, tokens: Tokens, reporter: Reporter, callbacks: Callback) -> None:
        train = run.recipe.train
        super().__init__(run, reporter, callbacks, every=train.sample_every, phase="answering the panel")
        self._tokens = tokens
        exact = replace(tokens, decoding="exact")  # as inference will see images
        self._shown = 0
        self._samples = _choose(_samples_from(run.recipe, stream), exact, train.sample_count)

    def measure(self, done: int) -> dict[str, float]:
        """Generate and write the answers; there are no scalars. Called on all ranks."""
        if not self._samples:
            return {}
        board = self._reporter.board
        answered = self._answers()
        rows = ["| | prompt | true | generated |", "|-|-|-|-|"]
        for number, (shown, answer) in enumerate(zip(self._samples, answered, strict=True)):
            cells = [cell(text) for text in (shown.prompt, shown.truth, answer)]
            rows.append(f"| {number} | {' | '.join(cells)} |")
            self._report(
                number, f"sample {number} at step {done}:", f" {shown.prompt!r} -> {answer!r} (true: {shown.truth!r})"
            )
        if board is not None:
            shown_answers = zip(self._samples, answered, strict=True)
            panel = [AnsweredSample(each.prompt, each.truth, text, each.sample.pixels) for each, text in shown_answers]
            write_panel(self._run.job.run_dir, done, panel)
            board.add_text(f"{SAMPLES}/answers", "\n".join(rows), done)
            images = [torch.from_numpy(shown.sample.pixels) for shown in self._samples if len(shown.sample.pixels)]
            if images:
                board.add_images(f"{SAMPLES}/images", torch.cat(images), done)
        self._shown += 1
        return {}

    def _report(self, number: int, head: str, text: str) -> None:
        """Write an answer to the log file; on a terminal one of them is shown each time, by turns."""
        if is_terminal(sys.stdout) and number == self._shown % len(self._samples):
            log_with_head(head, text, MAGENTA)
        else:
            note(head + text)

    def _answers(self) -> list[str]:
        run, tokens = self._run, self._tokens
        processor = TinyGPTVProcessor.for_model(run.engine.module.config, tokens.tokenizer)
        prompts = [_prompt(shown, tokens.text.end_sym) for shown in self._samples]
        generation = Generation(max_new_tokens=_NEW_TOKENS)
        in_step = run.engine.zero_stage == 3
        with run.engine.inference() as model:
            return list(answers(model, processor, prompts, generation, batch_size=len(prompts), in_step=in_step))


def _prompt(shown: PanelSample, end_sym: str) -> Prompt:
    """Return the prompt of training with its images: as pixels, or as the features that training uses."""
    sample = shown.sample
    images = tuple(sample.pixels) if sample.features is None else tuple(sample.features)
    return Prompt((shown.prompt,), images, add_bos_token=True, stop=(end_sym,))


def _samples_from(recipe: Recipe, stream: OpenStream) -> OpenStream:
    """Return the samples to choose from: validation datasets, else held-out samples, else the training's own."""
    if recipe.data.validation:
        return open_stream(recipe, recipe.data.validation)
    return open_stream(recipe, held_out=True) if recipe.data.validation_share else stream


def _choose(stream: OpenStream, tokens: Tokens, count: int) -> list[PanelSample]:
    """Return the first readable samples of the order, the datasets by turns."""
    reader = ShardReader(cache=stream.cache)
    chosen: list[PanelSample] = []
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
        chosen.append(PanelSample(prompt, rendered.turns[0][1], sample))
    return chosen


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
