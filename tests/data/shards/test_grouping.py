"""Tars made by hand: whatever the order and the names of their members, an image is used or its sample is skipped."""

import io
import json
import logging
import os
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.tars import make_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptv_ds.data.shards import index as index_module
from tinygptv_ds.data.shards.grouping import split_name
from tinygptv_ds.data.shards.index import ShardIndex, load_index, sample_count
from tinygptv_ds.data.shards.members import Member
from tinygptv_ds.data.shards.reader import RawSample, ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.processing.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from tinygptv_ds.processing.text import render

IN_ORDER = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OTHER_NAMES = [
    ("{}.image.jpg", "{}.json"),
    ("{}.0.webp", "{}.json"),
    ("k/{}.png", "k/{}.json"),
    ("./{}.jpeg", "./{}.json"),
    ("a.b.{}.jpg", "a.b.{}.json"),
    ("a.b.{}.0.jpg", "a.b.{}.json"),
    ("jpg/{}.jpg", "json/{}.json"),
    ("images/train/{}.jpg", "records/train/{}.json"),
    ("x/jpg/{}.jpg", "x/json/{}.json"),
]


def talk(number: int) -> bytes:
    return json.dumps({"conversation": [["what", f"a {number}"]], "clean": []}).encode()


def members(count: int, image: str = "{}.jpg", record: str = "{}.json") -> list[tuple[str, bytes]]:
    """Return the members of `count` conversations, each of whose images holds its number."""
    pairs = [((image.format(i), b"image %d" % i), (record.format(i), talk(i))) for i in range(count)]
    return [member for pair in pairs for member in pair]


def read_all(tar: Path) -> list[RawSample | str]:
    """Return every sample, or the reason why it drops out."""
    reader = ShardReader()
    found: list[RawSample | str] = []
    for i in range(sample_count(tar)):
        try:
            found.append(reader.read(tar, i))
        except SampleError as error:
            found.append(error.reason)
    return found


def assert_whole(tar: Path, count: int) -> None:
    """Check that there are `count` samples, each with the image and the record of one number."""
    found = read_all(tar)
    assert not [sample for sample in found if isinstance(sample, str)]
    numbers = sorted(int(sample.images[0].split()[1]) for sample in found)
    assert numbers == list(range(count))
    for sample in found:
        (image,) = sample.images
        assert sample.record["conversation"] == [["what", f"a {image.split()[1].decode()}"]]


def test_well_formed_indexes_keep_their_bytes(tmp_path: Path) -> None:
    """Those of shards that can only be read in one way stay of version 2; others are of version 3."""
    plain, apart = (
        make_tar(tmp_path / "0.tar", members(5)),
        make_tar(tmp_path / "1.tar", sorted(members(5), reverse=True)),
    )
    for tar, magic in (
        (plain, b"TGVidx2\n"),
        (apart, b"TGVidx2\n"),
        (make_tar(tmp_path / "2.tar", members(2, "{}.a.jpg")), b"TGVidx3\n"),
    ):
        load_index(tar)
        assert tar.with_suffix(".tar.idx").read_bytes()[:8] == magic


# ---- members that do not stand together ------------------------------------------------------------------------------


@IN_ORDER
@given(order=st.permutations(range(12)))
def test_any_order(order: list[int], tmp_path: Path) -> None:
    stored = members(6)
    assert_whole(make_tar(tmp_path / "0.tar", [stored[i] for i in order]), 6)


@IN_ORDER
@given(
    order=st.permutations(range(12)),
    image=st.sampled_from(
        [
            "{}.image.jpg",
            "k/{}.png",
            "./{}.jpeg",
            "a.b.{}.jpg",
            "{}.0.webp",
            "jpg/{}.jpg",
            "img/train/{}.jpg",
            "x/jpg/{}.jpg",
        ]
    ),
)
def test_any_order_of_other_names(order: list[int], image: str, tmp_path: Path) -> None:
    record = {"jpg/{}.jpg": "json/{}.json", "img/train/{}.jpg": "json/train/{}.json", "x/jpg/{}.jpg": "x/json/{}.json"}
    record = record.get(image, image.replace(".image", "").replace(".0.", ".").rpartition(".")[0] + ".json")
    stored = members(6, image, record)
    assert_whole(make_tar(tmp_path / "0.tar", [stored[i] for i in order]), 6)


