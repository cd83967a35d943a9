"""A page of samples shows what the loader gives the model: its tokens, labels and pixels, and nothing of its own."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as changed
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny, verbs
from PIL import Image
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.checks import preview as verb
from tinygptv_ds.data.checks.preview_samples import CUT, PROMPT, TARGET, kinds_of, previews
from tinygptv_ds.data.loader.sample import Sample, Tokens, load_sample
from tinygptv_ds.data.sets.common import PreparedSample
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.processing.boxes import find_boxes
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens

RAW = Callable[..., dict[str, Any]]
FILE = Callable[..., Path]
ELEMENTS = ("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "span", "main", "article")
ELEMENTS += ("br", "strong", "div", "figure", "img", "svg", "rect")


@dataclass
class Card:
    """One sample of a page, read back from its HTML."""

    spans: list[tuple[str, str]] = field(default_factory=list)  # classes, text
    images: list[np.ndarray] = field(default_factory=list)  # [S, S, 3]
    boxes: list[tuple[int, str, tuple[float, ...]]] = field(default_factory=list)  # image, class, x y width height
    text: str = ""

    def words(self, kind: str) -> str:
        return "".join(text for classes, text in self.spans if kind in classes.split())


class Page(HTMLParser):
    """The cards of a page; every element on it is one of those that the page is made of."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.cards: list[Card] = []
        self._classes = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ELEMENTS, tag
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        self._classes = given.get("class") or ""
        if tag == "article":
            self.cards.append(Card())
        elif tag == "img":
            encoded = given["src"].removeprefix("data:image/png;base64,")
            self.cards[-1].images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))))
        elif tag == "rect" and "halo" not in self._classes:
            sides = tuple(float(given[name]) for name in ("x", "y", "width", "height"))
            self.cards[-1].boxes.append((len(self.cards[-1].images) - 1, self._classes.removeprefix("on "), sides))

    def handle_endtag(self, tag: str) -> None:
        self._classes = ""

    def handle_data(self, data: str) -> None:
        if self.cards:
            self.cards[-1].text += data
            if self._classes:
                self.cards[-1].spans.append((self._classes, data))


def page(recipe: Path, tmp_path: Path, *options: object) -> Page:
    out = tmp_path / "page.html"
    verbs.call(verb, recipe, "--out", out, *options)
    return Page(out)


def opened(raw: dict[str, Any]) -> tuple:
    recipe = build_recipe(raw, "test")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi)
    tokens = Tokens(tokenizer, recipe.text, ImageTokens(-1, tiny.QUERIES), recipe.model.image_size)
    return open_stream(recipe), tokens


def loaded(raw: dict[str, Any], steps: range) -> Iterator[Sample]:
    """What training reads."""
    stream, tokens = opened(raw)
    reader = ShardReader()
    for step in steps:
        for ref in stream.order.step(step):
            yield load_sample(stream, reader, ref, tokens)


def decode(raw: dict[str, Any], ids: np.ndarray) -> str:
    return opened(raw)[1].tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def data(folder: Path, *samples: tuple[dict[str, Any], int]) -> list[dict[str, str]]:
    """A dataset of these records with so many images each, as the recipe's `data.datasets`."""
    made = [
        PreparedSample(f"{number:06d}", record, tuple(tiny.encoded_images(images, seed=number)))
        for number, (record, images) in enumerate(samples)
    ]
    return [{"name": "d", "shards": str(tiny.write_shards(folder, made))}]


# ---- what the loader gives -------------------------------------------------------------------------------------------


