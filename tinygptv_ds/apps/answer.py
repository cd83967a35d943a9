"""The command `answer`: answers a file of questions in batches, on one or several ranks."""

from __future__ import annotations

import argparse
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tinygptv_ds.apps.answer_files import AnswerFiles
from tinygptv_ds.apps.question_file import QuestionFile, QuestionRecord, read_images
from tinygptv_ds.distributed import Ranks, barrier, process_group, ranks_from_env
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.files import sha256
from tinygptv_ds.generate.conversation import Prompt, Turn
from tinygptv_ds.generate.model_args import add_model_arguments, check_model_arguments, load_from
from tinygptv_ds.generate.settings import Generation, add_generation_arguments, generation_from
from tinygptv_ds.log import LOGGER, set_up_logging

if TYPE_CHECKING:
    import numpy as np

    from tinygptv_ds.generate.answerer import Answerer
    from tinygptv_ds.processing.image import Color

_READERS = 4  # threads that read, fetch and decode images while the model answers
_MAX_SHOWN = 5  # problems listed in a message
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")


@dataclasses.dataclass(frozen=True)
class BatchAnswering:
    """The model and the settings that a rank answers its questions with.

    Attributes:
        answerer: the model with its template.
        generation: settings of generation.
        batch_size: questions per batch.
        allow_private: whether images may be fetched from private addresses.
        background: how images are read, see processing/image.py.
    """

    answerer: Answerer
    generation: Generation
    batch_size: int
    allow_private: bool
    background: Color | None = None


@dataclasses.dataclass(frozen=True)
class PreparedQuestion:
    """A question with its prompt, or with the reason why it cannot be answered."""

    question: QuestionRecord
    prompt: Prompt | None = None
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `answer`."""
    parser.epilog = (
        "On several GPUs: torchrun --nproc-per-node 8 -m tinygptv_ds answer MODEL ... Repeat the same command to "
        "resume after a kill, with any number of ranks."
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("questions and answers")
    group.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines with "question", "image" or "images" (a path, a URL, or {"shard": TAR, "key": KEY}), '
        '"history" ([[question, answer], ...]) and any fields of your own',
    )
    group.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the same lines, each with its answer or an error"
    )
    group.add_argument("--image-root", type=Path, metavar="DIR", help="folder of the images (default: the input's)")
    group.add_argument("--answer-field", default="answer", metavar="NAME", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions per batch (default: 8)")
    group.add_argument("--strict", action="store_true", help="stop at the first line that cannot be answered")
    group.add_argument("--allow-private", action="store_true", help="also fetch images from private addresses")
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Answer the questions that have no answer yet, and write the output once all have one."""
    check_model_arguments(args)
    generation = generation_from(args)
    ranks = ranks_from_env()
    set_up_logging(ranks.rank)
    questions = _checked_questions(args, ranks)
    files = AnswerFiles(args.output, ranks.rank)
    files.open_folder(_fingerprint(args, generation))
    done = files.done()
    share = questions[ranks.rank :: ranks.world_size]
    pending = [question for question in share if question.index not in done]
    with process_group(ranks):
        with files:
            if pending:
                _answer_all(pending, len(share), files, args, generation, ranks)
        barrier(ranks)
        if ranks.is_main:
            failed = files.finish(len(questions))
            errors = f", {failed} of them errors" if failed else ""
            print(f"{args.output}: {len(questions)} answers{errors}", flush=True)


def _checked_questions(args: argparse.Namespace, ranks: Ranks) -> list[QuestionRecord]:
    """Read all questions of the input, and log those that cannot be answered.

    Raises:
        DataError: no question can be answered, or with --strict any one cannot.
        ConfigError: an option is wrong.
    """
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.answer_field in ("question", "image", "images", "history", "error", ""):
        raise ConfigError(f"--answer-field {args.answer_field!r} is the name of another field")
    if args.output.exists():
        raise ConfigError(f"{args.output} exists already and is complete; remove it, or choose another --output")
    root = args.image_root or args.input.parent
    questions = QuestionFile(args.input, root, (args.answer_field, "error")).questions()
    bad = [question for question in questions if question.problem]
    if bad:
        shown = [f"{question.where}: {question.problem}" for question in bad[:_MAX_SHOWN]]
        shown += [f"and {len(bad) - _MAX_SHOWN} more"] if len(bad) > _MAX_SHOWN else []
        message = f"{len(bad)} of {len(questions)} lines cannot be answered:\n  " + "\n  ".join(shown)
        if args.strict or len(bad) == len(questions):
            raise DataError(message)
        if ranks.is_main:
            LOGGER.warning("%s", message)
    return questions


