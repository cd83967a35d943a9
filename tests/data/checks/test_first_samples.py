"""The first sample of every dataset in one line each, as it is in the stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.checks.preview_samples import CUT, IMAGE, PROMPT, TARGET, TURN, Piece, Preview
from tinygptv_ds.data.checks.preview_text import first_of_each, marked
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.plan import OpenStream, open_stream
from tinygptv_ds.processing.sequence import ImageTokens

RAW = Callable[..., dict[str, Any]]


def firsts(raw: dict[str, Any]) -> tuple[OpenStream, list[Preview]]:
    recipe = build_recipe(raw, "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    tokens = Tokens(tokenizer, recipe.text, ImageTokens(-1, tiny.QUERIES), tiny.IMAGE_SIZE)
    stream = open_stream(recipe)
    return stream, list(first_of_each(stream, tokens))


@pytest.mark.parametrize("homogeneous", [False, True])
def test_they_are_the_first_that_training_sees(homogeneous: bool, raw_recipe: RAW) -> None:
    """Of each dataset the one with the least position in the stream, exactly as it is there."""
    raw = raw_recipe(data__homogeneous=homogeneous)
    for weight, dataset in enumerate(raw["data"]["datasets"], start=1):
        dataset["weight"] = weight
    stream, shown = firsts(raw)
    seen = {}
    for step in range(40):
        for ref in stream.order.step(step):
            seen.setdefault(ref.dataset, ref)
    assert [preview.ref for preview in shown] == [seen[name] for name in stream.names]


def test_one_that_cannot_be_read_is_passed_over(raw_recipe: RAW, tmp_path: Path) -> None:
    made = tiny.samples("vqa", 3)
    torn = [type(made[0])(sample.key, sample.record, (sample.images[0][:100],)) for sample in made]
    some, none = (
        tiny.write_shards(tmp_path / name, kept) for name, kept in (("some", [torn[0], made[1]]), ("none", torn))
    )
    raw = raw_recipe(data__datasets=[{"name": "some", "shards": str(some)}, {"name": "none", "shards": str(none)}])
    _, (usable, unusable) = firsts(raw)
    assert usable.skipped is None and usable.key == made[1].key
    assert unusable.skipped is not None and unusable.skipped[0] == "corrupt_image"


def test_marks() -> None:
    pieces = [
        Piece("[INST] ", PROMPT, 0),
        Piece("image 1: 3 tokens", IMAGE, 1, image=0),
        Piece("image 2: 3 tokens", IMAGE, 4, image=1),
        Piece("what", PROMPT, 7),
        Piece("a", TARGET, 8),
        Piece(" bus\n", TARGET, 9),
        Piece("", TURN, 10),
        Piece("and", PROMPT, 10),
        Piece(" then", CUT, 11),
    ]
    expected = "[INST] [image 1: 3 tokens][image 2: 3 tokens]what<<a bus\\n>> [next turn] and~~ then~~"
    assert marked(pieces) == expected
