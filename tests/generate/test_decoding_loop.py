"""Rows that join and leave a batch between steps get the answers that they get alone."""

from dataclasses import replace

import pytest
from helpers import tiny

from tinygptv_ds.generate.conversation import Conversation, Prompt
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.generate import answers, new_row
from tinygptv_ds.generate.load import LoadedModel
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.templates import training_template

GREEDY = Generation(max_new_tokens=14, stop=())
SETTINGS = [
    GREEDY,
    replace(GREEDY, temperature=1.0, top_p=0.9, seed=5),
    replace(GREEDY, max_new_tokens=5),
    replace(GREEDY, temperature=1.5, top_k=20, top_p=1.0, seed=6, repetition_penalty=1.5),
    replace(GREEDY, repetition_penalty=3.0, min_new_tokens=14),
    GREEDY,  # its stop is added below
    replace(GREEDY, max_new_tokens=1),
]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Unequal lengths, images in most."""
    images = tiny.encoded_images(4)
    template = training_template("[INST] {} [/INST]", "###")
    words = ["the bus", "what colour is it ?", "left or " * 9, "a", "a cat", "two men", "who?"]
    shown = [[], images[:1], images[1:3], images[3:], [], images[2:3], images[:2]]
    return [Conversation(template).ask(*asked) for asked in zip(words, shown, strict=True)]


def rows_of(loaded: LoadedModel, prompts: list[Prompt]) -> list[Row]:
    text = next(iter(answers(*loaded, prompts[5:6], GREEDY)))
    settings = [*SETTINGS[:5], replace(GREEDY, stop=(text[5:7],)), SETTINGS[6]]
    given = enumerate(zip(prompts, settings, strict=True))
    return [new_row(*loaded, prompt, settings, settings.seed or number) for number, (prompt, settings) in given]


def alone(loaded: LoadedModel, prompts: list[Prompt]) -> list[list[int]]:
    rows = rows_of(loaded, prompts)
    for row in rows:
        decoder = Decoder(*loaded)
        decoder.add([row])
        while decoder.running():
            decoder.step()
    return [row.ids for row in rows]


@pytest.mark.parametrize("joining", [[7], [1] * 7, [2, 0, 0, 3, 0, 2], [1, 0, 0, 0, 0, 0, 0, 6]], ids=str)
def test_who_joins_when_does_not_matter(loaded: LoadedModel, prompts: list[Prompt], joining: list[int]) -> None:
    """Token by token; `joining` is how many rows join before each step. The batch is empty in the end."""
    rows = rows_of(loaded, prompts)
    waiting, decoder = list(rows), Decoder(*loaded)
    for count in joining:
        if count:
            decoder.add([waiting.pop(0) for _ in range(count)])
        decoder.step()
    while decoder.running():
        decoder.step()
    assert [row.ids for row in rows] == alone(loaded, prompts)
    assert {row.finish for row in rows} == {"stop", "length"}
    assert decoder.rows == []


def test_who_leaves_does_not_matter(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    """The longest row and another one leave; they get no further token, and the others their own answers."""
    rows = rows_of(loaded, prompts)
    decoder = Decoder(*loaded)
    decoder.add(rows)
    decoder.step()
    rows[2].closed = rows[0].closed = True
    while decoder.running():
        decoder.step()
    expected = alone(loaded, prompts)
    assert [row.ids for row in rows] == [expected[0][:2], expected[1], expected[2][:2], *expected[3:]]
    assert rows[0].finish == rows[2].finish == "closed"


def test_the_cache_holds_no_more_than_the_longest_row(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    rows = rows_of(loaded, prompts)
    decoder = Decoder(*loaded)
    decoder.add(rows)
    longest = max(rows, key=lambda row: len(row.prompt_ids))
    assert decoder._cache.get_seq_length() == len(longest.prompt_ids)
    longest.closed = True
    decoder.step()
    assert decoder._cache.get_seq_length() == max(len(row.prompt_ids) + len(row.ids) - 1 for row in decoder.rows)


def test_a_row_that_fails_leaves_the_batch_as_it_was(
    loaded: LoadedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(loaded, prompts)
    decoder = Decoder(*loaded)
    decoder.add(rows[:2])
    with monkeypatch.context() as broken:
        broken.setattr(loaded[0], "encode_vision", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.add(rows[2:4])
    decoder.add(rows[2:])  # again
    while decoder.running():
        decoder.step()
    assert [row.ids for row in rows] == alone(loaded, prompts)
