import argparse
import fcntl
import io
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tinygptv_ds.data.prepare import prepare as prepare_module
from tinygptv_ds.data.prepare.prepare import add_arguments, prepare, run, write_samples
from tinygptv_ds.data.sets import DATASETS, PreparedSample, Skipped, how_to_get
from tinygptv_ds.data.sets.common import SkipEntry, box_string, inside
from tinygptv_ds.data.sets.refcoco import load_refs
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.data.shards.reader import RawSample, ShardReader
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_TAG, render


def image(kind: str = "JPEG", size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind)
    return out.getvalue()


def read_all(out: Path) -> list[RawSample]:
    reader = ShardReader()
    return [reader.read(tar, i) for tar in sorted(out.glob("*.tar")) for i in range(sample_count(tar))]


def lines(root: Path, *entries: object) -> Path:
    root.mkdir(exist_ok=True)
    text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    (root / "data.jsonl").write_text(text, encoding="utf-8")
    return root


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_published_dataset_is_in_the_table() -> None:
    published = {
        "laion cc_sbu cc_sbu_align multitask_conversation llava_conversation llava_detail llava_reason",
        "unnatural_instruction refvg flickr_grounded_caption flickr_CaptionToPhrase flickr_ObjectToPhrase",
        "coco_caption textcaps_caption refcoco refcocop refcocog invrefcoco invrefcocop invrefcocog",
        "coco_vqa ok_vqa aok_vqa gqa ocrvqa",
    }
    assert set(DATASETS) - {"refer", "llava", "jsonl", "caption-folder"} == set(" ".join(published).split())


@pytest.mark.parametrize("name", [*DATASETS, "digits_vqa", "my_own"])
def test_how_to_get_tells_files_source_and_command(name: str) -> None:
    text = how_to_get(name)
    assert name in text
    assert all(file in text for file in DATASETS[name].files) if name in DATASETS else "prepare" in text


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.files])
def test_missing_files_are_listed_with_their_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(name, tmp_path, tmp_path / "out")
    assert all(file in str(caught.value) for file in DATASETS[name].files)
    assert DATASETS[name].source in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_and_ready_made_datasets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'coco_vqq'.*coco_vqa"):
        prepare("coco_vqq", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="without preparation"):
        prepare("laion", tmp_path, tmp_path / "out")


# ---- boxes, paths, pickles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "size", "text"),
    [
        ([29, 0, 71, 50], (100, 100), "{<28><0><100><50>}"),  # 29 / 100 * 100 is 28.999999999999996
        ([-1, -3, 2, 2], (50, 50), "{<-2><-6><2><-2>}"),
        ([-0.4, 0, 1, 1], (100, 100), "{<0><0><0><1>}"),  # towards zero, not down
        ([0, 0, 120, 100], (100, 100), "{<0><0><120><100>}"),
    ],
)
def test_box_arithmetic(box: list, size: tuple, text: str) -> None:
    assert box_string(box, size) == text


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "a/../..", "x\0.jpg"])
def test_paths_that_leave_the_root_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SkipEntry, match="leads out of"):
        inside(tmp_path, name)
    good = {"question": "q", "answer": "a"}
    root = lines(tmp_path / "root", good, {"image": name, **good}, {"image": ["a.jpg", name], **good})
    report = prepare("jsonl", root, tmp_path / "out")
    assert (report.samples, report.skipped) == (1, {"outside_root": 2})
    assert report.skipped_entries[0]["detail"].startswith("data.jsonl:2: image path")


def test_paths_inside_the_root_may_wind(tmp_path: Path) -> None:
    assert inside(tmp_path, "a", "../b", "..c.jpg") == tmp_path / "b/..c.jpg"


