"""Every published dataset, compared with what the original readers give for the same files.

Random choices are enumerated on both sides: the same outcomes with the same probabilities, without a common generator.
"""

import io
import json
import pickle
import re
import shutil
from collections import defaultdict
from fractions import Fraction
from math import prod
from pathlib import Path

import pytest
from PIL import Image

from tinygptv_ds.data.prepare.prepare import prepare
from tinygptv_ds.data.sets import DATASETS, PreparedSample, Skipped
from tinygptv_ds.data.shards.index import load_index
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import clean_caption, render

# our place below --root: where the reference set keeps it
LAYOUT = {
    "coco/train2014": "_coco/train2014",
    "refcoco_annotations": "_refcoco",
    "cc_sbu_align": "cc_sbu_align",
    "llava/conversation_58k.json": "llava_conversation/conversation_58k.json",
    "llava/detail_23k.json": "llava_detail/detail_23k.json",
    "llava/complex_reasoning_77k.json": "llava_reason/complex_reasoning_77k.json",
    "multitask_conversation": "multitask_conversation",
    "unnatural_instruction": "unnatural_instruction",
    "visual_genome": "refvg",
    "filtered_flickr/images": "_flickr/flickr30k-images",
    "filtered_flickr/groundedcaption.json": "flickr_grounded_caption/groundedcaption.json",
    "filtered_flickr/captiontobbox.json": "flickr_CaptionToPhrase/captiontobbox.json",
    "filtered_flickr/phrasetobbox.json": "flickr_ObjectToPhrase/phrasetobbox.json",
    "coco_caption": "coco_caption",
    "textcaps": "textcaps_caption",
    "vqav2": "coco_vqa",
    "okvqa": "ok_vqa",
    "aokvqa": "aok_vqa",
    "gqa": "gqa",
    "ocrvqa": "ocrvqa",
}
# Where the original gives a sample that is plainly not what the file says.
BETTER = {
    "answer is one string instead of a list (drawn per character)",
    "a single turn",
    "roles are not looked at, only the position counts",  # a conversation: no single answer to compare
    "two refs with the same ref_id: counted twice, the later one is used for both",
}
REASONS = {"FileNotFoundError": "missing_image", "PIL.UnidentifiedImageError": "not_an_image"}


def expected(golden: Path, name: str) -> dict:
    return json.loads((golden / f"datasets/expected/{name}.json").read_bytes())


def read_all(tars: list[Path]) -> dict:
    """Return for each key its RawSample, or the reason why it cannot be used."""
    reader, found = ShardReader(), {}
    for tar in tars:
        for index in range(len(load_index(tar))):
            try:
                found[load_index(tar).key(index)] = reader.read(tar, index)
            except SampleError as error:
                found[load_index(tar).key(index)] = error.reason
    return found


def outcomes(record: dict, num_images: int) -> dict:
    """Return every (question, answer) that can be drawn, with its exact probability."""
    found, paths = defaultdict(Fraction), [()]
    while paths:
        path, sizes = paths.pop(), []

        def draw(n: int, path: tuple = path, sizes: list = sizes) -> int:
            sizes.append(n)
            return path[len(sizes) - 1] if len(sizes) <= len(path) else 0

        (turn,) = render(record, num_images, draw).turns
        found[turn] += Fraction(1, prod(sizes))
        for depth in range(len(path), len(sizes)):  # the other choices at every draw the path did not fix
            prefix = (*path, *[0] * (depth - len(path)))
            paths += [(*prefix, choice) for choice in range(1, sizes[depth])]
    return found


