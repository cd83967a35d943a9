"""CIDEr and BLEU of captions, as the COCO caption server computes them, without its Java.

CIDEr is pycocoevalcap's, the server's own code; BLEU is sacrebleu's. Both count the words of the server's
PTBTokenizer, which NLTK's Treebank tokenizer reproduces without Java.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.benchmarks.question import Question

PACKAGES = ("pycocoevalcap", "sacrebleu", "nltk")
# Punctuation that the server removes; its list also has brackets, in capitals that its lower-case words never match.
_PUNCTUATION = re.compile(r"''|'|``|`|\.+|[?!,:;]|--?")


def check_packages() -> None:
    """Raise ConfigError if a package for caption scores is missing; imports none of them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"caption scores need {', '.join(missing)}, not installed: pip install -r requirements-eval.txt"
        )


def caption_words(caption: str) -> str:
    """Return the words of a caption joined by spaces, in lower case, without punctuation."""
    from nltk.tokenize import TreebankWordTokenizer

    found = TreebankWordTokenizer().tokenize(" ".join(caption.split()), convert_parentheses=True)
    return " ".join(word for word in map(str.lower, found) if not _PUNCTUATION.fullmatch(word))


def caption_scores(questions: Sequence[Question], captions: Sequence[str]) -> dict[str, float]:
    """Return `cider` (times 100, as papers print it) and `bleu_1` to `bleu_4` in per cent, over all captions.

    Args:
        questions: their truths are lists of people's captions, which may differ in length.
        captions: one generated caption for each question.
    """
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.metrics import BLEU

    ours = [caption_words(caption) for caption in captions]
    theirs = [[caption_words(truth) for truth in question.truth] for question in questions]
    if not ours:
        return {}
    cider, _ = Cider().compute_score(dict(enumerate(theirs)), {number: [each] for number, each in enumerate(ours)})
    most = max(map(len, theirs))
    # sacrebleu takes None for a missing reference, which its annotation does not allow.
    references: Any = [[each[k] if k < len(each) else None for each in theirs] for k in range(most)]
    scores = {"cider": 100.0 * float(cider)}
    for order in range(1, 5):
        bleu = BLEU(tokenize="none", max_ngram_order=order, smooth_method="none", force=True)
        scores[f"bleu_{order}"] = bleu.corpus_score(ours, references).score
    return scores
