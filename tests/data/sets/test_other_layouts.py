"""Published datasets whose files lie as other projects keep them give the samples of the usual layout."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinygptv_ds.data.prepare.prepare import prepare
from tinygptv_ds.data.sets.common import coco_file, load_json
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.errors import DataError

ANSWERS = ["net", "net", "a net"]


def files(root: Path, contents: dict[str, Any]) -> Path:
    """Write JSON files and, where there is None, images; each image has a color of its own."""
    for number, (name, content) in enumerate(contents.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jpg"):
            out = io.BytesIO()
            Image.new("RGB", (100, 50), (number * 20, 0, 0)).save(out, "JPEG")
            path.write_bytes(out.getvalue())
        elif name.endswith(".p"):
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            path.write_text(json.dumps(content))
    return root


def samples(name: str, root: Path) -> list[dict]:
    out = root.parent / f"{root.name}_out"
    report = prepare(name, root, out)
    assert report.skipped == {}
    reader = ShardReader()
    found = [reader.read(out / tar, i) for tar in report.shards for i in range(sample_count(out / tar))]
    assert all(len(sample.images) == 1 for sample in found)
    return [sample.record for sample in found]


VQA = [{"question_id": 1, "question": "What?", "answer": ANSWERS, "image": "train2014/COCO_train2014_000000000009.jpg"}]
QUESTIONS = {"questions": [{"question_id": 1, "image_id": 9, "question": "What?"}]}
ANNOTATIONS = {"annotations": [{"question_id": 1, "image_id": 9, "answers": [{"answer": a} for a in ANSWERS]}]}
AOK = [{"question_id": "x", "question": "What?", "direct_answers": ANSWERS}]
CAPTION = {"caption": "A net.", "image_id": 9}
LLAVA = [{"id": "000000000009", "conversations": [{"value": "<image>\nWhat?"}, {"value": "A net."}]}]
REFS = [{"ref_id": 5, "ann_id": 1, "image_id": 9, "split": "train", "sentences": [{"raw": "the net"}]}]
REFCOCO = {
    "refcoco_annotations/refcoco/instances.json": {"annotations": [{"id": 1, "bbox": [10, 5, 20, 10]}]},
    "refcoco_annotations/refcoco/refs(unc).p": REFS,
}
REGION = {"region_id": 3, "phrase": "a net", "x": 10, "y": 5, "width": 20, "height": 10}
VG = {
    "visual_genome/image_data.json": [{"image_id": 2, "url": "https://cs.stanford.edu/VG_100K_2/2.jpg"}],
    "visual_genome/region_descriptions.json": [{"id": 2, "regions": [REGION]}],
    "visual_genome/VG_100K/1.jpg": None,
}
COCO_2014, COCO_2017 = "coco/train2014/COCO_train2014_000000000009.jpg", "coco/train2017/000000000009.jpg"
KARPATHY, OFFICIAL = "coco_caption/coco_karpathy_train.json", "coco_caption/captions_train2014.json"
OF_LAVIS = [{"image": "val2014/COCO_train2014_000000000009.jpg", **CAPTION}]
TRAIN, QS = "mscoco_train2014_annotations.json", "OpenEnded_mscoco_train2014_questions.json"
CASES = {  # name: (dataset, the usual layout, another)
    "VQAv2, COCO 2017": (
        "coco_vqa",
        {"vqav2/vqa_train.json": VQA, COCO_2014: None},
        {"vqav2/vqa_train.json": VQA, COCO_2017: None},
    ),
    "VQAv2's own files": (
        "coco_vqa",
        {"vqav2/vqa_train.json": VQA, COCO_2014: None},
        {f"vqav2/v2_{QS}": QUESTIONS, f"vqav2/v2_{TRAIN}": ANNOTATIONS, COCO_2014: None},
    ),
    "OK-VQA's own files": (
        "ok_vqa",
        {"okvqa/okvqa_train.json": VQA, COCO_2014: None},
        {f"okvqa/{QS}": QUESTIONS, f"okvqa/{TRAIN}": ANNOTATIONS, COCO_2017: None},
    ),
    "A-OKVQA's own file": (
        "aok_vqa",
        {"aokvqa/aokvqa_v1p0_train.json": [{**AOK[0], "image": "COCO_train2014_000000000009.jpg"}], COCO_2014: None},
        {"aokvqa/aokvqa_v1p0_train.json": [{**AOK[0], "image_id": 9}], COCO_2017: None},
    ),
    "COCO's own captions": (
        "coco_caption",
        {KARPATHY: [{**OF_LAVIS[0], "image": "train2014/COCO_train2014_000000000009.jpg"}], COCO_2014: None},
        {OFFICIAL: {"annotations": [CAPTION]}, COCO_2017: None},
    ),
    "LLaVA, COCO 2017": (
        "llava_detail",
        {"llava/detail_23k.json": LLAVA, COCO_2014: None},
        {"llava/detail_23k.json": LLAVA, COCO_2017: None},
    ),
    "RefCOCO, COCO 2017": ("refcoco", {**REFCOCO, COCO_2014: None}, {**REFCOCO, COCO_2017: None}),
    "Visual Genome, merged": (
        "refvg",
        {**VG, "visual_genome/VG_100K_2/2.jpg": None},
        {**VG, "visual_genome/VG_100K/2.jpg": None},
    ),
    "Visual Genome, images": (
        "refvg",
        {**VG, "visual_genome/VG_100K_2/2.jpg": None},
        {**dict(list(VG.items())[:2]), "visual_genome/images/VG_100K_2/2.jpg": None},
    ),
    "TextCaps": (
        "textcaps_caption",
        {"textcaps/TextCaps_0.1_train.json": {"data": [{"caption_str": "A net.", "image_id": "a"}]},
         "textcaps/train_images/a.jpg": None},
        {"textcaps/TextCaps_0.1_train.json": {"data": [{"caption_str": "A net.", "image_id": "a"}]},
         "textcaps/train_val_images/train_images/a.jpg": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_another_layout_gives_the_same_samples(case: str, tmp_path: Path) -> None:
    name, usual, other = CASES[case]
    expected = samples(name, files(tmp_path / "usual", usual))
    assert samples(name, files(tmp_path / "other", other)) == expected
    assert len(expected) == 1


def test_validation_images_and_files_of_vqa(tmp_path: Path) -> None:
    """VQAv2's validation part, which stage 4 trains on as well, from its own folder of images and its own files."""
    val = {"questions": [{"question_id": 7, "image_id": 8, "question": "Who?"}]}
    answers = {"annotations": [{"question_id": 7, "image_id": 8, "answers": [{"answer": "he"}]}]}
    contents = {
        **{"vqav2/vqa_train.json": VQA, COCO_2014: None, "coco/val2014/COCO_val2014_000000000008.jpg": None},
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": val,
        "vqav2/v2_mscoco_val2014_annotations.json": answers,
    }
    found = samples("coco_vqa", files(tmp_path / "root", contents))
    assert [(record["text"], record["answer"]) for record in found] == [("What?", ANSWERS), ("Who?", ["he"])]


def test_the_usual_place_comes_first(tmp_path: Path) -> None:
    files(tmp_path, {COCO_2017: None})
    name = "COCO_train2014_000000000009.jpg"
    assert coco_file(tmp_path, name) == tmp_path / COCO_2017
    files(tmp_path, {COCO_2014: None})
    assert coco_file(tmp_path, name) == tmp_path / COCO_2014
    assert coco_file(tmp_path, "COCO_train2014_000000000001.jpg").parent == tmp_path / "coco/train2014"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"a": 2}\n', "holds JSON lines"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'[{"a": 1', "fetch it again"),
    ],
)
def test_only_a_damaged_file_is_to_be_fetched_again(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        load_json(tmp_path / "a.json")
    assert ("fetch it again" in str(caught.value)) == (message == "fetch it again")