def test_the_page_is_what_training_reads(raw_recipe: RAW, recipe_file: FILE, tmp_path: Path) -> None:
    """Sample by sample from the third step on: target words, read words, pixels, names."""
    long = {"prompt_template": "[INST] {} [/INST]", "end_sym": "###", "max_txt_len": 500}
    shown = page(recipe_file(text=long), tmp_path, "--start-step", 2, "--count", 16).cards
    samples = list(loaded(raw_recipe(text=long), range(2, 4)))
    assert {sample.ref.dataset for sample in samples} == {"vqa", "text", "chat", "pair"}
    for card, sample in zip(shown, samples, strict=True):
        row = sample.sequence
        targets = row.labels != IGNORE
        words = ~targets & (row.input_ids != -1)
        assert card.words("target") == decode(raw_recipe(), row.labels[targets])
        assert card.words("prompt") == decode(raw_recipe(), row.input_ids[words])
        images = [f"image {n + 1}: {tiny.QUERIES} tokens" for n in range(len(sample.pixels))]
        assert [text for classes, text in card.spans if "image" in classes] == images
        assert f"{len(row)} tokens, {targets.sum()} of them targets" in card.text and not card.words("cut")
        assert len(card.images) == len(sample.pixels)
        for ours, theirs in zip(card.images, sample.pixels, strict=True):
            assert np.array_equal(ours, theirs.transpose(1, 2, 0))
        where = f"step {sample.ref.position // 8}, position {sample.ref.position}, epoch {sample.ref.epoch}"
        assert where in card.text and f"{sample.ref.shard:05d}.tar: " in card.text and sample.ref.dataset in card.text


def test_every_token_is_seen_apart(raw_recipe: RAW, recipe_file: FILE, tmp_path: Path) -> None:
    """Neighbours differ in shade, and a token is one span."""
    (card,) = page(recipe_file(), tmp_path, "--dataset", "text", "--count", 1).cards
    sample = next(sample for sample in loaded(raw_recipe(), range(9)) if sample.ref.dataset == "text")
    assert [text for _, text in card.spans if text][-len(sample.sequence) :] == [
        decode(raw_recipe(), sample.sequence.input_ids[i : i + 1]) for i in range(len(sample.sequence))
    ]
    words = [classes for classes, _ in card.spans if classes.split()[0] in (PROMPT, TARGET)]
    assert all(("odd" in one) != ("odd" in other) for one, other in pairwise(words))


@pytest.mark.parametrize("max_txt_len", [1, 20, 500])
@pytest.mark.parametrize("max_context_len", [1, 14, 3800])
def test_what_is_cut_off_is_seen_as_cut(raw_recipe: RAW, max_txt_len: int, max_context_len: int) -> None:
    """The tokens that are not marked as cut are the loader's, in its order; with those that are, nothing is missing."""
    limits = {"max_txt_len": max_txt_len, "max_context_len": max_context_len, "prompt_template": "[INST] {} [/INST]"}
    stream, tokens = opened(raw_recipe(text=limits))
    whole = changed(tokens, text=changed(tokens.text, max_txt_len=10_000, max_context_len=10_000))
    reader, cut = ShardReader(), 0
    for shown in previews(stream, tokens, first_step=0, number=8):
        kept = load_sample(stream, reader, shown.ref, tokens).sequence
        full = load_sample(stream, reader, shown.ref, whole).sequence
        answers = changed(tokens, text=changed(tokens.text, max_txt_len=10_000))
        kinds = kinds_of(kept, load_sample(stream, reader, shown.ref, answers).sequence, full, max_context_len)
        assert full.input_ids[kinds != CUT].tolist() == kept.input_ids.tolist()
        assert (full.position_ids[kinds != CUT] >= kept.position_ids).all()
        assert kinds[kinds != CUT].tolist() == [PROMPT if label == IGNORE else TARGET for label in kept.labels]
        assert shown.counts[CUT] == len(full) - len(kept)
        everything = "".join(piece.text for piece in shown.pieces if piece.image is None)
        assert everything == tokens.tokenizer.decode(full.input_ids[full.input_ids != -1].tolist())
        cut += shown.counts[CUT]
    assert (cut > 0) == (max_txt_len < 500 or max_context_len < 3800)


