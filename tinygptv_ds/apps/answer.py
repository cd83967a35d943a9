"""`tinygptv-ds answer MODEL`: a file of questions to a file of answers, in batches, on one rank or many."""

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

from tinygptv_ds.apps.answer_files import Answered
from tinygptv_ds.apps.question_file import Line, QuestionFile, read_images
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

_READERS = 4  # threads that read, fetch and decode images meanwhile
_SHOWN = 5
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")


@dataclasses.dataclass(frozen=True)
class Work:
    """What answers and how.

    Attributes:
        answerer: the model with its template.
        generation: settings.
        batch_size: questions at once.
        allow_private: fetch images from private addresses.
    """

    answerer: Answerer
    generation: Generation
    batch_size: int
    allow_private: bool


@dataclasses.dataclass(frozen=True)
class Asked:
    """A line ready for the model, or why it is not."""

    line: Line
    prompt: Prompt | None = None
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.epilog = (
        "On several GPUs: torchrun --nproc-per-node 8 -m tinygptv_ds answer MODEL ... Repeat the same command to go on "
        "after a kill, with any number of ranks."
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
    group.add_argument("--image-root", type=Path, metavar="DIR", help="where images lie (default: next to the input)")
    group.add_argument("--answer-field", default="answer", metavar="NAME", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
    group.add_argument("--strict", action="store_true", help="end at the first line that cannot be answered")
    group.add_argument("--allow-private", action="store_true", help="fetch images from private addresses, too")
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Answer what is not answered yet, and write the file when all is."""
    check_model_arguments(args)
    generation = generation_from(args)
    ranks = ranks_from_env()
    set_up_logging(ranks.rank)
    lines = _checked_lines(args, ranks)
    answered = Answered(args.output, ranks.rank)
    answered.begin(_job(args, generation))
    done = answered.done()
    mine = [line for line in lines[ranks.rank :: ranks.world_size] if line.index not in done]
    with process_group(ranks):
        with answered:
            if mine:
                _answer_all(mine, len(lines[ranks.rank :: ranks.world_size]), answered, args, generation, ranks)
        barrier(ranks)
        if ranks.is_main:
            failed = answered.finish(len(lines))
            errors = f", {failed} of them with an error in place of one" if failed else ""
            print(f"{args.output}: {len(lines)} answers{errors}", flush=True)


def _checked_lines(args: argparse.Namespace, ranks: Ranks) -> list[Line]:
    """All lines of the input. What is wrong with some is told at once.

    Raises:
        DataError: none can be answered, or with --strict any cannot.
        ConfigError: an option cannot be carried out.
    """
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.answer_field in ("question", "image", "images", "history", "error", ""):
        raise ConfigError(f"--answer-field {args.answer_field!r} is the name of another field")
    if args.output.exists():
        raise ConfigError(f"{args.output} is already there, and complete; remove it, or choose another --output")
    root = args.image_root or args.input.parent
    lines = QuestionFile(args.input, root, (args.answer_field, "error")).lines()
    bad = [line for line in lines if line.problem]
    if bad:
        told = [f"{line.where}: {line.problem}" for line in bad[:_SHOWN]]
        told += [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        message = f"{len(bad)} of {len(lines)} lines cannot be answered:\n  " + "\n  ".join(told)
        if args.strict or len(bad) == len(lines):
            raise DataError(message)
        if ranks.is_main:
            LOGGER.warning("%s", message)
    return lines


def _job(args: argparse.Namespace, generation: Generation) -> dict[str, Any]:
    """What answers depend on; batch size and ranks are not of it."""
    path = args.model.resolve()
    folder = path / "model" if (path / "model").is_dir() else path  # of a run
    files = [path] if path.is_file() else sorted(file for kind in _WEIGHTS for file in folder.glob(f"*{kind}"))
    options = ("bits", "quantize_vision", "dtype", "device", "merge_lora", "template", "add_bos_token", "set")
    return {
        "input": sha256(args.input),
        "model": str(path),
        "files of the model": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "generation": dataclasses.asdict(generation) | {"stop": args.stop},
        "recipe": None if args.recipe is None else args.recipe.read_text(encoding="utf-8"),
        "answer field": args.answer_field,
    } | {f"--{name.replace('_', '-')}": getattr(args, name) for name in options}


def _answer_all(
    mine: list[Line], share: int, answered: Answered, args: argparse.Namespace, generation: Generation, ranks: Ranks
) -> None:
    """This rank's lines, the longest first, so that the end of the bar is no surprise, and alike ones in one batch."""
    import torch

    device = f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else None
    work = Work(load_from(args, device=device), generation, args.batch_size, args.allow_private)
    ordered = sorted(mine, key=lambda line: line.weight, reverse=True)
    hidden = None if ranks.is_main else True
    what = "answers" if ranks.world_size == 1 else f"answers of rank 0 (1 of {ranks.world_size})"
    with tqdm(desc=what, total=share, initial=share - len(mine), unit="question", disable=hidden) as bar:
        shown = not (args.show_prompt and ranks.is_main)
        for batch in _batches(ordered, work):
            ready = [asked.prompt for asked in batch if asked.prompt is not None]
            if ready and not shown:
                tqdm.write(work.answerer.describe(ready[0]))
                shown = True
            for asked, record in _records(batch, work, args.answer_field):
                if args.strict and "error" in record:
                    raise DataError(f"{asked.line.where}: {record['error']}")
                answered.write(asked.line.index, record)
            bar.update(len(batch))


def _records(batch: list[Asked], work: Work, field: str) -> Iterator[tuple[Asked, dict[str, Any]]]:
    """Each line's fields with its answer or error."""
    ready = [(asked, asked.prompt) for asked in batch if asked.prompt is not None]
    prompts, numbers = [prompt for _, prompt in ready], [asked.line.index for asked, _ in ready]
    given = work.answerer.answers(prompts, work.generation, batch_size=work.batch_size, numbers=numbers)
    for (asked, _), answer in zip(ready, given, strict=True):
        yield asked, {**asked.line.fields, field: answer}
    for asked in batch:
        if asked.prompt is None:
            yield asked, {**asked.line.fields, "error": asked.problem}


def _batches(lines: Sequence[Line], work: Work) -> Iterator[list[Asked]]:
    """Lines made ready by threads, two batches ahead of the model."""
    waiting: deque[Future[Asked]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        coming = iter(lines)
        try:
            while True:
                wanted = 3 * work.batch_size - len(waiting)
                waiting.extend(pool.submit(_ready, line, work) for line in islice(coming, wanted))
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(work.batch_size, len(waiting)))]
        finally:
            for future in waiting:
                future.cancel()


def _ready(line: Line, work: Work) -> Asked:
    """Read and decode the images and word the prompt; what is wrong with the line is kept with it."""
    from tinygptv_ds.processing.image import to_pixels

    try:
        if line.problem:
            raise DataError(line.problem)
        encoded = read_images(line, allow_private=work.allow_private)
        pixels = []
        for number, image in enumerate(encoded, 1):
            try:
                pixels.append(to_pixels(image, work.answerer.processor.image_size))
            except DataError as error:
                raise DataError(f"image {number} of {len(encoded)}: {error}") from None
        prompt = work.answerer.prompt(_turns(line, pixels))
        work.answerer.prompt_length(prompt, work.generation.max_new_tokens)
    except DataError as error:
        return Asked(line, problem=str(error))
    return Asked(line, prompt)


def _turns(line: Line, images: Sequence[np.ndarray]) -> list[Turn]:
    """The conversation of a line; all images belong to its first question."""
    turns = [Turn(question, answer=answer) for question, answer in line.history] + [Turn(line.question)]
    return [dataclasses.replace(turns[0], images=images), *turns[1:]]
