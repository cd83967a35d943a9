"""Small benchmarks as they are distributed, with made-up images, in the layout of docs/evaluation.md."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

PEOPLE = ["red"] * 9 + ["blue"]


def image(path: Path, size: tuple[int, int] = (40, 30), colour: int = 90) -> Path:
    """A plain image, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, colour).save(path)
    return path


def write(path: Path, content: Any) -> Path:
    """JSON, or JSON lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answered(answers: Iterable[str] = PEOPLE) -> list[dict[str, str]]:
    """People's answers as VizWiz and VQA v2 list them."""
    return [{"answer": answer, "answer_confidence": "yes"} for answer in answers]


def all_of_vqa(root: Path) -> Path:
    """Every benchmark of eval/vqa.py, two questions each."""
    gqa = {
        f"20{n}": {"imageId": f"n{n}", "question": f"is it {n}?", "answer": "yes", "types": {}, "isBalanced": True}
        for n in range(2)
    }
    write(root / "gqa/testdev_balanced_questions.json", gqa)
    vsr = [
        {"image": f"00000000000{n}.jpg", "image_link": "x", "caption": f"The cat is {n}.", "label": n, "relation": "on"}
        for n in range(2)
    ]
    write(root / "vsr/test.jsonl", vsr)
    memes = [{"id": n, "img": f"img/0{n}.png", "label": n, "text": "it's {here}"} for n in range(2)]
    write(root / "hateful_meme/dev.jsonl", memes)
    vizwiz = [
        {"image": f"VizWiz_val_{n}.jpg", "question": "What?", "answers": answered(), "answerable": 1} for n in range(2)
    ]
    write(root / "vizwiz/val.json", vizwiz)
    problems = {
        "7": {"question": "Which?", "choices": ["one", "two"], "answer": 1, "ques_type": "choose_txt", "split": "val"},
        "8": {"question": "Which?", "choices": ["x", "y"], "answer": 0, "ques_type": "choose_txt", "split": "train"},
        "9": {"question": "How?", "choices": [], "answer": "3", "ques_type": "fill_in_blank", "split": "val"},
        "11": {"question": "Who?", "choices": ["a", "b", "c"], "answer": 2, "ques_type": "choose_txt", "split": "val"},
    }
    write(root / "iconvqa/problems.json", problems)
    questions = [{"image_id": 40 + n, "question": "What colour?", "question_id": 400 + n} for n in range(2)]
    write(root / "okvqa/okvqa_test_split.json", questions)
    write(root / "okvqa/OpenEnded_mscoco_val2014_questions_clean.json", {"questions": questions})
    annotations = [{"question_id": 400 + n, "image_id": 40 + n, "answers": answered()} for n in range(2)]
    write(root / "okvqa/mscoco_val2014_annotations_clean.json", {"annotations": annotations})
    for path in (
        *(f"gqa/gqa_images/n{n}.jpg" for n in range(2)),
        "vsr/vsr_images/train2017/000000000000.jpg",
        "vsr/vsr_images/val2017/000000000001.jpg",
        *(f"hateful_meme/hm_images/img/0{n}.png" for n in range(2)),
        *(f"vizwiz/vizwiz_images/VizWiz_val_{n}.jpg" for n in range(2)),
        *(f"iconvqa/iconvqa_images/val/choose_txt/{n}/image.png" for n in (7, 11)),
        "okvqa/okvqa_images/000000000040.jpg",
        "okvqa/okvqa_images/COCO_val2014_000000000041.jpg",
    ):
        image(root / path)
    return root


def jpeg(size: tuple[int, int]) -> bytes:
    """A plain JPEG."""
    out = io.BytesIO()
    Image.new("L", size, 120).save(out, "JPEG")
    return out.getvalue()
