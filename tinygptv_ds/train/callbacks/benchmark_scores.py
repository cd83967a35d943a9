"""Scores while training: questions of benchmarks or held-out shards, asked of the model as it is, on all ranks."""

from __future__ import annotations

import time

from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.evaluation.report import line_of, save_json
from tinygptv_ds.evaluation.runner import Runner, check_images
from tinygptv_ds.evaluation.scoring import scalars, score
from tinygptv_ds.evaluation.wording import Settings, wording
from tinygptv_ds.log import LOGGER
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.train.engine import Engine

FOLDER = "evaluation"  # in the run directory


class Evaluation:
    """Scores what `evaluation.benchmarks` of the recipe names, the first `evaluation.limit` questions of each.

    Args:
        engine: generates; all ranks take part, each with its share, in the same number of forward passes.
        tokens: the tokenizer, and how the recipe words questions.

    Raises:
        DataError: an image cannot be used, told before the first step.
    """

    def __init__(self, engine: Engine, tokens: Tokens) -> None:
        section, ranks = engine.job.recipe.evaluation, engine.job.ranks
        self._engine = engine
        self._processor = TinyGPTVProcessor.for_model(engine.module.config, tokens.tokenizer)
        self._tasks = []
        for benchmark, task in zip(section.benchmarks, engine.job.scored, strict=True):
            check_images(task, tokens.image_size, section.batch_size, ranks)
            settings = Settings(benchmark.template, section.max_new_tokens, section.batch_size, benchmark.add_bos_token)
            words = wording(task.benchmark, settings, tokens.text.prompt_template, tokens.text.end_sym)
            self._tasks.append((task, settings, words))

    def measure(self, step: int) -> dict[str, float]:
        """The scores under their TensorBoard names, `eval/NAME/strict` and so on. To be called on all ranks.

        Rank 0 writes every answer to the run directory's `evaluation/step-N/NAME.json`.

        Args:
            step: steps done.
        """
        found: dict[str, float] = {}
        job = self._engine.job
        for task, settings, words in self._tasks:
            start = time.perf_counter()
            with self._engine.inference() as model:
                runner = Runner(model, self._processor, settings, job.ranks, in_step=job.zero_stage == 3)
                answers = runner.answer(task, words, bar=False)
            result = {
                "benchmark": task.name,
                "step": step,
                "template": words.template.text,
                **score(task, answers, words.end),
            }
            LOGGER.info("step %d: %s in %.1f s", step, line_of(result), time.perf_counter() - start)
            if job.ranks.is_main:
                save_json(job.run_dir / FOLDER / f"step-{step:08d}" / f"{task.name}.json", result)
            found |= scalars(result, task.name)
        return found