class Harm:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("protocol", range(5))
def test_refs_pickle_cannot_run_code(protocol: int, tmp_path: Path) -> None:
    path, canary = tmp_path / "refs(unc).p", tmp_path / "canary"
    path.write_bytes(pickle.dumps([{"raw": Harm(canary)}], protocol=protocol))
    with pytest.raises(DataError, match="refused"):
        load_refs(path)
    assert not canary.exists()
    path.write_bytes(pickle.dumps([{"raw": "é", "n": [1, 2.5, None, True]}], protocol=protocol))
    assert load_refs(path) == [{"raw": "é", "n": [1, 2.5, None, True]}]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_refs_pickle_of_python_2(encoding: str, tmp_path: Path) -> None:
    """Byte strings, protocol 1: what the published files hold."""
    path = tmp_path / "refs"
    text = "café".encode(encoding)
    path.write_bytes(b"]U" + bytes([len(text)]) + text + b"a.")
    assert load_refs(path) == ["café"]


@pytest.mark.parametrize("put", [b"r" + (1 << 27).to_bytes(4, "little"), b"p134217728\n"])
def test_refs_take_no_more_memory_than_their_size(put: bytes, tmp_path: Path) -> None:
    """A pickle of a few bytes that asks for a table of 2 GB; the same bytes as a text are a text."""
    path = tmp_path / "refs"
    path.write_bytes(b"]" + put + b".")
    with pytest.raises(DataError, match=r"it numbers a value 134217728, more than its .* bytes can hold"):
        load_refs(path)
    path.write_bytes(b"]U" + bytes([len(put)]) + put + b"a.")
    assert len(load_refs(path)) == 1


@pytest.mark.parametrize("data", [b"", b"]U\x05ab", b"I1\n.", b"<html>"])
def test_refs_that_are_no_list(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs"
    path.write_bytes(data)
    with pytest.raises(DataError, match=str(path)):
        load_refs(path)


# ---- broken annotations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files", "outcome"),
    [
        ("ocrvqa", {"ocrvqa/dataset.json": {"a": {"split": 1, "answers": []}}}, "missing_field"),
        (
            "ocrvqa",
            {"ocrvqa/dataset.json": {"a": {"split": 1, "answers": 3, "questions": [], "imageURL": ""}}},
            "bad_record",
        ),
        ("ocrvqa", {"ocrvqa/dataset.json": [{}]}, "is not one object"),
        ("ocrvqa", {"ocrvqa/dataset.json": {"a": []}}, "is not one object"),
        ("refvg", {"image_data.json": [], "region_descriptions.json": [{"id": 1}]}, "missing_field"),
        (
            "refvg",
            {"image_data.json": [{"id": 1}], "region_descriptions.json": [{"id": 1, "regions": [{}]}]},
            "missing_field",
        ),
        ("refvg", {"image_data.json": [3], "region_descriptions.json": []}, "entry 0 is a int"),
        ("gqa", {"gqa/train_balanced_questions.json": {"1": {"question": "q", "answer": "a"}}}, "missing_field"),
        ("gqa", {"gqa/train_balanced_questions.json": {"1": 5}}, "bad_record"),
        (
            "coco_caption",
            {"coco_caption/coco_karpathy_train.json": [{"caption": "c"}, None]},
            "missing_field, bad_record",
        ),
    ],
)
def test_broken_annotations(name: str, files: dict, outcome: str, tmp_path: Path) -> None:
    """Counted, or one message: never a traceback."""
    for file, content in files.items():
        path = tmp_path / ("visual_genome" if name == "refvg" else "") / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    try:
        found = ", ".join(entry.reason for entry in DATASETS[name].samples(tmp_path))
    except DataError as error:
        found = str(error)
    assert outcome in found


