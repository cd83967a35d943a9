"""What the evaluation scripts share: reading questions from shards, asking a model, saving results."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tinygptv_ds.data.cache import ShardCache, count_samples
from tinygptv_ds.data.reader import ShardReader
from tinygptv_ds.data.shards import expand_shards
from tinygptv_ds.disk import whole_file
from tinygptv_ds.errors import ConfigError, DataError


@dataclass(frozen=True)
class Question:
    """One question of a benchmark: its key, its words, its pictures, the true answer and the stored record."""

    key: str
    text: str
    images: tuple[bytes, ...]
    truth: str
    record: dict


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all evaluation scripts have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", type=Path, required=True, help="an exported folder or a finished run directory")
    options.add_argument("--shards", required=True, help="a folder, glob or brace pattern of held-out shards")
    options.add_argument("--limit", type=int, help="only the first N questions")
    options.add_argument("--template", help="wraps the question, {} stands for it (default: the one of the training)")
    options.add_argument("--max-new-tokens", type=int, default=20)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="fp32")
    options.add_argument(
        "--begin-token", action="store_true", help="start prompts with the begin token, as in training"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write scores and every prediction here")
    return options


def read_questions(shards: str, limit: int | None) -> list[Question]:
    """Single-turn questions of held-out shards, in stored order.

    Raises:
        DataError: no shards, or a sample that holds no single question.
    """
    cache = ShardCache()
    reader = ShardReader(cache=cache)
    questions: list[Question] = []
    tars = expand_shards(shards)
    for tar, count in zip(tars, count_samples(tars, cache), strict=True):
        for index in range(count):
            if limit is not None and len(questions) == limit:
                return questions
            raw = reader.read(tar, index)
            text, answer = raw.record.get("text"), raw.record.get("answer")
            if not isinstance(text, str) or not isinstance(answer, str):
                raise DataError(f"{tar}: sample {raw.key} holds no single question with one answer")
            questions.append(Question(raw.key, text, raw.images, answer, raw.record))
    return questions


def ask(args: argparse.Namespace, questions: list[Question], instruction: str) -> list[str]:
    """Load the model and answer all questions greedily; `instruction` holds `{}` for a question's words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.infer.generate import load_model

    model, processor = load_model(args.model, DTYPES[args.dtype])
    return ask_model(model, processor, questions, instruction, args)


def ask_model(
    model: object, processor: object, questions: list[Question], instruction: str, args: argparse.Namespace
) -> list[str]:
    """As `ask`, with a model that is loaded already."""
    from tqdm import tqdm

    from tinygptv_ds.infer.generate import answers
    from tinygptv_ds.processing.sequence import wrap
    from tinygptv_ds.processing.text import IMAGE_TAG

    template = args.template or model.config.prompt_template
    if template is not None and template.count("{}") != 1:
        raise ConfigError(f"--template {template!r} must hold {{}} exactly once")
    prompts = [
        (wrap(template, f"{IMAGE_TAG * len(q.images)} {wrap(instruction, q.text)} "), q.images) for q in questions
    ]
    stop = model.config.end_sym if template is None else "###"
    given = answers(
        model,
        processor,
        prompts,
        stop=stop,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        begin_token=args.begin_token,
    )
    return list(tqdm(given, total=len(prompts), desc=args.desc, unit="question", disable=None))


def save_json(path: Path, result: dict) -> None:
    """Write `result`, complete or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
