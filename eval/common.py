"""What the evaluation scripts share: their options, and the way from a model and questions to scores in a folder."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tinygptv_ds.config.evaluation_section import SPLITS
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.distributed import Ranks, ranks_from_env, together, wait_for_all
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation import answer_log
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Task
from tinygptv_ds.evaluation.benchmarks.table import open_held_out, open_published, places_of
from tinygptv_ds.evaluation.report import line_of, markdown, save_json, write_scalars
from tinygptv_ds.evaluation.scoring import scalars, score
from tinygptv_ds.evaluation.wording import Settings, Wording, wording
from tinygptv_ds.files import write_atomically

if TYPE_CHECKING:
    from tinygptv_ds.evaluation.scored_model import MadeBy

_PUBLISHED = Path(__file__).with_name("published.yaml")


def parser(description: str, benchmarks: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options of an evaluation script that knows some published `benchmarks`."""
    options = argparse.ArgumentParser(
        description=description,
        epilog="On several GPUs: deepspeed eval/SCRIPT.py ... or torchrun --nproc-per-node 8 eval/SCRIPT.py ...",
    )
    options.add_argument("--model", type=Path, required=True, help="an exported folder, a run, a checkpoint or a file")
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", help="a folder, glob or brace pattern of held-out shards")
    if benchmarks:
        source.add_argument("--benchmarks", metavar="NAME,...", help=f"of {', '.join(benchmarks)}")
        options.add_argument(
            "--root", type=Path, default=Path(), help="where the benchmarks' files lie (default: here)"
        )
    if any(SPLITS[name] for name in benchmarks):
        options.add_argument("--splits", metavar="NAME,...", help="only these (default: all of each benchmark)")
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another place of a benchmark's files (gqa.images=FOLDER) or of base weights (model.phi=FOLDER)",
    )
    options.add_argument("--limit", type=int, help="only the first N questions of each")
    options.add_argument(
        "--template",
        help="benchmark: the published scripts' own; training: the model's; A, B, C: as in docs/inference.md; or a "
        "template, {} for the question "
        "(default: benchmark, and training for shards)",
    )
    options.add_argument("--show-prompt", action="store_true", help="print the first prompt of each, and end")
    options.add_argument("--max-new-tokens", type=int, default=20, help="of an answer at most (default: %(default)s)")
    options.add_argument(
        "--batch-size", type=int, default=32, help="questions at once on a rank (default: %(default)s)"
    )
    options.add_argument(
        "--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 on a GPU, else fp32"
    )
    options.add_argument(
        "--add-bos-token", action="store_true", help="start prompts with the BOS token, as in training"
    )
    options.add_argument("--recipe", type=Path, metavar="FILE", help="of weights that do not tell what they belong to")
    options.add_argument("--out", type=Path, metavar="DIR", help="answers and results (default: runs/eval/MODEL)")
    options.add_argument("--fresh", action="store_true", help="do not go on from answers that are there; remove them")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result of a single benchmark here too")
    options.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="for the scores (default: that of the model's run, if it has one)",
    )
    options.add_argument("--step", type=int, help="of the scores on TensorBoard (default: the model's)")
    options.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return options


