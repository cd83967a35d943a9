"""How answers are generated, as a plain dataclass and as options of a command line. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from tinygptv_ds.errors import require


@dataclass(frozen=True)
class Generation:
    """Settings of generation, checked when made; greedy unless told otherwise.

    The original's demos sample: temperature 1.0 (stage 4: 0.6), top_p 0.9, repetition_penalty 1.05.

    Attributes:
        max_new_tokens: an answer is no longer.
        min_new_tokens: no end token before.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw among the likeliest tokens that make up this probability; 1 for all.
        top_k: draw among so many of the likeliest; 0 for all.
        num_beams: beam search, with as many beams; 1 for none.
        repetition_penalty: divides the scores of tokens that the answer holds already (the prompt does not count, as in
            the original, whose prompts are embeddings); 1 for none.
        length_penalty: of beam search; above 1 prefers longer answers.
        seed: of the draws; None draws differently each time. With a seed a question has the same answer in any batch.
        stop: texts that end an answer and are no part of it; None: those of the prompt.

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

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        most = self.max_new_tokens
        require(0 <= self.min_new_tokens <= most, f"min_new_tokens must lie in 0 to {most}, not {self.min_new_tokens}")
        require(0 <= self.temperature <= 100, f"temperature must lie in 0 (greedy) to 100, not {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must lie above 0 and up to 1, not {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 (all) or more, not {self.top_k}")
        require(1 <= self.num_beams <= 64, f"num_beams must lie in 1 to 64, not {self.num_beams}")
        penalty = self.repetition_penalty
        require(0 < penalty <= 10, f"repetition_penalty must lie above 0 (1: none) and up to 10, not {penalty}")
        require(abs(self.length_penalty) <= 10, f"length_penalty must lie in -10 to 10, not {self.length_penalty}")
        require(self.seed is None or 0 <= self.seed < 2**63, f"seed must be a whole number from 0 on, not {self.seed}")
        require(all(self.stop or ()), "stop holds an empty text; leave it out")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


_HELP = {
    "max_new_tokens": "tokens of an answer at most",
    "min_new_tokens": "no end before so many tokens",
    "temperature": "0: the likeliest token; above: draw",
    "top_p": "draw among the likeliest tokens of this probability",
    "top_k": "draw among so many tokens; 0: all",
    "num_beams": "beam search",
    "repetition_penalty": "above 1 avoids what the answer holds already",
    "length_penalty": "of beam search; above 1 prefers longer answers",
    "seed": "of the draws (default: another one each time)",
}
_TYPES = {"int": int, "float": float, "int | None": int}


def add_generation_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One option for each field of `Generation`; `defaults` replace its own."""
    group = parser.add_argument_group("generation")
    for field in fields(Generation):
        if field.name == "stop":
            continue
        default = defaults.get(field.name, field.default)
        shown = "" if default is None else " (default: %(default)s)"
        option, kind = "--" + field.name.replace("_", "-"), _TYPES[field.type]
        group.add_argument(option, type=kind, default=default, metavar="N", help=_HELP[field.name] + shown)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends an answer; may be repeated (default: of the template)"
    )


def generation_from(args: argparse.Namespace) -> Generation:
    """The settings of a command line with `add_generation_arguments`.

    Raises:
        ConfigError: a value is out of range.
    """
    values = {field.name: getattr(args, field.name) for field in fields(Generation)}
    return Generation(**values | {"stop": None if args.stop is None else tuple(args.stop)})