def test_what_a_join_warns_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_index(make_tar(tmp_path / "0.tar", members(3, "http.example.com.{}.jpg", "http.example.com.{}.json")))
    assert "keys contain dots (such as those that begin with 'http.')" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_index(make_tar(tmp_path / "1.tar", members(3, "jpg/{}.jpg", "json/{}.json")))
    assert "different folders (json/" in caplog.text


def test_whole_samples_in_folders_are_not_joined(tmp_path: Path) -> None:
    """The same names in two folders, each with image and record, and a question without an image."""
    stored = [*members(2, "a/{}.jpg", "a/{}.json"), *members(2, "b/{}.jpg", "b/{}.json"), ("c/0.json", talk(0))]
    tar = make_tar(tmp_path / "0.tar", stored)
    assert [sample.key for sample in read_all(tar)] == ["a/0", "a/1", "b/0", "b/1", "c/0"]


def test_parts_are_joined_and_repetitions_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = [
        ("a.jpg", b"1"),
        ("b.json", talk(1)),
        ("a.json", talk(0)),
        ("b.png", b"2"),
        ("a.json", talk(9)),
        ("a.cls", b"3"),
    ]
    first, second = read_all(make_tar(tmp_path / "0.tar", stored))
    assert (first.images, first.record["conversation"]) == ((b"1",), [["what", "a 0"]])
    assert (second.images, second.record["conversation"]) == ((b"2",), [["what", "a 1"]])
    assert "1 keys occur more than once, such as a" in caplog.text


@pytest.mark.parametrize("keep", [6, 7, 11])
def test_a_cut_tar_of_records_first_gives_whole_samples(keep: int, tmp_path: Path) -> None:
    """A record whose image was lost behind the cut is not taken for text alone."""
    stored = members(6)
    tar = make_tar(tmp_path / "0.tar", stored[1::2] + stored[::2])
    with tarfile.open(tar) as file:
        os.truncate(tar, file.getmembers()[keep].offset_data + 3)
    assert_whole(tar, keep - 6)


# ---- names of images -------------------------------------------------------------------------------------------------