# ---- a user's own data -----------------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    root = lines(
        tmp_path / "root",
        {"image": "a.jpg", "question": "Q?", "answer": "A.", "id": 7},
        {"image": "a.jpg", "instruction": "<image>\nDo it", "answer": ["x", "y"]},
        {"question": "no image", "answer": "a"},
        {"image": ["a.jpg", "b/c.png"], "question": "<image> or <image>?", "answer": "both"},
        {"image": ["a.jpg", "b/c.png"], "question": "which?", "answer": "both"},
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nQ1"},
                {"from": "gpt", "value": "A1"},
                {"from": "human", "value": "Q2"},
                {"from": "gpt", "value": "A2"},
            ],
        },
        {"image": "a.jpg", "caption": "A Caption."},
    )
    (root / "b").mkdir()
    (root / "a.jpg").write_bytes(image("PNG"))
    (root / "b/c.png").write_bytes(image("JPEG"))
    report = prepare("jsonl", root, tmp_path / "out")
    found = read_all(tmp_path / "out")
    turns = [render(s.record, len(s.images), lambda n: n - 1).turns for s in found]
    assert turns == [
        ((f"{IMAGE_TAG} Q? ", "A."),),
        ((f"{IMAGE_TAG} Do it ", "y"),),
        (("no image", "a"),),
        ((f"{IMAGE_TAG} or {IMAGE_TAG}?", "both"),),
        ((f"{IMAGE_TAG}{IMAGE_TAG} which? ", "both"),),
        ((f"{IMAGE_TAG} Q1 ", "A1"), ("Q2 ", "A2")),
        ((None, "A Caption."),),
    ]
    assert found[0].record["id"] == 7
    assert found[3].images == (image("PNG"), image("JPEG"))
    assert (report.samples, report.skipped) == (7, {})


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "a"}
    root = lines(
        tmp_path / "root",
        good,
        "{not json",
        "[1]",
        {"answer": "no question"},
        {"question": "q", "answer": 3},
        {"image": "gone.jpg", **good},
        {"image": "empty.jpg", **good},
        {"image": "page.jpg", **good},
        {"image": "folder.jpg", **good},
        {"image": ["a.jpg", "a.jpg"], "question": "<image>?", "answer": "a"},
        {"conversations": [{"from": "gpt", "value": "first"}]},
        "",
    )
    (root / "a.jpg").write_bytes(image())
    (root / "empty.jpg").touch()
    (root / "page.jpg").write_text("<html>")
    (root / "folder.jpg").mkdir()
    report = prepare("jsonl", root, tmp_path / "out")
    assert report.samples == 1
    reasons = {"bad_record": 5, "missing_field": 1, "missing_image": 1, "not_an_image": 2, "unreadable_image": 1}
    assert report.skipped == reasons
    assert report.missing_fields == {"question": 1}
    assert [int(entry["key"]) for entry in report.skipped_entries] == list(range(1, 11))
    assert "gone.jpg" in report.skipped_entries[4]["detail"]
    assert json.loads((tmp_path / "out/report.json").read_bytes())["skipped"] == reasons


def test_caption_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "sub/c.webp"):
        (root / name).write_bytes(image())
    (root / "b.txt").write_text(" One Dog.\n")
    (root / "sub/c.txt").write_text("é", encoding="utf-8")
    report = prepare("caption-folder", root, tmp_path / "out")
    assert [sample.record["caption"] for sample in read_all(tmp_path / "out")] == ["One Dog.", "é"]
    assert report.skipped == {"missing_caption": 1}


# ---- writing shards --------------------------------------------------------------------------------------------------


def entries(count: int) -> Iterator[PreparedSample]:
    for i in range(count):
        yield PreparedSample(f"{i:04d}", {"pool": None, "text": "q", "answer": str(i)}, (image(),))


def test_images_are_stored_as_they_are_and_named_by_content(tmp_path: Path) -> None:
    kinds = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
    record = {"pool": None, "text": "q", "answer": "a"}
    samples = [PreparedSample(kind, record, (image(kind),)) for kind in kinds]
    samples.append(PreparedSample("ICO", record, (image("ICO", (32, 32)),)))  # older Pillows write no smaller icon
    report = write_samples(samples, tmp_path, samples_per_shard=9, total=None, settings={})
    assert [sample.images for sample in read_all(tmp_path)] == [(image(kind),) for kind in kinds]
    assert report.skipped == {"unsupported_image": 1}


def test_huge_images_are_refused_from_their_header(tmp_path: Path) -> None:
    bomb = bytearray(image("PNG"))
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    samples = [*entries(1), PreparedSample("bomb", {"pool": None, "text": "q", "answer": "a"}, (bytes(bomb),))]
    assert write_samples(samples, tmp_path, samples_per_shard=9, total=None, settings={}).skipped == {
        "too_large_image": 1
    }


