"""A user's own entries in the spellings of the usual trainers: the same sample, or a reason with what to do."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinygptv_ds.data.prepare.prepare import prepare
from tinygptv_ds.data.sets import own
from tinygptv_ds.data.sets.common import PreparedSample, Skipped
from tinygptv_ds.data.sets.own_entries import build_entry, parse_columns
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_TAG, render

Q, A = "What is shown?", "A ball."
TALK = [{"from": "human", "value": f"<image>\n{Q}"}, {"from": "gpt", "value": A}]
CHAT = [{"role": "user", "content": f"<image>{Q}"}, {"role": "assistant", "content": A}]


@pytest.fixture(scope="module")
def pics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pics")
    for name in ("a.png", "b.png", "sub/g.png", "mask.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pixels() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(out, "PNG")
    return out.getvalue()


def read(entries: Any, pics: Path, tmp_path: Path, **columns: str) -> list:
    """Read entries as a JSON list."""
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    return list(own.llava(tmp_path, tmp_path / "mine.json", pics, columns))


def turns(sample: PreparedSample | Skipped) -> tuple:
    assert isinstance(sample, PreparedSample), sample
    return render(sample.record, len(sample.images), lambda n: n - 1).turns


def urls(data: bytes) -> list[str]:
    plain = base64.b64encode(data).decode()
    return [plain, f"data:image/png;base64,{plain}"]


# ---- what is read ----------------------------------------------------------------------------------------------------

SAME = {  # entries that all hold the one image and the one question
    "LLaVA": {"image": "a.png", "conversations": TALK},
    "no mark": {"image": "a.png", "conversations": [{"from": "human", "value": Q}, TALK[1]]},
    "mark behind": {"image": "a.png", "conversations": [{"from": "human", "value": f"{Q}\n<image>"}, TALK[1]]},
    "images": {"images": ["a.png"], "conversations": TALK},
    "role in conversations": {"image": "a.png", "conversations": CHAT},
    "ms-swift": {"messages": CHAT, "images": ["a.png"]},
    "ms-swift's dict": {"messages": CHAT, "images": [{"bytes": None, "path": "a.png"}]},
    "ms-swift's query": {"query": f"<image>{Q}", "response": A, "images": ["a.png"]},
    "ShareGPT": {"conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}], "img": "a.png"},
    "Alpaca": {"instruction": Q, "input": "", "output": A, "images": ["a.png"], "system": "", "history": []},
    "LLaMA-Factory with empty media": {"messages": CHAT, "images": ["a.png"], "videos": [], "audios": None},
    "OpenAI's parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": Q}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": A}]},
        ]
    },
    "Hugging Face's parts": {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": Q}]}, CHAT[1]],
        "images": ["a.png"],
    },
    "part with a path": {
        "messages": [{"role": "User", "content": [{"type": "image", "path": "a.png"}, {"text": Q}]}, CHAT[1]]
    },
    "image of the turn": {"conversations": [{"from": "human", "value": Q, "image": "a.png"}, TALK[1]]},
    "Qwen-VL": {
        "conversations": [
            {"from": "user", "value": f"Picture 1: <img>a.png</img>\n{Q}"},  # codespell:ignore
            {"from": "assistant", "value": A},
        ]
    },
    "MiniCPM-V": {
        "image": {"<image_00>": "a.png"},
        "conversations": [{"role": "user", "content": f"<image_00>\n{Q}"}, {"role": "assistant", "content": A}],
    },
    "XTuner": {"image": "a.png", "conversation": [{"system": "", "input": f"<image>\n{Q}", "output": A}]},
    "our own record": {"image": "a.png", "conversation": [[Q, A]]},
    "JSON in a cell": {"image": "a.png", "conversations": json.dumps(TALK)},
    "other marks": {"image": "a.png", "question": f"<|image_1|>\n{Q}", "answer": A},
    "upper-case keys": {"Image": "a.png", "Question": Q, "Answer": A},
    "winding path": {"image": "./sub/../a.png", "question": Q, "answer": A},
    "backslash": {"image": "sub\\..\\a.png", "question": Q, "answer": A},
    "question and caption": {"image": "a.png", "prompt": Q, "caption": A},
    "answers of people": {"image": "a.png", "question": Q, "answers": [{"answer": A, "answer_id": 1}]},
    "another key for the same file": {"image": "a.png", "file_name": "a.png", "question": Q, "answer": A},
    "where it came from": {
        "image": "a.png",
        "url": "https://example.com/x.jpg",
        "source": "old/4.jpg",
        "query": Q,
        "response": A,
    },
    "end token": {"image": "a.png", "question": Q, "answer": f"{A}<|endoftext|>\n"},
    "empty later turn": {"image": "a.png", "conversations": [*TALK, {"from": "human", "value": "And?"}]},
    **{
        f"as {key}": {key: "a.png", "question": Q, "answer": A}
        for key in (
            "image_path",
            "image_file",
            "img_path",
            "file_name",
            "filename",
            "path",
            "pic",
            "photo",
            "image_url",
        )
    },
}


@pytest.mark.parametrize("name", SAME)
def test_read(name: str, pics: Path, tmp_path: Path) -> None:
    (sample,) = read([SAME[name]], pics, tmp_path)
    assert turns(sample) == ((f"{IMAGE_TAG} {Q} ", A),)
    assert sample.images == (pics / "a.png",)


def test_other_texts(pics: Path, tmp_path: Path) -> None:
    """System texts, turns out of turn, histories, several images, and entries without any."""
    second = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    cases = [
        ({"image": "a.png", "conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
         ((f"{IMAGE_TAG} Be brief.\n{Q} ", A),)),
        ({"image": "a.png", "system": "Be brief.", "messages": CHAT}, ((f"{IMAGE_TAG} Be brief.\n{Q} ", A),)),
        ({"conversations": [{"from": "gpt", "value": "Go on."}, *second]}, (("Sure?", "Yes."),)),
        ({"conversations": [second[0], second[0], *second[1:]]}, (("Sure?\nSure?", "Yes."),)),
        ({"conversations": [*second, second[1]]}, (("Sure?", "Yes.\nYes."),)),
        ({"conversations": [*second, {"from": "system", "value": "Now:"}, *second]},
         (("Sure?", "Yes."), ("Now:\nSure?", "Yes."))),
        ({"image": "a.png", "query": "Sure?", "response": "Yes.", "history": [[f"<image>{Q}", A]]},
         ((f"{IMAGE_TAG} {Q} ", A), ("Sure? ", "Yes."))),
        ({"instruction": "Translate.", "input": "Hut", "output": "hat"}, (("Translate.\nHut", "hat"),)),
        ({"image": ["a.png", "b.png"], "question": "<image> or <image>?", "answer": A},
         ((f"{IMAGE_TAG} or {IMAGE_TAG}?", A),)),
        ({"image": "", "question": Q, "answer": A}, ((Q, A),)),
        ({"image": math.nan, "question": Q, "answer": A, "url": "https://example.com/"}, ((Q, A),)),
        ({"text": Q, "answer": A}, ((Q, A),)),
        (second, (("Sure?", "Yes."),)),
        ({"image": "a.png", "caption": [A]}, ((None, A),)),
    ]  # fmt: skip
    for entry, expected in cases:
        (sample,) = read([entry], pics, tmp_path)
        assert turns(sample) == expected, entry
    (sample,) = read(
        [{"images": ["a.png", "b.png"], "question": "<image_2> or <image_1>?", "answer": A}], pics, tmp_path
    )
    assert sample.images == (pics / "b.png", pics / "a.png")
    (sample,) = read([cases[2][0]], pics, tmp_path)
    assert sample.notes == ("leading_answer_dropped",)


def test_images_in_the_entry_itself(pics: Path, tmp_path: Path, pixels: bytes) -> None:
    for value in urls(pixels):
        (sample,) = read([{"image": value, "question": Q, "answer": A}], pics, tmp_path)
        assert sample.images == (pixels,)
    record, images, _ = build_entry({"image": {"bytes": pixels, "path": "x.png"}, "question": Q, "answer": A}, pics, {})
    assert (record["text"], images) == (Q, [pixels])


def test_absolute_paths(pics: Path, tmp_path: Path) -> None:
    """Below the folder they are read, by whatever name that has; else the reason is true."""
    (tmp_path / "link").symlink_to(pics)
    for root in (pics, tmp_path / "link"):
        for name in (pics / "a.png", tmp_path / "link/a.png", f"file://{pics}/a.png"):
            (sample,) = read([{"image": str(name), "question": Q, "answer": A}], root, tmp_path)
            assert sample.images == (root / "a.png",)
    (skipped,) = read([{"image": str(tmp_path / "a.png"), "question": Q, "answer": A}], pics, tmp_path)
    assert skipped.reason == "outside_root"


# ---- what is skipped -------------------------------------------------------------------------------------------------

LONG = {"question": Q, "answer": A}
SKIPPED = [
    ({"foto": "a.png", **LONG}, "unknown_image_key", "did you mean 'photo'.? .*--columns foto=photo"),
    ({"imagefiles": ["a.png", "b.png"], **LONG}, "unknown_image_key", "did you mean 'images'"),
    ({"id": "a.jpg", **LONG}, "unknown_image_key", "--columns id="),
    ({"meta": {"source": ["x", {"f": "a.JPEG"}]}, **LONG}, "unknown_image_key", "'meta' holds 'a.JPEG'"),
    ({"image": "a.png", "mask": "mask.png", **LONG}, "unknown_image_key", "'mask' holds 'mask.png'"),
    ({"image": "a.png", "file_name": "b.png", **LONG}, "ambiguous_images", "--columns file_name="),
    ({"video": "a.mp4", **LONG}, "unsupported_media", "'video' is not read"),
    ({"videos": ["a.mp4"], "messages": CHAT}, "unsupported_media", "'videos'"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "unsupported_media", "video"),
    ({"question": "<video>\nWhat?", "answer": A}, "unsupported_media", "<video>"),
    ({"image": "https://example.com/a.jpg", **LONG}, "url_not_fetched", "URLs are not fetched; download"),
    ({"image": "s3://bucket/a.jpg", **LONG}, "url_not_fetched", "URLs are not fetched"),
    ({"url": "https://example.com/a", "caption": A}, "url_not_fetched", "URLs are not fetched"),
    ({"image": "C:\\data\\a.png", **LONG}, "outside_root", "path of another machine"),
    ({"image": "a.png", "question": Q, "answer": "<image> shows a ball"}, "mark_in_answer", "remove it"),
    ({"image": "a.png", "caption": "<Image> of a ball"}, "mark_in_answer", "remove it"),
    ({"image": "a.png", "conversations": TALK * 2}, "bad_record", r"2 time.* for 1 image.*; mark each image once"),
    ({"question": "<image>?", "answer": A}, "bad_record", "1 time.* for 0 image.*; name the image under"),
    ({"image": "a.png", "conversations": [TALK[0], {"from": "gpt", "value": ""}]}, "empty_answer", "answer is empty"),
    ({"image": "a.png", "question": Q, "answer": " "}, "empty_answer", "its answer is empty"),
    ({"image": "a.png", "caption": "NaN"}, "empty_answer", "means that there is no value"),
    ({"image": "a.png", "caption": math.nan}, "empty_answer", "'caption' is empty"),
    ({"image": "a.png", "question": Q, "answer": f"{A}<|endoftext|> And"}, "special_token", "remove it"),
    ({"image": "a.png", "question": f"{Q}<|endoftext|>", "answer": A}, "special_token", "remove it"),
    ({"image": "a.png", "conversations": [{"from": "tool", "value": "x"}]}, "bad_record", "not read; the roles are"),
    ({"image": "a.png", "conversations": TALK, "messages": CHAT}, "bad_record", "--columns messages="),
    ({"image": "a.png", "chosen": "x", "rejected": "y"}, "missing_field", "keys are image, chosen, rejected; read"),
    ({"image": "a.png", "question": Q}, "missing_field", "has no 'answer'"),
    ({"caption": A}, "missing_image", "a caption that names no image"),
    ({"image": "a.png", "captions": [A, A]}, "bad_record", "2 captions"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "reason", "detail"), SKIPPED, ids=[str(n) for n in range(len(SKIPPED))])
def test_skipped(entry: dict, reason: str, detail: str, pics: Path, tmp_path: Path) -> None:
    (skipped,) = read([entry], pics, tmp_path)
    assert isinstance(skipped, Skipped), skipped
    assert skipped.reason == reason
    assert re.search(detail, skipped.detail), skipped.detail


# ---- --columns -------------------------------------------------------------------------------------------------------


def test_columns(pics: Path, tmp_path: Path) -> None:
    entry = {"foto": "a.png", "frage": Q, "antwort": A, "mask": "mask.png"}
    columns = parse_columns(["foto=image, frage=question", "Antwort=answer", "mask="])
    (sample,) = read([entry], pics, tmp_path, **columns)
    assert turns(sample) == ((f"{IMAGE_TAG} {Q} ", A),)
    (skipped,) = read([{"image": "b.png", **entry}], pics, tmp_path, **columns)
    assert "two keys are read as 'image'" in skipped.detail
    (sample,) = read([{"image": "b.png", **entry}], pics, tmp_path, **columns, image="")
    assert sample.images == (pics / "a.png",)
    (tmp_path / "mine.json").write_text(json.dumps([entry]))
    places = {"annotations": tmp_path / "mine.json", "image_root": pics}
    assert prepare("llava", tmp_path, tmp_path / "out", **places, columns=columns).samples == 1
    with pytest.raises(DataError, match=r"other settings \(columns\)"):
        prepare("llava", tmp_path, tmp_path / "out", **places, columns={**columns, "x": ""})
    with pytest.raises(DataError, match="takes no --columns"):
        prepare("gqa", tmp_path, tmp_path / "out", columns=columns)


@pytest.mark.parametrize("option", ["image", "a=b", "=image", "a=image,b=fotos"])
def test_columns_that_are_refused(option: str) -> None:
    with pytest.raises(DataError, match="OURS is one of image, conversations, question"):
        parse_columns([option])


# ---- properties ------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="ascii", exclude_characters="<>"), min_size=1).filter(str.strip)
ROLES = st.sampled_from([("human", "gpt"), ("user", "assistant"), ("User", "Assistant"), ("human", "bot")])
KEYS = st.sampled_from([("from", "value"), ("role", "content"), ("role", "value"), ("from", "text")])


@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    st.sampled_from(["conversations", "messages", "conversation", "Messages", "dialog"]),
    ROLES,
    KEYS,
    st.sampled_from(["image", "images", "img", "image_path", "file_name", "Image"]),
    st.sampled_from(["a.png", ["a.png"], {"path": "a.png"}, [{"path": "a.png", "bytes": None}], "sub\\..\\a.png"]),
    st.randoms(use_true_random=False),
)
def test_spelling_and_order_make_no_difference(
    pairs: list, talk: str, roles: tuple, keys: tuple, image: str, value: Any, rng: Any
) -> None:
    """Whatever keys are called and in whatever order they stand, the turns are the same and the image is there."""
    spoken = []
    for question, answer in pairs:
        for role, text in zip(roles, (question, answer), strict=True):
            items = [(keys[0], role), (keys[1], text)]
            rng.shuffle(items)
            spoken.append(dict(items))
    items = [(talk, spoken), (image, value), ("id", 7)]
    rng.shuffle(items)
    record, images, _ = build_entry(dict(items), Path("root"), {})
    assert record == {"conversation": [list(pair) for pair in pairs], "clean": [], "raw": False, "id": 7}
    assert images == [Path("root/a.png")]


WORDS = st.sampled_from(["a.png", "<image>", "user"])
INNER_KEYS = st.sampled_from(["from", "value", "role", "content", "type", "text", "image", "path"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_KEYS, inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "image",
    "images",
    "conversations",
    "messages",
    "question",
    "answer",
    "caption",
    "text",
    "history",
    "system",
    "x",
]


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))
def test_any_entry_gives_a_sample_or_a_reason(entry: dict) -> None:
    """And what looks like an image is an image of the sample, or there is no sample."""
    (made,) = own.Samples([entry], lambda value: build_entry(value, Path("root"), {}))
    if isinstance(made, PreparedSample) and not made.images:
        assert '.png"' not in json.dumps({key: entry[key] for key in ("image", "images", "x") if key in entry})
