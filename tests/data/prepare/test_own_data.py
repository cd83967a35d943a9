"""A user's own data: LLaVA's format, JSON lines, captions in a table; and how images are stored."""

import io
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from tinygptv_ds.data.prepare.prepare import prepare, write_samples
from tinygptv_ds.data.prepare.stored_images import Encoding, stored_image
from tinygptv_ds.data.sets.common import PreparedSample
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.data.shards.reader import RawSample, ShardReader
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import open_image
from tinygptv_ds.processing.text import IMAGE_TAG, render


def image(kind: str = "JPEG", size: tuple[int, int] = (8, 6), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(out, kind)
    return out.getvalue()


def read_all(out: Path) -> list[RawSample]:
    reader = ShardReader()
    return [reader.read(tar, i) for tar in sorted(out.glob("*.tar")) for i in range(sample_count(tar))]


def turns(sample: RawSample) -> tuple:
    return render(sample.record, len(sample.images), lambda n: n - 1).turns


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


# ---- LLaVA's format --------------------------------------------------------------------------------------------------

ITEMS = [
    {"id": "a", "image": "a.jpg", "conversations": talk("<image>\nWhat\nis it?", "A Cat.", "Sure?", "Yes.\n")},
    {"id": "b", "image": "a.jpg", "conversations": talk("What is it?\n<image>", "A cat")},
    {"id": "c", "image": "a.jpg", "conversations": talk("No mark", "A cat")},
    {"id": "d", "image": "a.jpg", "conversations": talk("Is <image> a cat?", "Yes")},
    {"id": "e", "image": ["a.jpg", "sub/b.png"], "conversations": talk("<image>\nand <image>:", "x", "why?", "y")},
    {"id": "f", "image": ["a.jpg", "sub/b.png"], "conversations": talk("<image> one", "x", "and <image>?", "y")},
    {"id": "g", "conversations": talk("Text  alone", "Fine", "Unanswered")},
    {"id": "h", "image": ["a.jpg"], "conversations": talk("q", "a")},
]
T = IMAGE_TAG
TURNS = [
    ((f"{T} What\nis it? ", "A Cat."), ("Sure? ", "Yes.\n")),
    ((f"{T} What is it? ", "A cat"),),
    ((f"{T} No mark ", "A cat"),),
    ((f"Is {T} a cat?", "Yes"),),
    ((f"{T}\nand {T}:", "x"), ("why?", "y")),
    ((f"{T} one", "x"), (f"and {T}?", "y")),
    (("Text  alone", "Fine"),),
    ((f"{T} q ", "a"),),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "root/a.jpg").write_bytes(image())
    (tmp_path / "root/sub/b.png").write_bytes(image("PNG"))
    return tmp_path / "root"


@pytest.mark.parametrize("lines", [False, True])
def test_llava(lines: bool, root: Path, tmp_path: Path) -> None:
    """Images where their marks are, texts to the letter, items of all kinds mixed; as a list or one a line."""
    if lines:
        (root / "mine.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    else:
        (root / "mine.json").write_text(json.dumps(ITEMS))
    report = prepare("llava", root, tmp_path / "out")
    found = read_all(tmp_path / "out")
    assert [turns(sample) for sample in found] == TURNS
    assert [sample.record["id"] for sample in found] == list("abcdefgh")
    assert found[4].images == (image(), image("PNG"))
    assert (report.samples, report.skipped) == (8, {})


def test_llava_elsewhere(root: Path, tmp_path: Path) -> None:
    """The annotations and the images in folders of their own, images as links."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.jpg").symlink_to(root / "a.jpg")
    (tmp_path / "links/sub").symlink_to(root / "sub")
    (tmp_path / "mine.json").write_text(json.dumps(ITEMS))
    places = {"annotations": tmp_path / "mine.json", "image_root": tmp_path / "links"}
    prepare("llava", tmp_path, tmp_path / "out", **places)
    assert [turns(sample) for sample in read_all(tmp_path / "out")] == TURNS
    assert prepare("llava", tmp_path, tmp_path / "out", **places).reused
    with pytest.raises(DataError, match=r"other settings \(image_root\)"):
        prepare("llava", tmp_path, tmp_path / "out", annotations=tmp_path / "mine.json")


def test_llava_says_which_entry(root: Path, tmp_path: Path) -> None:
    conversations = talk("q", "a")
    bad = [
        ({"id": 1}, "missing_field", "mine.json: entry 0 (id 1): has no 'conversations'"),
        ({"conversations": [{"from": "human"}]}, "missing_field", "mine.json: entry 1: has no 'value'"),
        ({"conversations": talk("<image>", "a")}, "bad_record", "entry 2: the questions hold <image> 1 time(s) for 0"),
        ({"image": "a.jpg", "conversations": talk("<image><image>", "a")}, "bad_record", "2 time(s) for 1 image(s)"),
        ({"conversations": talk("q", "a")[::-1]}, "empty_answer", "a question without an answer"),
        ("text", "bad_record", "mine.json: entry 5: "),
        ({"image": "/a.jpg", "conversations": conversations}, "outside_root", "entry 6: image path '/a.jpg'"),
        ({"image": "gone.jpg", "conversations": conversations}, "missing_image", "mine.json: entry 7: "),
        ({"image": 3, "conversations": conversations}, "bad_record", "entry 8: TypeError"),
        ({"conversations": []}, "empty_answer", "entry 9: its 'conversations' is empty"),
    ]
    (root / "mine.json").write_text(json.dumps([item for item, _, _ in bad] + ITEMS[:1]))
    report = prepare("llava", root, tmp_path / "out")
    assert report.samples == 1
    assert [entry["reason"] for entry in report.skipped_entries] == [reason for _, reason, _ in bad]
    for entry, (_, _, detail) in zip(report.skipped_entries, bad, strict=True):
        assert detail in entry["detail"]
    assert report.missing_fields == {"conversations": 1, "value": 1}


def test_broken_lines_name_file_and_line(root: Path, tmp_path: Path) -> None:
    good = json.dumps({"question": "q", "answer": "a"})
    (root / "a.jsonl").write_text(f"{good}\n\n{{not json\n")
    (root / "b.jsonl").write_bytes(b'{"question": "\xff", "answer": "a"}\n' + good.encode() + b'\n{"caption": "c"}')
    report = prepare("jsonl", root, tmp_path / "out")
    assert report.samples == 2
    assert [entry["detail"].split(": ")[0] for entry in report.skipped_entries] == [
        "a.jsonl:3",
        "b.jsonl:1",
        "b.jsonl:3",
    ]
    prepare("jsonl", root, tmp_path / "one", annotations=root / "a.jsonl")
    assert len(read_all(tmp_path / "one")) == 1


# ---- captions in a table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", 'file_name,caption,by\na.jpg,"One, Two",me\r\nsub/b.png,"Three\nlines",\n'),
        ("captions.tsv", 'Text\tImage\nOne, Two\ta.jpg\n"Three" lines\tsub/b.png\n'),
    ],
)
def test_caption_table(name: str, text: str, root: Path, tmp_path: Path) -> None:
    (root / name).write_text(text, encoding="utf-8-sig", newline="")
    prepare("caption-folder", root, tmp_path / "out")
    found = read_all(tmp_path / "out")
    second = "Three\nlines" if name == "captions.csv" else '"Three" lines'
    assert [turns(sample) for sample in found] == [((None, "One, Two"),), ((None, second),)]
    assert [sample.images for sample in found] == [(image(),), (image("PNG"),)]
    (tmp_path / "elsewhere").mkdir()
    table = (root / name).rename(tmp_path / name)
    prepare("caption_folder", tmp_path / "elsewhere", tmp_path / "two", annotations=table, image_root=root)
    assert [sample.images for sample in read_all(tmp_path / "two")] == [(image(),), (image("PNG"),)]


def test_broken_rows(root: Path, tmp_path: Path) -> None:
    (root / "c.csv").write_text("file,caption\na.jpg,good\n../a.jpg,x\na.jpg\na.jpg,\n,x\ngone.jpg,x\n")
    report = prepare("caption-folder", root, tmp_path / "out")
    assert report.samples == 1
    assert report.skipped == {"outside_root": 1, "empty_answer": 2, "missing_image": 2}
    assert report.skipped_entries[1]["detail"].startswith("c.csv: line 4: its 'caption' is empty")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": b"", "b.tsv": b""}, r"a\.csv, b\.tsv; name it with --annotations"),
        ({"a.csv": b""}, r"a\.csv: is empty"),
        ({"a.csv": b"file,words\na.jpg,x\n"}, "its keys are file, words; read are .* caption; --columns THEIRS=OURS"),
        ({"a.csv": b"file,caption\na.jpg,\xff\n"}, "is not UTF-8"),
        ({"a.csv": b"file,caption\na.jpg," + b"x" * 200_000}, "line 2: field larger than"),
        ({"a.json": b"[]", "b.json": b"[]"}, r"a\.json, b\.json; name it with --annotations"),
        ({"a.json": b"{}"}, "holds no list of entries"),
    ],
)
def test_files_that_cannot_be_used(files: dict[str, bytes], message: str, root: Path, tmp_path: Path) -> None:
    for name, data in files.items():
        (root / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        prepare("llava" if "a.json" in files else "caption-folder", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="gqa takes no --image-root"):
        prepare("gqa", root, out, image_root=root)
    with pytest.raises(DataError, match=r"gone\.json: no such file"):
        prepare("llava", root, out, annotations=root / "gone.json")
    with pytest.raises(DataError, match="gone: is not a folder"):
        prepare("llava", root, out, annotations=root / "a.jpg", image_root=root / "gone")
    (root / "mine.json").write_text(json.dumps(ITEMS))
    for option, value in (("samples_per_shard", 0), ("workers", 0), ("limit", -1)):
        with pytest.raises(DataError, match=f"--{option.replace('_', '-')} must be at least 1, not {value}"):
            prepare("llava", root, out, **{option: value})
    for wrong in ({"max_side": 0}, {"jpeg_quality": 0}, {"jpeg_quality": 101}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} must be"):
            Encoding(**wrong)
    with pytest.raises(DataError, match="tinygptv-ds convert-cc-sbu"):
        prepare("cc_sbu", root, out)
    assert not out.exists()


# ---- images --------------------------------------------------------------------------------------------------------


def test_larger_images_are_scaled_down_others_stay() -> None:
    small, large = image("PNG", (50, 20)), image("PNG", (200, 101))
    assert stored_image(small, Encoding(max_side=50)) == ("png", small, ())
    suffix, data, _ = stored_image(large, Encoding(max_side=50))
    opened = Image.open(io.BytesIO(data))
    assert (suffix, opened.format, opened.size, opened.mode) == ("jpg", "JPEG", (50, 25), "RGB")
    assert Image.open(io.BytesIO(stored_image(image(size=(1000, 1)), Encoding(10))[1])).size == (10, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_scaled_images_show_the_same(kind: str) -> None:
    data = image(kind, (640, 480))
    scaled = open_image(stored_image(data, Encoding(max_side=64))[1])
    reference = open_image(data).resize((64, 48), Image.Resampling.BOX)
    worst = max(abs(a - b) for a, b in zip(scaled.tobytes(), reference.tobytes(), strict=True))
    assert worst <= 6


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("GIF", "L")]
)
def test_quality_makes_every_image_a_jpeg(kind: str, mode: str) -> None:
    """As training would see it: RGB, without alpha."""
    data = image(kind, (32, 32), mode)
    suffix, stored, _ = stored_image(data, Encoding(jpeg_quality=100))
    assert (suffix, Image.open(io.BytesIO(stored)).format) == ("jpg", "JPEG")
    pairs = zip(open_image(stored).tobytes(), open_image(data).tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 4
    assert len(stored_image(data, Encoding(jpeg_quality=20))[1]) < len(stored)


def test_a_truncated_image_is_stored_unchanged_but_cannot_be_reencoded(tmp_path: Path) -> None:
    whole = image(size=(300, 300))
    record = {"pool": None, "text": "q", "answer": "a"}
    samples = [PreparedSample("a", record, (whole[:-500],)), PreparedSample("b", record, (whole,))]
    options = {"samples_per_shard": 9, "total": None, "settings": {}}
    assert write_samples(samples, tmp_path / "a", **options).skipped == {}
    report = write_samples(samples, tmp_path / "b", **options, encoding=Encoding(max_side=100))
    assert report.skipped == {"unreadable_image": 1}
    assert report.settings == {"samples_per_shard": 9, "max_side": 100}


def test_boxes_are_those_of_the_image_before_it_was_scaled(tmp_path: Path) -> None:
    """In per cent, so they stay true."""
    folder = tmp_path / "root/refcoco_annotations/refcoco"
    folder.mkdir(parents=True)
    (tmp_path / "root/coco/train2014").mkdir(parents=True)
    (tmp_path / "root/coco/train2014/COCO_train2014_000000000009.jpg").write_bytes(image(size=(640, 427)))
    (folder / "instances.json").write_text(json.dumps({"annotations": [{"id": 1, "bbox": [33.3, 20, 300, 200]}]}))
    ref = {"ref_id": 5, "ann_id": 1, "image_id": 9, "split": "train", "sentences": [{"raw": "the cat"}]}
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref], protocol=2))
    for name, encoding in (("as_it_is", Encoding()), ("scaled", Encoding(max_side=100))):
        prepare("refcoco", tmp_path / "root", tmp_path / name, encoding=encoding)
    (before,), (after,) = read_all(tmp_path / "as_it_is"), read_all(tmp_path / "scaled")
    assert before.record == after.record
    assert before.record["answer"] == "{<5><4><52><51>}"
    assert open_image(after.images[0]).size == (100, 67)


# ---- held-out referring expressions ----------------------------------------------------------------------------------

EXPRESSIONS = [  # as MiniGPT-v2's files have them
    {
        "img_id": "COCO_train2014_000000581563_3",
        "sents": "lower left  Corner darkness.",
        "bbox": [0.0, 373.89, 137.59, 126.11],
        "height": 500,
        "width": 333,
    },
    {"img_id": "COCO_train2014_000000581563_4", "sents": "x", "bbox": [1, 2, 3, 4], "height": 0, "width": 333},
    {"img_id": "../COCO_train2014_000000581563_4", "sents": "x", "bbox": [1, 2, 3, 4], "height": 9, "width": 9},
    {"img_id": "COCO_train2014_000000581563_5", "sents": "y", "height": 9, "width": 9},
    {"img_id": "COCO_train2014_000000000001_5", "sents": "y", "bbox": [1, 2, 3, 4], "height": 9, "width": 9},
]


def test_refer(tmp_path: Path) -> None:
    """Words as they are, the box relative to the size that the file tells, a sample for each sentence."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/COCO_train2014_000000581563.jpg").write_bytes(image())
    (tmp_path / "refcoco_testB.json").write_text(json.dumps(EXPRESSIONS))
    places = {"annotations": tmp_path / "refcoco_testB.json", "image_root": tmp_path / "coco"}
    report = prepare("refer", tmp_path, tmp_path / "out", **places)
    (sample,) = read_all(tmp_path / "out")
    assert (sample.record["text"], sample.record["answer"]) == ("lower left  Corner darkness.", "{<0><74><41><100>}")
    assert sample.record["bbox"] == EXPRESSIONS[0]["bbox"]
    assert turns(sample)[0][1] == "{<0><74><41><100>}"
    reasons = ["bad_record", "outside_root", "missing_field", "missing_image"]
    assert [entry["reason"] for entry in report.skipped_entries] == reasons