def test_letters_of_several_tokens(recipe_file: FILE, raw_recipe: RAW, tmp_path: Path) -> None:
    """Whole, although the tokenizer knows their bytes alone; where the limit falls inside one, the rest is cut."""
    datasets = data(tmp_path / "d", ({"text": "é 赤い\nbus", "answer": "🚌 赤"}, 0))
    (card,) = page(recipe_file(data__datasets=datasets), tmp_path, "--count", 1).cards
    assert "é 赤い\\n\nbus" in card.words("prompt") and card.words("target") == "🚌 赤###"
    (card,) = page(recipe_file(data__datasets=datasets), tmp_path, "--count", 1, "--set", "text.max_txt_len=4").cards
    assert card.words("target") == "🚌" and card.words("cut") == " 赤###"


def test_later_turns_begin_on_a_line_of_their_own(recipe_file: FILE, tmp_path: Path) -> None:
    shown = page(recipe_file(), tmp_path, "--dataset", "chat", "--count", 2)
    assert shown.source.count('<span class="turn"></span>') == 2 * 2  # three turns each


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_have_the_colour_of_their_words(recipe_file: FILE, tmp_path: Path) -> None:
    """Of prompt and answer; the same box has the same colour, and one that sticks out is drawn as it is."""
    one, two, out = "{<10><20><30><60>}", "{<0><50><100><75>}", "{<-5><90><120><99>}"
    datasets = data(tmp_path / "d", ({"text": f"what is in {one} ?", "answer": f"{two}<delim>{out} not {one}"}, 1))
    recipe = recipe_file(data__datasets=datasets, text={"max_txt_len": 200})
    (card,) = page(recipe, tmp_path, "--count", 1).cards
    colours = [colour for _, colour, _ in card.boxes]
    assert [sides for _, _, sides in card.boxes] == [(10, 20, 20, 40), (0, 50, 100, 25), (-5, 90, 125, 9)]
    assert len(set(colours)) == 3
    texts = {colour: card.words(colour) for colour in colours}
    assert list(texts.values()) == [one * 2, two, out]
    assert one in card.words("prompt") and card.words("target") == f"{two}<delim>{out} not {one}\\n\n"


def test_boxes_lie_on_the_image_before_them(recipe_file: FILE, tmp_path: Path) -> None:
    """And not at all where there is no image, or where the limit cuts them off."""
    box, tag = "{<1><2><3><4>}", "<Img><ImageHere></Img>"
    text = f"{tag} {box} and {tag} {box}"
    datasets = data(tmp_path / "d", ({"text": text, "answer": "x", "raw": True}, 2))
    (card,) = page(recipe_file(data__datasets=datasets), tmp_path, "--count", 1).cards
    assert [image for image, _, _ in card.boxes] == [0, 1]
    datasets = data(tmp_path / "e", ({"text": box, "answer": "x"}, 0))
    (card,) = page(recipe_file(data__datasets=datasets), tmp_path, "--count", 1).cards
    assert card.boxes == [] and box in card.words("prompt") and not card.words("box")
    datasets = data(tmp_path / "f", ({"text": "where", "answer": box}, 1))
    cut = page(recipe_file(data__datasets=datasets), tmp_path, "--count", 1, "--set", "text.max_txt_len=5").cards[0]
    assert cut.boxes == [] and cut.words("target") + cut.words("cut") == f"{box}###"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("{<1><2><3><100>}", [(1, 2, 3, 100)]),
        ("a {<1><2><3><4>}<delim>{<5><6><7><8>} b", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("{<-3><0><104><9>}", [(-3, 0, 104, 9)]),
        ("{<1><2><3>} {1 2 3 4} {<1> <2><3><4>} {<a><2><3><4>}", []),
    ],
)
def test_boxes_in_a_text(text: str, boxes: list) -> None:
    found = find_boxes(text)
    assert [each.box for each in found] == boxes
    assert all(text[each.start] == "{" and text[each.end - 1] == "}" for each in found)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_data_is_text_and_nothing_else(recipe_file: FILE, tmp_path: Path) -> None:
    """HTML in a record is shown as it is; the page loads nothing and runs nothing."""
    evil = '<script>alert(1)</script><img src=x onerror="y">&amp;"\'</p></article>'
    datasets = data(tmp_path / "d", ({"text": evil, "answer": evil}, 1))
    recipe = recipe_file(data__datasets=datasets)
    shown = page(recipe, tmp_path, "--count", 2)
    assert len(shown.cards) == 2
    for card in shown.cards:
        assert evil in card.words("prompt") and evil in card.words("target") and card.text.count(evil) == 2
    assert "http" not in shown.source and "url(" not in shown.source and "@import" not in shown.source
    assert "prefers-color-scheme: dark" in shown.source