@IN_ORDER
@given(
    ending=st.sampled_from(sorted(IMAGE_SUFFIXES)),
    name=st.sampled_from(["7.{}", "7.image.{}", "7.0.{}", "7.img_0.{}", "7.DSC_0042.{}", "7.jpg.{}"]),
    upper=st.booleans(),
)
def test_an_image_of_any_ending_is_used(ending: str, name: str, upper: bool, tmp_path: Path) -> None:
    name = name.format(ending)
    tar = make_tar(tmp_path / "0.tar", [(name.upper() if upper else name, b"image 0"), ("7.json", talk(0))])
    assert_whole(tar, 1)
    assert load_index(tar).lengths[0, 0] == 1


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        *([[f"7.{ending}"], "unsupported_image"] for ending in sorted(UNREAD_SUFFIXES)),
        (["7.jpg", "7.png"], "ambiguous_images"),
        (["7.left.jpg", "7.right.jpg"], "ambiguous_images"),
        (["7.jpg", "7.mask.png"], "ambiguous_images"),
        (["7.jpg", "7.svg"], "ambiguous_images"),
        (["7.1.jpg", "7.2.jpg"], "missing_image"),
        (["7.a0.jpg", "7.a2.jpg"], "missing_image"),
    ],
)
def test_an_image_that_cannot_be_used_is_a_counted_skip(names: list[str], reason: str, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", [*((name, b"image 0") for name in names), ("7.json", talk(0))])
    assert read_all(tar) == [reason]


@pytest.mark.parametrize(
    "names",
    [["7.a0.jpg", "7.a1.png"], ["7.a1.jpg", "7.a2.jpg"], ["7.jpg", "7.1.jpg"], ["7.image.0.jpg", "7.image.1.jpg"]],
)
def test_numbered_images_come_in_order(names: list[str], tmp_path: Path) -> None:
    stored = [(name, b"image %d" % i) for i, name in enumerate(names)]
    tar = make_tar(tmp_path / "0.tar", [*stored[::-1], ("7.json", talk(0))])
    assert read_all(tar)[0].images == (b"image 0", b"image 1")


@pytest.mark.parametrize(
    "start",
    [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"\0\0\0\x1cftypavif", b"\0\0\0\x18ftypheic"],
)
def test_an_image_without_the_name_of_one_is_found_by_its_content(start: bytes, tmp_path: Path) -> None:
    data = start + bytes(20)
    tar = make_tar(
        tmp_path / "0.tar",
        [("7.bin", data), ("7.json", talk(0)), ("8.npy", b"\x93NUMPY" + bytes(20)), ("8.json", talk(1))],
    )
    first, second = read_all(tar)
    assert (first.images, second.images) == ((data,), ())
    assert load_index(tar).lengths[:, 0].tolist() == [1, 0]


def test_a_record_that_names_an_image_needs_it(tmp_path: Path) -> None:
    for key in ("image", "images", "img", "video"):
        record = json.dumps({"conversation": [["what", "x"]], key: "a.jpg"}).encode()
        assert read_all(make_tar(tmp_path / f"{key}.tar", [("7.json", record)])) == ["missing_image"]


@pytest.mark.parametrize(
    "name",
    [
        "._7.jpg",
        "__MACOSX/._7.jpg",
        "__MACOSX/7.jpg",
        "a/.ipynb_checkpoints/7.jpg",
        "PaxHeaders.12/7.jpg",
        "Thumbs.db",
        "a/desktop.ini",
    ],
)
def test_what_systems_leave_in_folders_is_passed_by(name: str, tmp_path: Path) -> None:
    assert split_name(name) is None
    tar = make_tar(tmp_path / "0.tar", [(name, b"rubbish"), *members(2)])
    assert_whole(tar, 2)


def test_links(tmp_path: Path) -> None:
    """Those to files in the tar stand for them; an image that is a link elsewhere is missing, not text alone."""
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name, data in [
            ("d/a.jpg", b"image 0"),
            ("d/a.json", talk(0)),
            ("d/b.json", talk(0)),
            ("d/c.json", talk(0)),
            ("e/d.json", talk(0)),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for kind, name, target in [
            (tarfile.LNKTYPE, "d/b.jpg", "d/a.jpg"),
            (tarfile.SYMTYPE, "e/d.jpg", "../d/a.jpg"),
            (tarfile.SYMTYPE, "d/c.jpg", "/etc/hostname"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    found = read_all(tmp_path / "0.tar")
    assert [sample if isinstance(sample, str) else sample.images for sample in found] == [(b"image 0",)] * 2 + [
        "missing_image",
        (b"image 0",),
    ]


# ---- records ---------------------------------------------------------------------------------------------------------


def stored(tmp_path: Path, *samples: dict[str, bytes]) -> Path:
    return make_tar(
        tmp_path / "0.tar",
        [(f"{i}.{suffix}", data) for i, sample in enumerate(samples) for suffix, data in sample.items()],
    )


@pytest.mark.parametrize("meta", [{}, {"json": b'{"url": "http://x", "uid": "1"}'}])
@pytest.mark.parametrize("suffix", ["txt", "TXT", "text", "caption"])
def test_a_text_file_is_the_caption(meta: dict, suffix: str, tmp_path: Path) -> None:
    tar = stored(
        tmp_path,
        *({"jpg": b"1", suffix: text, **meta} for text in (b"\xef\xbb\xbfa cat \n", "Bär".encode(), b"caf\xe9")),
    )
    first, second, third = read_all(tar)
    assert (first.record["caption"], second.record["caption"], third) == ("a cat", "Bär", "bad_record")
    assert load_index(tar).lengths[0].tolist() == [1, 0, 2]
    key, record, images = ShardReader().stored(tar, 0)
    assert (key, json.loads(record)["caption"], images) == ("0", "a cat", 1)


def test_a_text_file_is_no_caption_where_records_hold_samples(tmp_path: Path) -> None:
    """As img2dataset writes them: there a sample without a record, or without a caption in it, was lost."""
    tar = stored(
        tmp_path,
        {"jpg": b"1", "txt": b"x", "json": b'{"caption": "y"}'},
        {"jpg": b"1", "txt": b"x"},
        {"jpg": b"1", "txt": b"x", "json": b"{}"},
    )
    first, second, third = read_all(tar)
    assert (first.record["caption"], second, "caption" in third.record) == ("y", "missing_record", False)


TALKS: Sequence[object] = (
    {
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
        "image": "a.jpg",
    },
    {"messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}]},
    [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}],
)


@pytest.mark.parametrize("talk", TALKS)
def test_conversations_of_other_trainers(talk: object, tmp_path: Path) -> None:
    tar = stored(tmp_path, {"jpg": b"1", "json": json.dumps(talk).encode()})
    (sample,) = read_all(tar)
    assert sample.record["conversation"] == [["what?", "a cat"]] and not sample.record["raw"]
    assert load_index(tar).lengths[0].tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    "talk",
    [
        {"question": "what?", "answer": "a cat", "image": "a.jpg"},
        {"query": "<image>what?", "response": "a cat", "images": ["a.jpg"]},
        {"instruction": "what?", "output": "a cat"},
    ],
)
def test_questions_of_other_trainers(talk: dict, tmp_path: Path) -> None:
    (sample,) = read_all(stored(tmp_path, {"jpg": b"1", "json": json.dumps(talk).encode()}))
    assert render(sample.record, 1, lambda _: 0).turns == (("<Img><ImageHere></Img> what? ", "a cat"),)


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "what?"}, {"from": "human", "value": 3}],
        [{"from": "human"}],
        [{"from": "human", "value": "<image> <image> what?"}, {"from": "gpt", "value": "x"}],
        [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "<image>"}],
        [7, None],
        [{"from": ["human"], "value": "x"}],
        "text",
        7,
        [],
    ],
)
def test_conversations_that_cannot_be_read(turns: object, tmp_path: Path) -> None:
    tar = stored(tmp_path, {"jpg": b"1", "json": json.dumps({"conversations": turns}).encode()})
    assert read_all(tar) == ["bad_record"]


