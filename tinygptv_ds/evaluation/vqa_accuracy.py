"""VQA accuracy (vqaEval.py of GT-Vision-Lab/VQA): an answer compared with those of ten people.

Its normalization is kept with its oddities, because every published OK-VQA and VQA v2 number depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
# The published pattern, `(?!<=\d)(\.)(?!\d)`, has a mistyped look-behind: digits before a period do not matter.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # re.UNICODE, which vqaEval.py passes where re.sub expects a count

_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}

# vqaEval.py also has the forms of "I", with a capital that lower-case words never match: "im" stays "im".
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A word that lacks one apostrophe gets it back; "somebody'd" is the wrong way round in vqaEval.py.
_CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form for form in _CONTRACTED.split() for at, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}


def single_line(answer: str) -> str:
    """Replace newlines and tabs by spaces, and strip the answer."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def remove_punctuation(answer: str) -> str:
    """Replace punctuation by spaces, or delete it if it is next to a space or the answer has a number like 1,000.

    Periods are deleted unless a digit follows. Apostrophes, `%`, `$`, `&`, `:` and others remain.
    """
    has_comma = _DIGITS_WITH_COMMA.search(answer) is not None
    result = answer
    for mark in _PUNCTUATION:
        next_to_space = f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if has_comma or next_to_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalize(answer: str) -> str:
    """Return lower case without punctuation and articles, `two` as `2`, `dont` as `don't`, with single spaces."""
    words = (_NUMBERS.get(word, word) for word in remove_punctuation(single_line(answer)).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, ground_truths: Sequence[str]) -> float:
    """Return the accuracy of one answer in per cent, as the official scorer of VQA v2 and OK-VQA computes it.

    It is the mean, over the people, of min(1, n / 3), where n of the others gave this answer. Both sides are normalized
    only if the people differ; case never matters.

    Args:
        prediction: the answer alone.
        ground_truths: the answer of each person, at least one; ten in the published sets.
    """
    answer, truths = single_line(prediction), [single_line(truth) for truth in ground_truths]
    if len(set(truths)) > 1:
        answer, truths = normalize(answer), [normalize(truth) for truth in truths]
    return _percent([truth.lower() == answer.lower() for truth in truths])


def _percent(matches: Sequence[bool]) -> float:
    """Return the accuracy from whose answer matches; computed in thirds, so that 90 is not 89.99999."""
    agreeing = sum(matches)
    return 100 * sum(min(3, agreeing - match) for match in matches) / (3 * len(matches))
