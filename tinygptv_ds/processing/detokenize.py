"""From token ids back to text, to the letter as the original decodes with transformers 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers 4.36 applies these one after another to the whole text; transformers 5 does not for BPE.
_REPLACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_LONGEST = max(map(len, _REPLACED))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens and as they spell it."""
    # transformers 5 warns where the tokenizer asks for a clean-up that it would not do.
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether transformers 4 cleans up the spaces of this tokenizer's text: by default, as for Phi-2."""
    return bool(tokenizer.init_kwargs.get("clean_up_tokenization_spaces", True))


def clean_up(text: str) -> str:
    """Take spaces from in front of punctuation and contractions: "it 's red , is n't it" is "it's red, isn't it".

    As everything that transformers 4 decoded, with its oddities: "0 .5" is "0.5" and "a 'very' b" is "a'very' b".
    """
    for pattern in _REPLACED:
        text = text.replace(pattern, pattern.strip())
    return text


def settled_length(text: str) -> int:
    """Return how much of a growing text, from its beginning, is cleaned up alike whatever follows it."""
    # A pattern starts with a space. None straddles the end of what is settled, before or after other replacements, if
    # no space is among its last characters, since a replacement only takes spaces away.
    end = len(text)
    while (space := text.find(" ", max(end - _LONGEST + 1, 0), end)) >= 0:
        end = space
    return end
