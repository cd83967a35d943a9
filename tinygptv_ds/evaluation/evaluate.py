"""One evaluation: from a model and questions to scores in a folder. Torch is imported after all files are checked."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tinygptv_ds.config.evaluation_section import SPLITS
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.config.template_names import BENCHMARK
from tinygptv_ds.distributed import Ranks, barrier, process_group, ranks_from_env
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.answer_log import AnswerLog, check_settings, record_settings
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Task
from tinygptv_ds.evaluation.benchmarks.table import open_held_out, open_published, places_of
from tinygptv_ds.evaluation.report import line_of, markdown, save_json, write_scalars
from tinygptv_ds.evaluation.scoring import scalars, score
from tinygptv_ds.evaluation.wording import Settings, Wording, answer_tokens, wording
from tinygptv_ds.files import write_atomically
from tinygptv_ds.processing.sequence import tokenize

if TYPE_CHECKING:
    from tinygptv_ds.evaluation.scored_model import ScoredModel

_PUBLISHED = Path(__file__).with_name("published.yaml")


def evaluate(args: argparse.Namespace, kind: str, benchmarks: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run the evaluation that a command line asks for; return its results on rank 0, nothing on the others.

    All files are checked first. Answers, results and scores are written to the output folder, and scores are printed.

    Args:
        args: parsed with `cli.add_options`.
        kind: what held-out shards hold: vqa, refer or caption.
        benchmarks: the published benchmarks that may be named.

    Raises:
        TinyGPTVError: options, files or weights that the user has to fix.
    """
    settings = Settings(args.template, args.max_new_tokens, args.batch_size, args.add_bos_token)
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: no question is left")
    if args.shards is not None and args.template == BENCHMARK:
        raise ConfigError("--template benchmark: held-out shards have no template of a benchmark")
    tasks = open_tasks(args, kind, benchmarks)
    if args.json and len(tasks) > 1:
        raise ConfigError(f"--json takes one result, but there are {len(tasks)}: they are written to --out")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.show_prompt:
        _show_prompts(args, tasks, settings)
        return []
    ranks = ranks_from_env()
    with process_group(ranks):
        return _score(args, tasks, settings, ranks)


def open_tasks(args: argparse.Namespace, kind: str, benchmarks: Sequence[str]) -> list[Task]:
    """Return the questions of all that is named, after checking its files."""
    places = [text for text in args.set if not text.startswith("model.")]
    if args.shards is not None:
        if getattr(args, "res", 100) != 100:
            raise ConfigError("--res is for --benchmarks; boxes of shards are compared as they are stored")
        return [open_held_out(kind, args.shards, args.limit, instruction=args.instruction)]
    if args.instruction is not None:
        raise ConfigError("--instruction: the words of published benchmarks are fixed; it is for --shards")
    checks, tasks = Checks(), []
    for name in args.benchmarks.split(","):
        if name not in benchmarks:
            raise ConfigError(f"--benchmarks: {name!r} is none of these{nearest(name, benchmarks)}")
        for split in _splits(name, getattr(args, "splits", None)):
            tasks.append(open_published(name, split, places_of(name, args.root, places), checks, args.limit))
    checks.finish()
    resolution = getattr(args, "res", 100)
    return tasks if resolution == 100 else [_with_resolution(task, resolution) for task in tasks]


def _with_resolution(task: Task, resolution: int) -> Task:
    """Return a task of boxes whose answers count in steps of 1 / `resolution` of the image."""
    if resolution < 1:
        raise ConfigError(f"--res {resolution}: boxes need at least 1 step")
    questions = [replace(each, metadata={**each.metadata, "resolution": resolution}) for each in task.questions]
    return replace(task, questions=questions)


def _splits(name: str, asked: str | None) -> Sequence[str]:
    """Return the splits of a benchmark that are asked for, all of them by default."""
    if asked is None:
        return SPLITS[name] or ("",)
    chosen = asked.split(",")
    known = {split for splits in SPLITS.values() for split in splits}
    for split in chosen:
        if split not in known:
            raise ConfigError(f"--splits: {split!r} is no split{nearest(split, known)}")
    found = [split for split in SPLITS[name] if split in chosen]
    if not found:
        raise ConfigError(f"--splits {asked}: {name} has {', '.join(SPLITS[name])}")
    return found