# ---- indexes of version 2 --------------------------------------------------------------------------------------------


def older_index(tar: Path) -> None:
    """Write the index of version 2 that was made of a tar when only neighbors belonged together."""
    runs: dict[str, list[Member]] = {}
    previous = ""
    with tarfile.open(tar) as file:
        for info in file:
            key, suffix = split_name(info.name)
            if key == previous or key not in runs:
                runs.setdefault(key, []).append(Member(suffix, info.offset_data, info.size))
            previous = key
    state = tar.stat()
    data = bytearray(ShardIndex(list(runs.items())).to_bytes((state.st_size, state.st_mtime_ns)))
    header = index_module._HEADER.size
    data[:8] = b"TGVidx2\n"
    data[header : index_module.HEADER_BYTES] = struct.pack("<I", zlib.crc32(data[:header]))
    tar.with_suffix(".tar.idx").write_bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        members(4, "{}.image.jpg"),
        members(4, "{}.jfif"),
        members(4, "http.example.com.{}.jpg", "http.example.com.{}.json"),
        members(20, "http.example.com.{}.jpg", "http.example.com.{}.json"),
        members(4, "jpg/{}.jpg", "json/{}.json"),
        [*members(4)[::2], *members(4)[1::2]],
        [*members(4)[1::2], *members(4)[::2]],
        [("0.jpg", b"1"), ("0.txt", b"a cat")],
        [("0.jpg", b"1"), ("0.txt", b"a cat"), ("0.json", b"{}")],
    ],
)
def test_an_older_index_that_may_be_wrong_is_built_again(content: list, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", content)
    right = load_index(tar)
    older_index(tar)
    assert sample_count(tar) == len(right) or "." in content[0][0].split("/")[-1].partition(".")[2]
    again = load_index(tar)
    assert [(again.key(i), again.members(i)) for i in range(len(again))] == [
        (right.key(i), right.members(i)) for i in range(len(right))
    ]
    assert sample_count(tar) == len(right)


def test_an_older_index_of_whole_samples_is_trusted(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", members(4))
    older_index(tar)
    before = tar.with_suffix(".tar.idx").read_bytes()
    assert len(load_index(tar)) == 4
    assert tar.with_suffix(".tar.idx").read_bytes() == before
