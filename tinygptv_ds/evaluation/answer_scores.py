"""From generated text to an answer and its score, for the benchmarks that TinyGPT-V reports.

Each score has two rules. The default is strict, that of MiniGPT-v2's evaluation: the answer, which ends at `###`, must
equal the true one, case aside, and an empty answer is never right. `compat` is what TinyGPT-V's own script computes,
looser and with its mistakes, to compare with its numbers. For GQA and VSR that looks at the whole continuation, so give
it text that was not stopped at `###`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinygptv_ds.evaluation.vqa_accuracy import vqa_accuracy

SHORT_ANSWER = "[vqa] Based on the image, respond to this question with a short answer: {}"


def as_decoded(text: str) -> str:
    """Generated text as the original's decoding hands it on: up to `</s>`, and what follows the last `[/INST]`."""
    return text.partition("</s>")[0].replace("<s>", "").rpartition("[/INST]")[2].strip()


def cut(text: str) -> str:
    """What stands before the first `###`, and of that what follows the last `Assistant:`."""
    return text.partition("###")[0].rpartition("Assistant:")[2].strip()


def clean_answer(text: str) -> str:
    """`cut` without `<unk>`: what the strict rules take for the answer."""
    return cut(text.replace("<unk>", ""))


def okvqa_answer(text: str, *, compat: bool = False) -> str:
    """The answer that is scored and saved for OK-VQA, in lower case.

    The original lower-cases first and therefore never finds `Assistant:`.
    """
    if compat:
        return text.lower().replace("<unk>", "").strip().partition("###")[0].strip()
    return clean_answer(text).lower()


def okvqa_accuracy(text: str, references: Sequence[str], *, compat: bool = False) -> float:
    """VQA accuracy in per cent (`vqa_accuracy`) against the ten references."""
    answer = okvqa_answer(text, compat=compat)
    return vqa_accuracy(answer, references) if answer or compat else 0.0


def vizwiz_accuracy(text: str, references: Sequence[str], *, compat: bool = False) -> float:
    """min(1, n / 3), from 0 to 1, with n the references that match, case aside.

    In the original one that contains the answer or is contained in it matches too, so that an empty answer matches all,
    and a reference with `_` counts as several, since the references come joined by that.
    """
    if compat:
        answer = cut(text).lower()
        truths = "_".join(references).lower().split("_")
        matches = sum(truth in answer or answer in truth for truth in truths)
    else:
        answer = clean_answer(text).lower()
        matches = sum(answer == reference.strip().lower() for reference in references) if answer else 0
    return min(matches / 3, 1.0)


def hateful_memes_label(text: str, *, compat: bool = False) -> int | None:
    """1 for yes, 0 for no, None for anything else, which is always wrong.

    In the original an answer that contains `yes` is a yes, and one that contains `no`, as "another" does, a no.
    """
    if compat:
        answer = cut(text).lower()
        return 1 if "yes" in answer else 0 if "no" in answer else None
    return {"yes": 1, "no": 0}.get(clean_answer(text).lower())


def gqa_hit(text: str, label: str, *, compat: bool = False) -> bool:
    """Whether the answer is the label; in the original, whether the lower-cased text contains it as it is written."""
    return label in text.lower() if compat else _equal(text, label)


def vsr_hit(text: str, label: str, *, compat: bool = False) -> bool:
    """Whether the answer is the label, `true` or `false`; in the original's first version, whether the text has it."""
    return label.lower() in text.lower() if compat else _equal(text, label)


def vsr_points(text: str, label: str) -> int:
    """0 to 2 points for a statement, by the original's second version (eval_scripts/eval_vqa.py).

    One for the label in the text, one more for `yes` (true) or `no` (false) anywhere in it, as in "know". The original
    prints their mean as the accuracy, which it is not: it can exceed 100 %.
    """
    synonym = {"true": "yes", "false": "no"}.get(label.lower())
    return vsr_hit(text, label, compat=True) + (synonym is not None and synonym in text.lower())


def _equal(text: str, label: str) -> bool:
    answer = clean_answer(text).lower()
    return answer != "" and answer == label.strip().lower()
