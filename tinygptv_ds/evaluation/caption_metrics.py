"""CIDEr and BLEU of captions, as the COCO caption server computes them, without its Java.

CIDEr is pycocoevalcap's, the server's own code; BLEU is sacrebleu's. Both count the words that the server's
PTBTokenizer would make, which NLTK's Treebank tokeniser makes without Java.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.benchmarks.question import Question

PACKAGES = ("pycocoevalcap", "sacrebleu", "nltk")
# What the server leaves out; its list has brackets too, in capitals that its lower-cased words never match.
_PUNCTUATION = re.compile(r"''|'|``|`|\.+|[?!,:;]|--?")


def check_packages() -> None:
    """Raise ConfigError where the packages for captions are not there; imports nothing of them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"caption scores need {', '.join(missing)}, not installed here: pip install -r requirements-eval.txt"
        )


def words(caption: str) -> str:
    """The caption's words with spaces between, lower case, punctuation left out."""
    from nltk.tokenize import TreebankWordTokenizer

    found = TreebankWordTokenizer().tokenize(" ".join(caption.split()), convert_parentheses=True)
    return " ".join(word for word in map(str.lower, found) if not _PUNCTUATION.fullmatch(word))


def caption_scores(questions: Sequence[Question], captions: Sequence[str]) -> dict[str, float]:
    """`cider` (times 100, as papers print it) and `bleu_1` to `bleu_4` in per cent, over all captions.

    Args:
        questions: whose truth is the list of people's captions; unequal numbers of them are fine.
        captions: one generated caption each.
    """
    from pycocoevalcap.cider.cider import Cider
    from sacrebleu.metrics import BLEU

    ours = [words(caption) for caption in captions]
    theirs = [[words(truth) for truth in question.truth] for question in questions]
    if not ours:
        return {}
    cider, _ = Cider().compute_score(dict(enumerate(theirs)), {number: [each] for number, each in enumerate(ours)})
    most = max(map(len, theirs))
    references = [[each[k] if k < len(each) else None for each in theirs] for k in range(most)]
    scores = {"cider": 100.0 * float(cider)}
    for order in range(1, 5):
        bleu = BLEU(tokenize="none", max_ngram_order=order, smooth_method="none", force=True)
        scores[f"bleu_{order}"] = bleu.corpus_score(ours, references).score
    return scores
