"""From generated text to an answer and its score, for the benchmarks that TinyGPT-V reports.

Each score has two rules. The default is strict, as in MiniGPT-v2's evaluation: the answer, which ends at `###`, must
equal the true one, ignoring case, and an empty answer is never right. `compat` is what TinyGPT-V's own script computes,
looser and with its mistakes, to compare with its numbers. On GQA and VSR that uses the whole continuation, so give it
text that was not stopped at `###`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinygptv_ds.evaluation.vqa_accuracy import vqa_accuracy

SHORT_ANSWER = "[vqa] Based on the image, respond to this question with a short answer: {}"


def as_decoded(text: str) -> str:
    """Return generated text as the original decodes it: up to `</s>`, and only what follows the last `[/INST]`."""
    return text.partition("</s>")[0].replace("<s>", "").rpartition("[/INST]")[2].strip()


def cut_turn(text: str) -> str:
    """Return the text before the first `###`, and of that only what follows the last `Assistant:`."""
    return text.partition("###")[0].rpartition("Assistant:")[2].strip()


def clean_answer(text: str) -> str:
    """Return the answer as the strict rules take it: `cut_turn` without `<unk>`."""
    return cut_turn(text.replace("<unk>", ""))


def okvqa_answer(text: str, *, compat: bool = False) -> str:
    """Return the answer that is scored and saved for OK-VQA, in lower case.

    The original converts to lower case first and therefore never finds `Assistant:`.
    """
    if compat:
        return text.lower().replace("<unk>", "").strip().partition("###")[0].strip()
    return clean_answer(text).lower()


def okvqa_accuracy(text: str, references: Sequence[str], *, compat: bool = False) -> float:
    """Return the VQA accuracy in per cent (`vqa_accuracy`) against the ten references."""
    answer = okvqa_answer(text, compat=compat)
    return vqa_accuracy(answer, references) if answer or compat else 0.0


def vizwiz_accuracy(text: str, references: Sequence[str], *, compat: bool = False) -> float:
    """Return min(1, n / 3), from 0 to 1, where n references match, ignoring case.

    In the original a reference also matches if it contains the answer or is contained in it, so an empty answer matches
    all; and a reference with `_` counts as several, because the original joins the references by that.
    """
    if compat:
        answer = cut_turn(text).lower()
        truths = "_".join(references).lower().split("_")
        matches = sum(truth in answer or answer in truth for truth in truths)
    else:
        answer = clean_answer(text).lower()
        matches = sum(answer == reference.strip().lower() for reference in references) if answer else 0
    return min(matches / 3, 1.0)


def hateful_memes_label(text: str, *, compat: bool = False) -> int | None:
    """Return 1 for yes, 0 for no, None for anything else, which is always wrong.

    In the original an answer that contains `yes` is a yes, and one that contains `no`, as "another" does, a no.
    """
    if compat:
        answer = cut_turn(text).lower()
        return 1 if "yes" in answer else 0 if "no" in answer else None
    return {"yes": 1, "no": 0}.get(clean_answer(text).lower())


def gqa_hit(text: str, label: str, *, compat: bool = False) -> bool:
    """Return whether the answer is the label; in the original, whether the lower-case text contains the exact label."""
    return label in text.lower() if compat else _equal(text, label)


def vsr_hit(text: str, label: str, *, compat: bool = False) -> bool:
    """Return whether the answer is the label, `true` or `false`; in the original's first version, whether it has it."""
    return label.lower() in text.lower() if compat else _equal(text, label)


def vsr_points(text: str, label: str) -> int:
    """Return 0 to 2 points for a statement, as the original's second version does (eval_scripts/eval_vqa.py).

    One for the label in the text, one more for `yes` (true) or `no` (false) anywhere in it, as in "know". The original
    prints their mean as accuracy, although it can exceed 100 %.
    """
    synonym = {"true": "yes", "false": "no"}.get(label.lower())
    return vsr_hit(text, label, compat=True) + (synonym is not None and synonym in text.lower())


def _equal(text: str, label: str) -> bool:
    answer = clean_answer(text).lower()
    return answer != "" and answer == label.strip().lower()
