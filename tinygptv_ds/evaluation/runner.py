"""Has a model answer the questions of a task: shared over ranks by number, in batches, every answer logged at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm

from tinygptv_ds.distributed import Ranks, gather
from tinygptv_ds.errors import DataError
from tinygptv_ds.evaluation.answer_log import AnswerLog
from tinygptv_ds.evaluation.benchmarks.question import Answer, Question, Task
from tinygptv_ds.evaluation.wording import Wording
from tinygptv_ds.generate.candidates import Choice, candidate_losses
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.processor import TinyGPTVProcessor

# Maximum lengths of the published scripts, which no answer or prompt reaches.
_CHOICE_TOKENS, _PROMPT_TOKENS = 500, 3800


class Runner:
    """Has one model answer the questions of tasks, each rank its share.

    Args:
        model: in evaluation mode.
        processor: the processor of the model.
        ranks: this process. A rank answers its share of the batches; which questions share a batch does not depend on
            the number of ranks.
        batch_size: questions that a rank answers at once.
        max_new_tokens: the maximum length of an answer.
        in_step: every rank runs the same number of forward passes, as required under ZeRO-3.
    """

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        processor: TinyGPTVProcessor,
        ranks: Ranks,
        *,
        batch_size: int,
        max_new_tokens: int,
        in_step: bool = False,
    ) -> None:
        self._model, self._processor, self._ranks = model, processor, ranks
        self._batch_size, self._max_new_tokens, self._in_step = batch_size, max_new_tokens, in_step

    def answer(self, task: Task, wording: Wording, log: AnswerLog | None = None, *, bar: bool = True) -> list[Answer]:
        """Answer all questions; return the answers in order, on every rank. To be called on all ranks.

        Args:
            task: the questions.
            wording: how they are worded.
            log: keeps the answers as they are generated, and has those of an evaluation that was killed.
            bar: show a progress bar of rank 0's share.

        Raises:
            DataError: an image cannot be read or decoded; names the question.
        """
        batches = share(len(task.questions), self._batch_size, self._ranks)
        mine = [batch for batch in batches if batch is not None]
        known = {batch: log.known(batch) if log is not None else None for batch in mine}
        done = sum(len(batch) for batch in mine if known[batch] is not None)
        found: dict[int, Answer] = {}
        of_ranks = f" (1 of {self._ranks.world_size} ranks)" if self._ranks.world_size > 1 else ""
        with tqdm(
            total=sum(map(len, mine)),
            initial=done,
            desc=f"{task.name}{of_ranks}",
            unit="question",
            disable=None if bar and self._ranks.is_main else True,
        ) as progress:
            problem = None
            try:
                for batch in batches:
                    if batch is None:  # this rank has answered its share
                        if self._in_step:
                            self._answer_batch(task, wording, range(1))
                        continue
                    given = known[batch]
                    if given is None:
                        given = self._answer_batch(task, wording, batch)
                        progress.update(len(batch))
                        if log is not None:
                            log.add(batch, given)
                    found |= dict(zip(batch, given, strict=True))
            except DataError as error:
                if self._in_step:  # the others wait for this rank's next pass
                    raise
                LOGGER.error("rank %d stops, the others finish their share: %s", self._ranks.rank, error)
                problem = str(error)
        shares = gather(self._ranks, (found, problem))
        _raise([problem for _, problem in shares])
        by_number = {number: answer for found, _ in shares for number, answer in found.items()}
        return [by_number[number] for number in range(len(task.questions))]

    def _answer_batch(self, task: Task, wording: Wording, batch: range) -> list[Answer]:
        questions = [task.questions[number] for number in batch]
        images = [question.images() for question in questions]
        generation = Generation(max_new_tokens=self._max_new_tokens)
        try:
            prompts = [wording.prompt(question, seen) for question, seen in zip(questions, images, strict=True)]
            if questions[0].choices:
                return self._losses(questions, prompts, wording.choice_end)
            found = answers(
                self._model,
                self._processor,
                prompts,
                generation,
                batch_size=len(prompts),
                in_step=self._in_step,
                as_benchmark=task.benchmark.whole_continuation,
            )
            return list(found)
        except DataError as error:
            raise _named(task, questions, images, error) from error

    def _losses(self, questions: Sequence[Question], prompts: Sequence[Prompt], end: str) -> list[list[float]]:
        """Return the mean loss of each choice of each question."""
        found = candidate_losses(
            self._model,
            self._processor,
            [Choice(prompt, question.choices) for prompt, question in zip(prompts, questions, strict=True)],
            end_sym=end,
            max_prompt_tokens=_PROMPT_TOKENS,
            max_answer_tokens=_CHOICE_TOKENS,
            batch_size=len(prompts),
        )
        return [losses.means.tolist() for losses in found]


def share(count: int, batch_size: int, ranks: Ranks) -> list[range | None]:
    """Return a rank's batches of question numbers, padded with None to the same number on every rank."""
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    mine: list[range | None] = list(batches[ranks.rank :: ranks.world_size])
    return mine + [None] * (-(-len(batches) // ranks.world_size) - len(mine))


def check_images(task: Task, image_size: int, batch_size: int, ranks: Ranks) -> None:
    """Decode each image once on one of the ranks, so that none stops the training later. To be called on all ranks.

    Raises:
        DataError: images cannot be used; names the first of every rank, on all ranks.
    """
    problem = None
    try:
        for batch in share(len(task.questions), batch_size, ranks):
            for question in (task.questions[number] for number in batch or ()):
                _decode(task, question, question.images(), image_size)
    except DataError as error:
        problem = str(error)
    _raise(gather(ranks, problem))


def _decode(task: Task, question: Question, images: Iterable, image_size: int) -> None:
    try:
        for image in images:
            to_pixels(image, image_size)
    except DataError as error:
        raise DataError(f"{task.name}, question {question.key}: {error}") from error


def _named(task: Task, questions: Sequence[Question], images: Sequence, error: DataError) -> DataError:
    """Return the error with the name of its question."""
    for question, seen in zip(questions, images, strict=True):
        try:
            _decode(task, question, seen, image_size=32)
        except DataError as named:
            return named
    return DataError(f"{task.name}, questions {questions[0].key} to {questions[-1].key}: {error}")


def choose_device(dtype: str, ranks: Ranks) -> str:
    """Make the rank's GPU, if there is one, the current device; return the name of the dtype to compute in.

    Args:
        dtype: a name; "auto" is bf16 on a GPU, else fp32.
        ranks: this process.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    return dtype if dtype != "auto" else "bf16" if on_gpu else "fp32"


def _raise(problems: Sequence[str | None]) -> None:
    found = [problem for problem in problems if problem is not None]
    if found:
        raise DataError("\n".join(found))
