"""Settings of generation, as a dataclass and as options of a command line. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from tinygptv_ds.errors import require

MAX_LOGPROBS = 20  # as in OpenAI's API
_LOWEST_TEMPERATURE = 1e-6
_NO_OPTIONS = ("stop", "logprobs")  # the first has an option of another kind, the second none


@dataclass(frozen=True)
class Generation:
    """Settings of generation, checked on creation; greedy by default.

    The original's demos sample: temperature 1.0 (stage 4: 0.6), top_p 0.9, repetition_penalty 1.05.

    Attributes:
        max_new_tokens: the maximum length of an answer.
        min_new_tokens: the number of tokens before which an answer does not end.
        temperature: 0 takes the likeliest token; above 0 tokens are sampled (below 1e-6 it is 0, because logits over it
            would leave fp32).
        top_p: sample among the likeliest tokens up to this total probability; 1: all.
        top_k: sample among this number of likeliest tokens; 0: all.
        num_beams: the number of beams of beam search; 1: no beam search.
        repetition_penalty: divides the scores of tokens that the answer already has, the prompt's not included, as in
            the original, whose prompts are embeddings; 1: no penalty.
        length_penalty: above 1, beam search prefers longer answers.
        seed: seed of sampling; None: another one each time. With a seed a prompt has the same answer in any batch.
        stop: texts that end an answer and are not part of it; None: those of the prompt.
        logprobs: keep the log-probability of each token, and of this number of likeliest ones at its place; None: no.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 300
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        most = self.max_new_tokens
        require(0 <= self.min_new_tokens <= most, f"min_new_tokens must be in 0 to {most}, not {self.min_new_tokens}")
        require(0 <= self.temperature <= 100, f"temperature must be in 0 (greedy) to 100, not {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 (all) or more, not {self.top_k}")
        require(1 <= self.num_beams <= 64, f"num_beams must be in 1 to 64, not {self.num_beams}")
        penalty = self.repetition_penalty
        require(0 < penalty <= 10, f"repetition_penalty must be above 0 (1: none) and at most 10, not {penalty}")
        require(abs(self.length_penalty) <= 10, f"length_penalty must be in -10 to 10, not {self.length_penalty}")
        require(
            self.seed is None or 0 <= self.seed < 2**63, f"seed must be a whole number of at least 0, not {self.seed}"
        )
        require(all(self.stop or ()), "stop contains an empty text; leave it out")
        require(
            self.logprobs is None or (0 <= self.logprobs <= MAX_LOGPROBS and self.num_beams == 1),
            f"logprobs must be in 0 to {MAX_LOGPROBS}, without beam search, not {self.logprobs}",
        )

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature >= _LOWEST_TEMPERATURE


_HELP = {
    "max_new_tokens": "maximum number of tokens of an answer",
    "min_new_tokens": "minimum number of tokens of an answer",
    "temperature": "0: the likeliest token; above 0: sample",
    "top_p": "sample among the likeliest tokens up to this total probability",
    "top_k": "sample among this number of likeliest tokens; 0: all",
    "num_beams": "number of beams; 1: no beam search",
    "repetition_penalty": "above 1: avoid tokens that the answer already has",
    "length_penalty": "above 1: beam search prefers longer answers",
    "seed": "seed of sampling (default: another one each time)",
}
_TYPES = {"int": int, "float": float, "int | None": int}


def add_generation_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add one option for each field of `Generation`; `defaults` replace its own."""
    group = parser.add_argument_group("generation")
    for field in fields(Generation):
        if field.name in _NO_OPTIONS:
            continue
        default = defaults.get(field.name, field.default)
        shown = "" if default is None else " (default: %(default)s)"
        option, kind = "--" + field.name.replace("_", "-"), _TYPES[str(field.type)]
        group.add_argument(option, type=kind, default=default, metavar="N", help=_HELP[field.name] + shown)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text that ends an answer; repeatable (default: that of the template)",
    )


def generation_from(args: argparse.Namespace) -> Generation:
    """Return the settings of a command line with `add_generation_arguments`.

    Raises:
        ConfigError: a value is out of range.
    """
    values = {field.name: getattr(args, field.name) for field in fields(Generation) if field.name not in _NO_OPTIONS}
    return Generation(**values | {"stop": None if args.stop is None else tuple(args.stop)})