def evaluate(args: argparse.Namespace, kind: str, benchmarks: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Check, ask, score, write and print; the results on rank 0, nothing elsewhere.

    Args:
        args: from `parser`.
        kind: what held-out shards hold: vqa, refer or caption.
        benchmarks: the published ones that may be named.

    Raises:
        TinyGPTVError: options, files or weights that the user has to mend.
    """
    settings = Settings(args.template, args.max_new_tokens, args.batch_size, args.add_bos_token)
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: there is nothing to ask")
    tasks = open_tasks(args, kind, benchmarks)
    if args.json and len(tasks) > 1:
        raise ConfigError(f"--json takes one result, but there are {len(tasks)}: they are written to --out")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.show_prompt:
        _show_prompts(args, tasks, settings)
        return []
    ranks = ranks_from_env()
    with together(ranks):
        return _score(args, tasks, settings, ranks)


def open_tasks(args: argparse.Namespace, kind: str, benchmarks: Sequence[str]) -> list[Task]:
    """The questions of all that is named, from files that have been checked."""
    places = [text for text in args.set if not text.startswith("model.")]
    if args.shards is not None:
        return [open_held_out(kind, args.shards, args.limit, instruction=getattr(args, "instruction", None))]
    checks, tasks = Checks(), []
    for name in args.benchmarks.split(","):
        if name not in benchmarks:
            raise ConfigError(f"--benchmarks: {name!r} is none of these{nearest(name, benchmarks)}")
        for split in _splits(name, getattr(args, "splits", None)):
            tasks.append(open_published(name, split, places_of(name, args.root, places), checks, args.limit))
    checks.finish()
    return tasks


def _splits(name: str, asked: str | None) -> Sequence[str]:
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
    from tinygptv_ds.evaluation.scored_model import config_of

    config = config_of(args.model, _of_model(args), args.recipe)
    for task in tasks:
        words = wording(task.benchmark, settings, config.prompt_template, config.end_sym)
        until = f"the answer ends at {words.stop or 'the end token'!r}"
        if task.questions[0].choices:
            until = f"the likeliest choice counts, each with {words.choice_end!r} behind it"
        print(f"{task.name}: {words.text(task.questions[0])!r}; {until}")


def _of_model(args: argparse.Namespace) -> list[str]:
    return [text for text in args.set if text.startswith("model.")]


def _score(args: argparse.Namespace, tasks: Sequence[Task], settings: Settings, ranks: Ranks) -> list[dict[str, Any]]:
    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.evaluation.runner import Asker
    from tinygptv_ds.evaluation.scored_model import made_by
    from tinygptv_ds.generate.load import load_model

    dtype = take_device(args.dtype, ranks)
    maker = made_by(args.model)
    board, step = args.tensorboard or maker.board, args.step if args.step is not None else maker.step
    if args.tensorboard and step is None:
        raise ConfigError(f"{args.model} does not tell its step: give --step for TensorBoard")
    out = args.out or Path("runs/eval") / args.model.resolve().name
    model, processor = load_model(args.model, DTYPES[dtype], recipe=args.recipe, overrides=_of_model(args))
    asker = Asker(model, processor, settings, ranks)
    results = []
    for task in tasks:
        words = wording(task.benchmark, settings, model.config.prompt_template, model.config.end_sym)
        decoding = _decoding(words, settings, dtype)
        folder = out / task.name
        _begin(folder, {"checkpoint": maker.checkpoint, **decoding}, ranks, fresh=args.fresh)
        asked = [f"{question.key}\n{words.text(question)}\n{question.choices}" for question in task.questions]
        with answer_log.opened(folder, ranks.rank, asked) as log:
            answers = asker.ask(task, words, log)
        if ranks.is_main:
            result = _result(task, score(task, answers, words.end), maker, step, decoding)
            save_json(folder / "results.json", result)
            print(line_of(result), flush=True)
            if board is not None and step is not None:
                write_scalars(board, scalars(result, task.name), step)
            results.append(result)
    if ranks.is_main:
        _write_table(out, maker)
        if args.json:
            save_json(args.json, results[0])
    return results


def take_device(dtype: str, ranks: Ranks) -> str:
    """Make the rank's GPU, if there is one, the current one; the dtype's name, "auto" being bf16 there, else fp32."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    return dtype if dtype != "auto" else "bf16" if on_gpu else "fp32"


def _begin(folder: Path, settings: dict[str, Any], ranks: Ranks, *, fresh: bool) -> None:
    """Rank 0 makes the folder ready; where it holds other answers, all ranks end alike."""
    if not fresh:
        answer_log.refuse_others(folder, settings)
    wait_for_all(ranks)
    if ranks.is_main:
        answer_log.begin(folder, settings, fresh=fresh)
    wait_for_all(ranks)


def _decoding(words: Wording, settings: Settings, dtype: str) -> dict[str, Any]:
    return {
        "template": words.template.text,
        "stop": words.stop,
        "choice_end": words.choice_end,
        "max_new_tokens": settings.max_new_tokens,
        "add_bos_token": settings.add_bos_token,
        "search": "greedy",
        "dtype": dtype,
    }


def _result(
    task: Task, scored: dict[str, Any], maker: MadeBy, step: int | None, decoding: dict[str, Any]
) -> dict[str, Any]:
    made = {"model": maker.model, "checkpoint": maker.checkpoint, "step": step}
    template = {"template": decoding["template"], "decoding": {k: v for k, v in decoding.items() if k != "template"}}
    return {"benchmark": task.name, **made, **template, **scored}


def _write_table(out: Path, maker: MadeBy) -> None:
    """Of all results of this model in the folder, those of earlier calls too."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*/results.json"))]
    results = [result for result in found if result["checkpoint"] == maker.checkpoint]
    published = yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))
    write_atomically(out / "results.md", markdown(results, published).encode())
    print(f"{out}: results.md, and results.json with every answer in the folder of each benchmark", flush=True)