def _fingerprint(args: argparse.Namespace, generation: Generation) -> dict[str, Any]:
    """Return everything that answers depend on; they do not depend on the batch size and the number of ranks."""
    path = args.model.resolve()
    folder = path / "model" if (path / "model").is_dir() else path  # of a run directory
    files = [path] if path.is_file() else sorted(file for kind in _WEIGHTS for file in folder.glob(f"*{kind}"))
    options = ["bits", "quantize_vision", "dtype", "device", "merge_lora"]
    options += ["template", "add_bos_token", "raw", "set", "background"]
    return {
        "input": sha256(args.input),
        "model": str(path),
        "files of the model": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "generation": dataclasses.asdict(generation) | {"stop": args.stop},
        "recipe": None if args.recipe is None else args.recipe.read_text(encoding="utf-8"),
        "answer field": args.answer_field,
    } | {f"--{name.replace('_', '-')}": getattr(args, name) for name in options}


def _answer_all(
    pending: list[QuestionRecord],
    share: int,
    files: AnswerFiles,
    args: argparse.Namespace,
    generation: Generation,
    ranks: Ranks,
) -> None:
    """Answer this rank's questions, longest first: batches hold similar lengths, and the last ones are not slower."""
    import torch

    from tinygptv_ds.processing.image import parse_background

    device = f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else None
    background = parse_background(args.background)
    answerer = load_from(args, device=device)
    work = BatchAnswering(answerer, generation, args.batch_size, args.allow_private, background)
    ordered = sorted(pending, key=lambda question: question.length, reverse=True)
    hidden = None if ranks.is_main else True
    label = "answers" if ranks.world_size == 1 else f"answers of rank 0 (1 of {ranks.world_size})"
    with tqdm(desc=label, total=share, initial=share - len(pending), unit="question", disable=hidden) as bar:
        prompt_shown = not (args.show_prompt and ranks.is_main)
        for batch in _batches(ordered, work):
            prompts = [prepared.prompt for prepared in batch if prepared.prompt is not None]
            if prompts and not prompt_shown:
                tqdm.write(work.answerer.describe(prompts[0]))
                prompt_shown = True
            for question, record in _records(batch, work, args.answer_field):
                if args.strict and "error" in record:
                    raise DataError(f"{question.where}: {record['error']}")
                files.write(question.index, record)
            bar.update(len(batch))


def _records(
    batch: list[PreparedQuestion], work: BatchAnswering, field: str
) -> Iterator[tuple[QuestionRecord, dict[str, Any]]]:
    """Generate the answers of a batch; yield the fields of each question with its answer or error."""
    ready = [(prepared.question, prepared.prompt) for prepared in batch if prepared.prompt is not None]
    prompts, numbers = [prompt for _, prompt in ready], [question.index for question, _ in ready]
    answers = work.answerer.answers(prompts, work.generation, batch_size=work.batch_size, numbers=numbers)
    for (question, _), answer in zip(ready, answers, strict=True):
        yield question, {**question.fields, field: answer}
    for prepared in batch:
        if prepared.prompt is None:
            yield prepared.question, {**prepared.question.fields, "error": prepared.problem}


def _batches(questions: Sequence[QuestionRecord], work: BatchAnswering) -> Iterator[list[PreparedQuestion]]:
    """Yield batches of questions that threads prepare, two batches ahead of the model."""
    waiting: deque[Future[PreparedQuestion]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        remaining = iter(questions)
        try:
            while True:
                wanted = 3 * work.batch_size - len(waiting)
                waiting.extend(pool.submit(_prepare, question, work) for question in islice(remaining, wanted))
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(work.batch_size, len(waiting)))]
        finally:
            for future in waiting:
                future.cancel()


def _prepare(question: QuestionRecord, work: BatchAnswering) -> PreparedQuestion:
    """Read and decode the images and make the prompt; an error becomes the question's problem."""
    from tinygptv_ds.processing.image import to_pixels

    try:
        if question.problem:
            raise DataError(question.problem)
        encoded = read_images(question, allow_private=work.allow_private)
        pixels, side = [], work.answerer.processor.image_size
        for number, image in enumerate(encoded, 1):
            try:
                pixels.append(to_pixels(image, side, background=work.background))
            except DataError as error:
                raise DataError(f"image {number} of {len(encoded)}: {error}") from None
        prompt = work.answerer.prompt(_turns(question, pixels))
        work.answerer.prompt_ids(prompt, work.generation.max_new_tokens)
    except DataError as error:
        return PreparedQuestion(question, problem=str(error))
    return PreparedQuestion(question, prompt)


def _turns(question: QuestionRecord, images: Sequence[np.ndarray]) -> list[Turn]:
    """Return the conversation of a question; all images belong to its first turn."""
    turns = [Turn(earlier, answer=answer) for earlier, answer in question.history] + [Turn(question.question)]
    return [dataclasses.replace(turns[0], images=images), *turns[1:]]