def test_odd_text_survives(tmp_path: Path) -> None:
    """A lone surrogate (half of an emoji, as web data has them) is valid JSON, but no UTF-8, and has no tokens."""
    record = {"pool": None, "text": "q", "answer": "a 😀 é\u2028", "title": "a\ud83d"}
    half = {**record, "answer": "a\ud83d"}
    samples = [PreparedSample("a", record, ()), PreparedSample("b", half, ())]
    report = write_samples(samples, tmp_path, samples_per_shard=2, total=2, settings={})
    assert [sample.record for sample in read_all(tmp_path)] == [record]
    assert report.skipped == {"bad_record": 1}
    assert "lone surrogate" in report.skipped_entries[0]["detail"]


def test_finished_is_reused_without_reading_the_source(tmp_path: Path) -> None:
    first = write_samples(entries(5), tmp_path / "out", samples_per_shard=2, total=5, settings={"a": (1, 2)})
    again = write_samples(iter([None]), tmp_path / "out", samples_per_shard=2, total=5, settings={"a": (1, 2)})
    assert (first.reused, again.reused) == (False, True)
    assert (again.samples, again.shards) == (5, ["00000.tar", "00001.tar", "00002.tar"])


def test_other_settings_foreign_and_lost_files_are_refused(tmp_path: Path) -> None:
    write_samples(entries(2), tmp_path / "out", samples_per_shard=1, total=2, settings={"limit": 2})
    with pytest.raises(DataError, match=r"other settings \(limit\)"):
        write_samples(entries(3), tmp_path / "out", samples_per_shard=1, total=3, settings={"limit": 3})
    (tmp_path / "out/00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar was removed"):
        write_samples(entries(2), tmp_path / "out", samples_per_shard=1, total=2, settings={"limit": 2})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/00000.tar").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_samples(entries(2), tmp_path / "thesis", samples_per_shard=1, total=2, settings={})
    assert (tmp_path / "thesis/00000.tar").read_text() == "mine"


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.preparing").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            write_samples(entries(1), tmp_path / "out", samples_per_shard=1, total=1, settings={})


def test_nothing_usable_is_an_error_with_an_example(tmp_path: Path) -> None:
    skipped = [Skipped("0", "missing_image", "a.jpg does not exist")] * 3
    with pytest.raises(DataError, match=r"'missing_image': 3.*a\.jpg does not exist"):
        write_samples(skipped, tmp_path / "out", samples_per_shard=1, total=None, settings={})


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(words))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = lines(tmp_path / "root", *[{"question": "q", "answer": str(i)} for i in range(9)])
    words = ["jsonl", "--root", str(root), "--out", str(tmp_path / "out"), "--samples-per-shard", "2", "--limit", "5"]
    command(*words)
    assert capsys.readouterr().out == "jsonl: 5 samples (0 with images, 5 without) in 3 shard(s), skipped: none\n"
    command(*words)
    assert "was already there" in capsys.readouterr().out
    with (root / "data.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"other settings \(sources\)"):  # the annotations have changed since
        command(*words)


def test_command_digits(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded datasets go the same way: every one of them makes samples that can be put into words."""
    monkeypatch.setattr(prepare_module, "DIGITS_TEST", 2)
    command("digits", "--out", str(tmp_path), "--limit", "3")
    printed = capsys.readouterr().out
    for split, count in (("train", 3), ("test", 2)):
        folders = sorted(tmp_path.glob(f"*/{split}"))
        assert "digits_vqa" in {folder.parent.name for folder in folders}
        assert len(folders) == printed.count(f"/{split}: {count} samples (")
        assert f"digits_text/{split}: {count} samples (0 with images, {count} without) in 1 shard(s)" in printed
        for folder in folders:
            for sample in read_all(folder):
                assert render(sample.record, len(sample.images), lambda n: n - 1).turns[-1][1]
    with pytest.raises(DataError, match="--limit must be at least 1"):
        command("digits", "--out", str(tmp_path / "none"), "--limit", "0")
