"""Benchmark scores while training: questions of benchmarks or held-out shards, answered on all ranks."""

from __future__ import annotations

import time

from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.evaluation.report import line_of, save_json
from tinygptv_ds.evaluation.runner import Runner, check_images
from tinygptv_ds.evaluation.scoring import scalars, score
from tinygptv_ds.evaluation.wording import Settings, answer_tokens, bare_captions, wording
from tinygptv_ds.log import LOGGER
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import tokenize
from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.callbacks.periodic import Periodic
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.run import Run

FOLDER = "evaluation"  # in the run directory


class BenchmarkScores(Periodic):
    """Scores what `evaluation.benchmarks` names, the first `evaluation.limit` questions of each.

    Settings: the recipe's section `evaluation`. Metrics: `eval/NAME/strict` and the further scores of each benchmark;
    rank 0 writes every answer to the run directory's `evaluation/step-N/NAME.json`.

    Args:
        run: the run on this rank; all ranks answer their share in the same number of forward passes.
        tokens: the tokenizer, and how the recipe words questions.
        reporter: writes the scores.
        callbacks: get the scores.

    Raises:
        DataError: an image cannot be used, reported before the first step.
    """

    def __init__(self, run: Run, tokens: Tokens, reporter: Reporter, callbacks: Callback) -> None:
        section, ranks = run.recipe.evaluation, run.ranks
        super().__init__(run, reporter, callbacks, every=section.every, phase="evaluating")
        self._processor = TinyGPTVProcessor.for_model(run.engine.module.config, tokens.tokenizer)
        self._tasks = []
        for benchmark, task in zip(section.benchmarks, run.job.scored, strict=True):
            check_images(task, tokens.image_size, section.batch_size, ranks)
            settings = Settings(benchmark.template, section.max_new_tokens, section.batch_size, benchmark.add_bos_token)
            text = tokens.text
            captions = bare_captions(text.prompts)
            words = wording(task.benchmark, settings, text.prompt_template, text.end_sym, captions)
            length = answer_tokens(task, settings, words.end, lambda each: len(tokenize(tokens.tokenizer, each)))
            self._tasks.append((task, length, words))

    def measure(self, done: int) -> dict[str, float]:
        """Answer all questions and return the scores by name. Called on all ranks."""
        found: dict[str, float] = {}
        job, engine = self._run.job, self._run.engine
        for task, length, words in self._tasks:
            start = time.perf_counter()
            with engine.inference() as model:
                runner = Runner(
                    model,
                    self._processor,
                    job.ranks,
                    batch_size=self._run.recipe.evaluation.batch_size,
                    max_new_tokens=length,
                    in_step=engine.zero_stage == 3,
                )
                answers = runner.answer(task, words, bar=False)
            result = {
                "benchmark": task.name,
                "step": done,
                "template": words.template.text,
                "wording": words.instructions(task),
                **score(task, answers, words.end),
            }
            LOGGER.info("step %d: %s in %.1f s", done, line_of(result), time.perf_counter() - start)
            if job.ranks.is_main:
                save_json(job.run_dir / FOLDER / f"step-{done:08d}" / f"{task.name}.json", result)
            found |= scalars(result, task.name)
        return found
