"""Scores of answers in free words against true answers: equality, containment and token F1. No torch.

Words are compared in lower case and without punctuation. A word is a run of letters and digits of any script; of
Chinese, Japanese and Korean, which put no spaces between words, every character is one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’][^\W_{_CJK}]+)*")


def without_marks(answer: str) -> str:
    """Return the answer in lower case, without surrounding punctuation."""
    return answer.lower().strip(" .,!?:;\"'")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def equals(answer: str, truths: Sequence[str]) -> float:
    """Return 100 if the answer is one of the true ones, ignoring case and surrounding punctuation, else 0."""
    given = without_marks(answer)
    return 100.0 * (given != "" and any(given == without_marks(truth) for truth in truths))


def contains(answer: str, truths: Sequence[str]) -> float:
    """Return 100 if all words of a true answer occur in the answer, one after the other, else 0."""
    given = words(answer)
    return 100.0 * any(_contains(given, words(truth)) for truth in truths)


def token_f1(answer: str, truths: Sequence[str]) -> float:
    """Return the token F1 in per cent with the true answer that it is highest with.

    With n words in both texts, each counted as often as it occurs in both, precision is n / words of the answer, recall
    n / words of the true answer, and F1 their harmonic mean: 200 n / (words of both together). Word order does not
    matter. It is SQuAD's F1 without its removal of articles.
    """
    return max((_f1(words(answer), words(truth)) for truth in truths), default=0.0)


def _contains(given: list[str], wanted: list[str]) -> bool:
    size = len(wanted)
    return size > 0 and any(given[at : at + size] == wanted for at in range(len(given) - size + 1))


def _f1(given: list[str], wanted: list[str]) -> float:
    common = sum((Counter(given) & Counter(wanted)).values())
    return 200.0 * common / (len(given) + len(wanted)) if common else 0.0