def test_left_out_samples_stand_in_their_place_with_the_reason(
    recipe_file: FILE, raw_recipe: RAW, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The page is made all the same."""
    from tinygptv_ds.data.shards.writer import ShardWriter

    with ShardWriter(tmp_path / "d") as writer:
        for number in range(4):
            record = b"{" if number == 1 else json.dumps({"text": "q", "answer": "a"}).encode()
            writer.write(
                f"{number:03d}", {"json": record, "jpg": b"none" if number == 2 else tiny.encoded_images(1)[0]}
            )
    datasets = [{"name": "d", "shards": str(tmp_path / "d")}]
    recipe = recipe_file(data__datasets=datasets)
    shown = page(recipe, tmp_path, "--count", 4).cards
    order = [ref.index for ref in opened(raw_recipe(data__datasets=datasets))[0].order.step(0)][:4]
    for card, index in zip(shown, order, strict=True):
        assert f"00000.tar: {index:03d}" in card.text
        reason = {1: "left out: bad_json", 2: "left out: corrupt_image"}.get(index)
        assert reason in card.text if reason else "left out" not in card.text
    assert "4 samples, 2 of which training leaves out" in capsys.readouterr().out


def test_one_dataset_alone(raw_recipe: RAW, recipe_file: FILE, tmp_path: Path) -> None:
    """Its samples as they come in training, those between left away."""
    shown = page(recipe_file(), tmp_path, "--dataset", "pair", "text", "--count", 9).cards
    refs = [sample.ref for sample in loaded(raw_recipe(), range(9)) if sample.ref.dataset in ("pair", "text")][:9]
    for card, ref in zip(shown, refs, strict=True):
        assert f"position {ref.position}," in card.text


def test_a_page_is_whole_or_not_there(recipe_file: FILE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    recipe = recipe_file()
    monkeypatch.setattr("tinygptv_ds.files.sync", full)
    with pytest.raises(OSError, match="No space"):
        verbs.call(verb, recipe, "--out", tmp_path / "page.html", "--count", 1)
    assert not list(tmp_path.glob("page*"))


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "page.pdf"], r"must end in \.html"),
        (["--count", 0], "at least 1"),
        (["--start-step", -1], "at least 0"),
        (["--dataset", "vqa", "txt"], "--dataset txt: .* did you mean text"),
        (["--set", "data.only=[vqa]", "--dataset", "text"], "known here: vqa"),
        (["--set", "model.phi=nowhere"], "nowhere does not exist.*hf download microsoft/phi-2"),
        (["--set", "model.phi=."], "holds no tokenizer.*hf download microsoft/phi-2"),
    ],
)
def test_mistakes(
    options: list, message: str, recipe_file: FILE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        verbs.call(verb, recipe, *options)
    assert not list(tmp_path.glob("p*"))


def test_missing_shards(recipe_file: FILE, raw_recipe: RAW, tmp_path: Path) -> None:
    """Where they come from, and the option that shows the others."""
    datasets = [*raw_recipe()["data"]["datasets"][:2], {"name": "gqa", "shards": str(tmp_path / "none")}]
    with pytest.raises(DataError, match=r"(?s)train_balanced_questions\.json.*--set 'data\.only=\[vqa, text\]'$"):
        verbs.call(verb, recipe_file(data__datasets=datasets))
