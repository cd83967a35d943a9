"""Token counts without a tokenizer."""

import pytest

from tinygptv_ds.processing.lengths import estimate_tokens, pool_tokens, text_lengths


@pytest.mark.parametrize(
    ("text", "tokens"),  # counted with GPT-2's vocabulary
    [
        ("", 0),
        ("a red bus on the left", 6),
        ("what colour is the bus ?", 6),
        ("{<12><34><56><78>}", 9),
        ("[refer] give me the location of the dog", 10),
        ("it's 1984, isn't it?", 9),
    ],
)
def test_near_gpt2(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == pytest.approx(tokens, abs=1)


def test_beyond_ascii_counts_more() -> None:
    assert estimate_tokens("一辆红色的公共汽车") >= 9
    assert estimate_tokens("caf\udce9") >= 1  # what a damaged file holds


@pytest.mark.parametrize(
    ("record", "lengths"),
    [
        ({"caption": "A red bus!"}, (0, 3)),
        ({"caption": " ".join(["bus"] * 80)}, (0, 50)),  # cleaned: 50 words
        ({"caption": " ".join(["bus"] * 80), "clean": []}, (0, 80)),
        ({"pool": None, "text": "what is it", "answer": ["bus", "a red bus"]}, (3, 2)),
        ({"conversation": [["one two", "three"], ["four", "five six"]]}, (2, 4)),
        ({"conversation": []}, (0, 0)),
        ({"conversation": "text"}, (0, 0)),
        ({"answer": None}, (0, 0)),
        ({"text": 3, "answer": [1, None], "pool": ["x"], "clean": "no"}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_records(record: dict, lengths: tuple[int, int]) -> None:
    assert text_lengths(record) == lengths


def test_pools_count_in_the_mean() -> None:
    question, _ = text_lengths({"pool": "vqa", "text": "a b c d", "answer": "e"})
    assert question == 4 + pool_tokens("vqa")
    assert 4 <= pool_tokens("vqa") <= 12
    assert pool_tokens("unheard of") == 0
