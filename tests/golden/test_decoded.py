"""The text of token ids, to the letter as the original decodes it: in benchmarks, in a conversation, in a stream."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.golden_model import read
from transformers import AutoTokenizer

from tinygptv_ds.evaluation.answer_scores import as_decoded, cut_turn, okvqa_answer
from tinygptv_ds.evaluation.box_scores import clean_box_answer
from tinygptv_ds.generate import generate
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.generate import AnswerStream
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.detokenize import clean_up, cleans_up, decode
from tinygptv_ds.processing.processor import TinyGPTVProcessor


@pytest.fixture(scope="module")
def known(golden: Path) -> dict:
    return read(golden / "full/decoded.json")


@pytest.fixture(scope="module")
def tokenizer(golden: Path, known: dict) -> Any:
    return AutoTokenizer.from_pretrained(golden / "full" / known["tokenizer"])


class Written:
    """What a model would have generated, in place of the decoding loop."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def add(self, rows: list[Row]) -> None:
        rows[0].ids, rows[0].ended = self._ids, True

    def running(self) -> bool:
        return False


class OneByOne(Written):
    """The same, token by token."""

    def add(self, rows: list[Row]) -> None:
        self._row, self._left = rows[0], list(self._ids)
        self.step()

    def step(self) -> None:
        if self._left:
            self._row.ids.append(self._left.pop(0))
        self._row.ended = not self._left

    def clear(self) -> None:
        pass


def row_of(tokenizer: Any, stops: tuple[str, ...]) -> Row:
    processor = SimpleNamespace(tokenizer=tokenizer, pixels=lambda _: None, end_ids=lambda _: [])
    return Row(processor, Prompt(("",), stop=stops), [0], Generation(), 0)


@pytest.fixture
def answer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def answered(ids: list[int], *stops: str, as_benchmark: bool = False) -> str:
        monkeypatch.setattr(generate, "Decoder", lambda *_, **__: Written(ids))
        monkeypatch.setattr(generate, "new_row", lambda *_: row_of(tokenizer, stops))
        found = generate.answers(
            None, SimpleNamespace(tokenizer=tokenizer), [None], Generation(), as_benchmark=as_benchmark
        )
        return "".join(found)

    return answered


@pytest.fixture
def cases(known: dict) -> Iterator[dict]:
    assert len(known["cases"]) > 50
    return iter(known["cases"])


def test_text(cases: Iterator[dict], known: dict, tokenizer: Any) -> None:
    assert cleans_up(tokenizer) is known["clean_up_tokenization_spaces"]
    for case in cases:
        text = decode(tokenizer, case["ids"])
        assert text == case["without_clean_up"], case
        assert (clean_up(text) if cleans_up(tokenizer) else text) == case["decoded"], case


def test_benchmarks(cases: Iterator[dict], answer: Any) -> None:
    """What each benchmark makes of a generated answer, before it scores it."""
    for case in cases:
        text = as_decoded(answer(case["ids"], as_benchmark=True))
        assert text == case["generate"], case
        scored = {
            "okvqa": okvqa_answer(text, compat=True),
            "vizwiz": cut_turn(text),
            "hateful_memes": cut_turn(text),
            "gqa": text.lower(),
            "vsr": text.lower(),
            "refcoco": clean_box_answer(text),
        }
        assert scored == {name: value for name, value in case["scored"].items() if name in scored}, case


def test_conversations(cases: Iterator[dict], answer: Any, tokenizer: Any) -> None:
    """An answer ends at its stop; the original's also loses what it has in front of a last `Assistant:`.

    Pieces of a stream are the answer, unlike the original's, and so is what the processor decodes.
    """
    processor = TinyGPTVProcessor.answers
    for case in cases:
        text = answer(case["ids"], "###")
        assert cut_turn(text) == case["chat_answer"], case
        assert text == case["decoded"].partition("###")[0].strip(), case
        assert "".join(AnswerStream(OneByOne(case["ids"]), row_of(tokenizer, ("###",)))) == text, case
        own = SimpleNamespace(tokenizer=tokenizer, end_sym="###")
        assert processor(own, torch.tensor([case["ids"]])) == [text], case