def _show_prompts(args: argparse.Namespace, tasks: Sequence[Task], settings: Settings) -> None:
    from tinygptv_ds.evaluation.scored_model import config_of, trained_captions

    config, captions = config_of(args.model, _model_overrides(args), args.recipe), trained_captions(args.model)
    for task in tasks:
        words = wording(task.benchmark, settings, config.prompt_template, config.end_sym, captions)
        until = f"the answer ends at {words.stop or 'the end token'!r}"
        if task.questions[0].choices:
            until = f"the likeliest choice counts, each followed by {words.choice_end!r}"
        print(f"{task.name}: {words.text(task.questions[0])!r}; {until}")


def _model_overrides(args: argparse.Namespace) -> list[str]:
    return [text for text in args.set if text.startswith("model.")]


def _score(args: argparse.Namespace, tasks: Sequence[Task], settings: Settings, ranks: Ranks) -> list[dict[str, Any]]:
    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.evaluation.runner import Runner, choose_device
    from tinygptv_ds.evaluation.scored_model import identify, trained_captions
    from tinygptv_ds.generate.load import load_model

    dtype = choose_device(args.dtype, ranks)
    scored = identify(args.model)
    board, step = args.tensorboard or scored.board, args.step if args.step is not None else scored.step
    if args.tensorboard and step is None:
        raise ConfigError(f"the step of {args.model} is unknown: give --step for TensorBoard")
    out = args.out or Path("runs/eval") / args.model.resolve().name
    model, processor = load_model(args.model, DTYPES[dtype], recipe=args.recipe, overrides=_model_overrides(args))
    captions = trained_captions(args.model)
    results = []
    for task in tasks:
        words = wording(task.benchmark, settings, model.config.prompt_template, model.config.end_sym, captions)
        length = answer_tokens(task, settings, words.end, lambda text: len(tokenize(processor.tokenizer, text)))
        runner = Runner(model, processor, ranks, batch_size=settings.batch_size, max_new_tokens=length)
        decoding = _decoding(words, length, dtype)
        folder = out / task.name
        _begin(folder, {"checkpoint": scored.checkpoint, **decoding}, ranks, fresh=args.fresh)
        asked = [f"{question.key}\n{words.text(question)}\n{question.choices}" for question in task.questions]
        with AnswerLog(folder, ranks.rank, asked) as log:
            answers = runner.answer(task, words, log)
        if ranks.is_main:
            result = _result(task, score(task, answers, words.end), scored, step, decoding, words.instructions(task))
            save_json(folder / "results.json", result)
            print(line_of(result), flush=True)
            if board is not None and step is not None:
                write_scalars(board, scalars(result, task.name), step)
            results.append(result)
    if ranks.is_main:
        _write_table(out, scored)
        if args.json:
            save_json(args.json, results[0])
    return results


def _begin(folder: Path, settings: dict[str, Any], ranks: Ranks, *, fresh: bool) -> None:
    """Have rank 0 prepare the folder; where it holds answers of other settings, every rank raises the same error."""
    if not fresh:
        check_settings(folder, settings)
    barrier(ranks)
    if ranks.is_main:
        record_settings(folder, settings, fresh=fresh)
    barrier(ranks)


def _decoding(words: Wording, max_new_tokens: int, dtype: str) -> dict[str, Any]:
    return {
        "template": words.template.text,
        "stop": words.stop,
        "choice_end": words.choice_end,
        "max_new_tokens": max_new_tokens,
        "add_bos_token": words.template.add_bos_token,
        "search": "greedy",
        "dtype": dtype,
    }


def _result(
    task: Task,
    scores: dict[str, Any],
    scored: ScoredModel,
    step: int | None,
    decoding: dict[str, Any],
    wording: list[str] | None,
) -> dict[str, Any]:
    model = {"model": scored.model, "checkpoint": scored.checkpoint, "step": step}
    how = {key: value for key, value in decoding.items() if key != "template"}
    resolution = task.questions[0].metadata.get("resolution")
    template = {
        "template": decoding["template"],
        "decoding": how if resolution is None else {**how, "resolution": resolution},
    }
    return {"benchmark": task.name, **model, **template, "wording": wording, **scores}


def _write_table(out: Path, scored: ScoredModel) -> None:
    """Write `results.md` from all results of this model in the folder, including those of earlier calls."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*/results.json"))]
    results = [result for result in found if result["checkpoint"] == scored.checkpoint]
    published = yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))
    write_atomically(out / "results.md", markdown(results, published).encode())
    print(f"{out}: results.md, and results.json with every answer in the folder of each benchmark", flush=True)
