import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.template_names import PROMPT_POOLS
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG, clean_caption, load_prompts, render


def last(n: int) -> int:
    return n - 1


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A DOG. Running!", "a dog running"),
        ("what color? it's a/b, [x] {y} <z> 3-4", "what color? it's a/b, [x] {y} <z> 3-4"),  # all of these stay
        ("a\nb\tc", "a\nb\tc"),  # lone tabs and newlines are neither squeezed nor word breaks
        ("\na", "\na"),  # only trailing newlines go
        ("a \n b", "a b"),  # a run of mixed white space does
        ("a\u00a0\u2003b", "a b"),  # Unicode white space counts
        ("İ", "i̇"),  # lower() may lengthen
        ("", ""),
        ("...", ""),
    ],
)
def test_clean_caption(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_clean_caption_keeps_fifty_words() -> None:
    assert clean_caption("w " * 60) == " ".join(["w"] * 50)
    assert clean_caption("a b c", max_words=2) == "a b"


@given(st.text())
def test_clean_caption_twice_is_once(text: str) -> None:
    """Some of the original's readers clean twice, ours never do; the result must be the same."""
    once = clean_caption(text)
    assert clean_caption(once) == once


def test_prompts_are_usable() -> None:
    """Every entry has at most one slot, the stage-3 prompts one image each, and no spaces got lost in YAML."""
    pools = load_prompts().pools
    assert tuple(pools) == PROMPT_POOLS
    assert {name: len(entries) for name, entries in pools.items()} == {
        "vqa": 2,
        "refer": 7,
        "identify": 7,
        "grounding": 4,
        "detection": 1,
        "caption": 17,
        "stage3": 4,
    }
    assert all(entry.count("{}") <= 1 for entries in pools.values() for entry in entries)
    assert all(entry.count(IMAGE_PLACEHOLDER) == 1 for entry in pools["stage3"])
    assert sum(entry.endswith(" ") for entry in pools["caption"]) == 3
    for name, entries in pools.items():
        assert name == "stage3" or all(entry.startswith(f"[{name}] ") for entry in entries)


def test_unknown_pool_is_named() -> None:
    with pytest.raises(DataError, match=r"'vqx'.*vqa, refer"):
        render({"pool": "vqx", "text": "a", "answer": "b"}, 1, last)


def test_caption_is_cleaned_unless_the_record_or_the_caller_says_no() -> None:
    assert render({"caption": "A."}, 1, last).turns == ((None, "a"),)
    assert render({"caption": "A.", "clean": []}, 1, last).turns == ((None, "A."),)
    assert render({"caption": "A."}, 1, last, clean=False).turns == ((None, "A."),)


def test_single_turn_with_image_and_without() -> None:
    record = {"pool": "vqa", "text": "IS {} it?", "answer": "Yes.", "clean": ["text", "answer"]}
    first = render(record, 1, lambda n: 0)
    assert first.turns == (("<Img><ImageHere></Img> [vqa] is {} it? ", "yes"),)
    record = {"pool": None, "text": "Say A.", "answer": "A.", "clean": ["answer"]}
    assert render(record, 0, last).turns == (("Say A.", "a"),)
    assert render(record, 0, last, clean=False).turns == (("Say A.", "A."),)


def test_draws_come_in_a_fixed_order_also_for_single_choices() -> None:
    """Otherwise a sentence added to a record would also change unrelated later draws."""
    sizes: list[int] = []

    def draw(n: int) -> int:
        sizes.append(n)
        return n - 1

    record = {"pool": "refer", "text": ["a", "b", "c"], "answer": ["x", "y"], "clean": []}
    assert render(record, 1, draw).turns == ((f"{IMAGE_TAG} [refer] where can I locate the c ? ", "y"),)
    render({"pool": None, "text": "a", "answer": "x"}, 1, draw)
    assert sizes == [3, 7, 2, 1, 1, 1]


def test_conversation_wraps_the_first_question_only() -> None:
    record = {"conversation": [["Q1", "A1."], [" Q2", "A2"], ["Q3", None]], "clean": []}
    assert render(record, 1, last).turns == ((f"{IMAGE_TAG} Q1 ", "A1."), (" Q2 ", "A2"))
    assert render(record, 0, last).turns == (("Q1", "A1."), (" Q2", "A2"))
    cleaned = render(record | {"clean": ["text", "answer"]}, 1, last).turns
    assert cleaned == ((f"{IMAGE_TAG} q1 ", "a1"), ("q2 ", "a2"))


def test_several_images() -> None:
    record = {"pool": None, "text": "which?", "answer": "both"}
    assert render(record, 2, last).turns == ((f"{IMAGE_TAG}{IMAGE_TAG} which? ", "both"),)
    record = {"pool": None, "text": f"{IMAGE_TAG} or {IMAGE_TAG}?", "answer": "both", "raw": True}
    assert render(record, 2, last).turns == ((record["text"], "both"),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "none of the fields"),
        ({"caption": None}, "'caption' must be a string, not NoneType"),
        ({"text": "a", "answer": []}, "'answer' is empty"),
        ({"text": "a", "answer": ["x", 3]}, r"'answer\[1\]' must be a string, not int"),
        ({"text": {"a": 1}, "answer": "x"}, "'text' must be a list, not dict"),
        ({"text": "a", "answer": "x", "clean": ["anser"]}, "not 'anser'"),
        ({"text": "a", "answer": "x", "clean": "text"}, "'clean' must be a list"),
        ({"text": f"{IMAGE_PLACEHOLDER}?", "answer": "x"}, "2 times '<ImageHere>', but the sample has 1 image"),
        ({"text": "a", "answer": "x", "raw": True}, "0 times"),
        ({"conversation": []}, "'conversation' is empty"),
        ({"conversation": [["q", None]]}, "no answered question"),
        ({"conversation": [["q", None], ["q", "a"]]}, r"'conversation\[0\]\[1\]'"),
        ({"conversation": [["q"]]}, r"'conversation\[0\]' must have 2 entries, not 1"),
    ],
)
def test_bad_records_name_the_field(record: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(record, 1, last)