@pytest.fixture(scope="module")
def root(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for ours, theirs in LAYOUT.items():
        (folder / ours).parent.mkdir(parents=True, exist_ok=True)
        (folder / ours).symlink_to((golden / "datasets/roots" / theirs).resolve())
    return folder


def test_caption_clean_up_is_the_originals(golden: Path) -> None:
    processor = json.loads((golden / "preprocess/expected.json").read_bytes())["caption_processor"]
    assert processor["cases"]
    for case in processor["cases"]:
        assert clean_caption(case["text"], processor["max_words"]) == case["out"]


def test_map_dataset(map_name: str, golden: Path, root: Path, tmp_path: Path) -> None:
    """Samples, texts with their probabilities and image files agree; entries on which the original fails are skipped.

    Deliberate deviations: where OCR-VQA's reader uses the next entry for a missing image, the entry is skipped;
    a last question without an answer is left out (the original repeats the answer before it).
    """
    reference = expected(golden, map_name)
    report = prepare(map_name, root, tmp_path / "out", samples_per_shard=4)
    found = read_all([tmp_path / "out" / name for name in report.shards])
    good, skipped = {}, {f"{entry['source_position']:09d}": "missing_image" for entry in reference["dropped"]}
    for record in reference["records"]:
        key = f"{record['source_position']:09d}"
        if record.get("skipped_images"):
            skipped[key] = "missing_image"
        elif record["raises"]:
            skipped[key] = REASONS[record["raises"]["type"]]
        else:
            good[key] = record
    assert list(found) == list(good)
    # entries that the original filters out without a reason to complain are not reported
    assert {entry["key"]: entry["reason"] for entry in report.skipped_entries}.items() <= skipped.items()
    for key, record in good.items():
        sample = found[key]
        images = [(golden / "datasets/roots" / record["image"]).read_bytes()] if "image" in record else []
        assert list(sample.images) == images
        if "conv_q" in record:
            symbol = record["connect_sym"]
            answers = record["conv_a"].split(symbol)
            questions = record["conv_q"].split(symbol)[: len(answers)]
            turns = render(sample.record, len(images), lambda n: n - 1).turns
            assert turns == tuple(zip(questions, answers, strict=True))
        else:
            drawn = outcomes(sample.record, len(images))
            variants = {(v["instruction_input"], v["answer"]): v["probability"] for v in record["variants"]}
            assert {turn: float(share) for turn, share in drawn.items()} == pytest.approx(variants, abs=1e-9)


def test_img2dataset_shards(shard_name: str, golden: Path, tmp_path: Path) -> None:
    """Downloaded shards give the same samples in the same order with the same captions.

    Deliberate deviations: images other than .jpg are used, the .txt member is ignored, and a shard that does
    not exist is an error at the start.
    """
    reference = expected(golden, shard_name)
    for shard in reference["shards"]:
        source = golden / "datasets/roots" / shard["shard"]
        if not source.exists():
            with pytest.raises(DataError, match=source.name):
                expand_shards(str(source))
            continue
        tar = Path(shutil.copy(source, tmp_path))
        records = [r for r in reference["records"] if r["shard"] == source.name]
        found = read_all([tar])
        assert list(found) == [record["key"] for record in records]
        for record in records:
            sample = found[record["key"]]
            differs = has_another_image(record) or record.get("warning", "").startswith("UnicodeDecodeError")
            if record["kept"]:
                assert render(sample.record, 1, lambda n: 0).turns == ((None, record["answer"]),)
            elif not differs:
                assert not usable(sample), record
            else:
                assert usable(sample), record


def has_another_image(record: dict) -> bool:
    """Return whether a caption comes with an image of another ending than .jpg, which the original passes over."""
    endings = {Path(member).suffix.lower() for member in record["members"]}
    return ".json" in endings and ".jpg" not in endings and bool(endings - {".json", ".txt"})


def usable(sample: object) -> bool:
    """Return whether the loader would use it: readable, a caption of the right type, an image that decodes."""
    try:
        render(sample.record, 1, lambda n: 0)
        Image.open(io.BytesIO(sample.images[0])).convert("RGB")
    except (AttributeError, DataError, OSError):
        return False
    return True


def image_of(content: object, folder: Path) -> Path:
    """Return the one image that the entries name, by its file name or its number."""
    numbers = {int(digits) for digits in re.findall(r"\d+", json.dumps(content))}
    known = sorted(path for path in folder.iterdir() if path.stat().st_size)
    return next((path for path in known if int(path.stem.rpartition("_")[2]) in numbers), known[0])


def test_oddities(oddity: dict, golden: Path, tmp_path: Path) -> None:
    """Malformed annotations never crash: they give a sample, a skipped entry, or an error that names the problem."""
    name, content = oddity["dataset"], oddity["content"]
    files = [file for file in DATASETS[name].files if Path(file).suffix in (".json", ".p")]
    images = next((Path(f) for f in DATASETS[name].files if not Path(f).suffix), Path("coco/train2014"))
    (tmp_path / images / "folder.jpg").mkdir(parents=True)
    shutil.copy(image_of(content, golden / "datasets/roots/_coco/train2014"), tmp_path / images)
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        part = content[path.name] if isinstance(content, dict) and path.name in content else content
        if path.suffix == ".p":
            path.write_bytes(pickle.dumps(part, protocol=2))
        else:
            path.write_text(json.dumps(part))
    try:
        entries = list(DATASETS[name].samples(tmp_path))
    except DataError as error:
        assert oddity["raises"] is not None, "the original reads it"
        assert any(Path(file).name in str(error) for file in files), "names the file"
        return
    assert all(isinstance(entry, PreparedSample | Skipped) for entry in entries)
    assert all(entry.reason for entry in entries if isinstance(entry, Skipped))
    assert len(entries) >= oddity.get("length", 0), "what the original reads is a sample or a counted skip"
    if oddity["raises"] is None and "item" in oddity and oddity["case"] not in BETTER:
        (answer,) = {turn[1] for turn in outcomes(entries[0].record, len(entries[0].images))}
        assert answer == oddity["item"]["answer"]
