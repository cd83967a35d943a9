"""What is shown of a growing answer is the answer itself, and nothing of what ends it."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinygptv_ds.generate.stopping import StopAtText, StreamedText, cut

TEXTS = st.text(alphabet="#ab \né😀.'s", max_size=24)
STOPS = st.lists(st.text(alphabet="#a\n é", min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters and stops come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@given(TEXTS, STOPS, st.lists(st.integers(0, 24), max_size=6), st.booleans())
@example("#aa", ["a", "#aa"], [2], False)  # the shorter one is there before the one that begins earlier
@example("ab ' s", [], [4, 5], True)  # the apostrophe's space goes only if another one follows it
@example("ab ' .", [], [5], True)
def test_pieces_are_the_answer_for_any_split(text: str, stops: list[str], splits: list[int], clean: bool) -> None:
    shown = StreamedText(stops, clean=clean)
    pieces = [shown.piece(text[:at]) for at in sorted(splits)]
    pieces.append(shown.piece(text, complete=True))
    assert "".join(pieces) == cut(text, stops, clean=clean)
    so_far = ""
    for piece in pieces if not clean else ():  # cleaned up, a text may read like a stop that it did not hold
        so_far += piece
        assert not any(stop in so_far for stop in stops if stop.strip() == stop)


@given(st.text(alphabet="#aé😀 ", max_size=12), st.sampled_from([("###",), ("###", "\n"), ("😀",), ("a😀", "#é")]))
def test_bytes_one_by_one(letters: PreTrainedTokenizerFast, text: str, stops: tuple[str, ...]) -> None:
    """Half a character is held back until it is whole."""
    ids = letters(text)["input_ids"]
    shown = StreamedText(stops)
    pieces = [shown.piece(letters.decode(ids[:end])) for end in range(1, len(ids) + 1)]
    assert "".join(pieces) + shown.piece(letters.decode(ids), complete=True) == cut(text, stops)
    assert "\ufffd" not in "".join(pieces)


def test_nothing_that_may_become_a_stop_is_shown() -> None:
    shown = StreamedText(("###",))
    assert [shown.piece(text) for text in ("a", "a #", "a ##", "a ##b", "a ##b#", "a ##b###c")] == [
        "a", "", "", " ##b", "", "",
    ]  # fmt: skip
    assert shown.stopped


@given(st.lists(st.text(alphabet="#ab", max_size=9), min_size=1, max_size=4), st.integers(0, 9))
def test_rows_end_each_by_itself(letters: PreTrainedTokenizerFast, texts: list[str], least: int) -> None:
    """A row ends with the token that completes a stop, whatever lies before it."""
    ends = StopAtText(letters, ("###", "ab"), least)
    rows = [letters(text + "b" * (9 - len(text)))["input_ids"] for text in texts]
    for length in range(1, 10):
        now = ends(torch.tensor(rows)[:, :length], None).tolist()
        for row, ended in zip(rows, now, strict=True):
            tail = letters.decode(row[max(0, length - 3) : length])
            assert ended == (length >= least and ("###" in tail or "ab" in tail))
