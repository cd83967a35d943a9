"""Every benchmark is read as distributed, worded as published, and everything missing or wrong is reported at once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import benchmark_files
from helpers.benchmark_files import image, write

from tinygptv_ds.config.evaluation_section import SPLITS, ScoredSection
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Question
from tinygptv_ds.evaluation.benchmarks.table import PUBLISHED, open_published, open_section, places_of
from tinygptv_ds.evaluation.cli import scores
from tinygptv_ds.evaluation.wording import Settings, wording
from tinygptv_ds.generate.conversation import Conversation
from tinygptv_ds.processing.templates import TEMPLATES, choose_template

ROOT = Path(__file__).parents[2]
SHORT = "[vqa] Based on the image, respond to this question with a short answer:"
# The first question of each, its whole prompt, its answer, and where its image is.
FIRST = {
    "gqa": (f"{SHORT} is it 0?###Assistant: ", "yes", "gqa/gqa_images/n0.jpg"),
    "vsr": (
        "[vqa] Based on the image, is this statement true or false? The cat is 0.###Assistant: ",
        "false",
        "vsr/vsr_images/train2017/000000000000.jpg",
    ),
    "iconvqa": (f"{SHORT} Which? ###Assistant: ", 1, "iconvqa/iconvqa_images/val/choose_txt/7/image.png"),
    "vizwiz": (
        "[vqa] The question is 'What?' Based on the image, answer the question with a single word or phrase. and reply "
        "'unanswerable' when the provided information is insufficient###Assistant: ",
        benchmark_files.PEOPLE,
        "vizwiz/vizwiz_images/VizWiz_val_0.jpg",
    ),
    "hm": (
        "This is an image writting 'it's {here}'. Is this image hateful? Answer yes or no. Answer:###Assistant: ",
        0,
        "hateful_meme/hm_images/img/00.png",
    ),
    "okvqa": (
        f"{SHORT} What colour?###Assistant: ",
        benchmark_files.PEOPLE,
        "okvqa/okvqa_images/000000000040.jpg",
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return benchmark_files.all_of_vqa(tmp_path)


def read(name: str, root: Path, *overrides: str, split: str = "") -> list[Question]:
    checks = Checks()
    task = open_published(name, split, places_of(name, root, overrides), checks)
    checks.finish()
    return list(task.questions)


@pytest.mark.parametrize("name", FIRST)
def test_as_distributed(name: str, root: Path) -> None:
    words, truth, path = FIRST[name]
    questions = read(name, root)
    assert len(questions) == 2
    prompt = wording(PUBLISHED[name].benchmark, Settings(), "[INST] {} [/INST]", "###").text(questions[0])
    assert prompt == f"###Human: <Img><ImageHere></Img> {words}"
    assert (questions[0].truth, list(questions[0].images())) == (truth, [root / path])
    ours = wording(PUBLISHED[name].benchmark, Settings("training"), "[INST] {} [/INST]", "\n")
    assert ours.text(questions[0]) == f"[INST] <Img><ImageHere></Img> {questions[0].text}  [/INST]"
    assert ours.choice_end == "\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_asked_as_in_a_chat(name: str, root: Path) -> None:
    question = read("gqa", root)[0]
    asked = wording(PUBLISHED["gqa"].benchmark, Settings(name), "[INST] {} [/INST]", "###").text(question)
    talk = Conversation(choose_template(name, "[INST] {} [/INST]", "###"))
    assert asked == talk.ask(question.text, ["image"]).text and question.text in asked


def test_every_benchmark_has_a_test() -> None:
    assert {*FIRST, "refcoco", "refcoco+", "refcocog"} == PUBLISHED.keys() == SPLITS.keys()


def test_gqa_as_a_list(root: Path) -> None:
    file = root / "gqa/testdev_balanced_questions.json"
    write(file, [{"image": "n1.jpg", "question": "it?", "answer": "No"}])
    (question,) = read("gqa", root)
    assert (question.truth, list(question.images())) == ("No", [root / "gqa/gqa_images/n1.jpg"])


def test_vsr_images_may_lie_flat(root: Path) -> None:
    flat = image(root / "flat/000000000000.jpg").parent
    image(flat / "val2017/000000000001.jpg")
    questions = read("vsr", root, f"vsr.images={flat}")
    assert [path.relative_to(flat).as_posix() for q in questions for path in q.images()] == [
        "000000000000.jpg",
        "val2017/000000000001.jpg",
    ]


def test_the_choose_text_file_is_made_of_problems(root: Path) -> None:
    """Only what the split and kind are, with the ids that name the images; a file of that name goes first."""
    made = [(list(q.choices), q.truth) for q in read("iconvqa", root)]
    assert made == [(["one", "two"], 1), (["a", "b", "c"], 2)]
    write(root / "iconvqa/choose_text_val.json", [
        {"image_id": 5, "question": "Who?", "choices": ["x", "y"], "answer": 0}
    ])  # fmt: skip
    image(root / "iconvqa/iconvqa_images/5/image.png")
    (question,) = read("iconvqa", root)
    assert question.choices == ("x", "y")


def test_all_that_is_missing_is_reported_at_once(root: Path) -> None:
    for file in ("gqa/testdev_balanced_questions.json", "okvqa/OpenEnded_mscoco_val2014_questions_clean.json"):
        (root / file).unlink()
    for path in (root / "vizwiz/vizwiz_images").iterdir():
        path.unlink()
    write(root / "hateful_meme/dev.jsonl", [{"img": "img/00.png", "label": 0}, {"img": "a", "label": 7, "text": "b"}])
    checks = Checks()
    for name in FIRST:
        open_published(name, "", places_of(name, root), checks)
    with pytest.raises(DataError) as caught:
        checks.finish()
    message = str(caught.value)
    for problem in (
        "5 problem(s) with the benchmarks' files",
        f"{root}/gqa/testdev_balanced_questions.json is missing; put it there, or name another file with gqa.questions",
        f"{root}/okvqa/OpenEnded_mscoco_val2014_questions_clean.json is missing",
        "dev.jsonl: entry 0 has no 'text'",
        "dev.jsonl: entry 1 has the label 7, which is neither 0 nor 1",
        f"2 of 2 images are missing, the first: {root}/vizwiz/vizwiz_images/VizWiz_val_0.jpg, ",
        "or name another folder with vizwiz.images=FOLDER",
    ):
        assert problem in message, (problem, message)


def gqa_torn(root: Path) -> None:
    (root / "gqa/testdev_balanced_questions.json").write_text('{"a": {"imageId"')


def vsr_torn(root: Path) -> None:
    (root / "vsr/test.jsonl").write_text('{"image": "x", "caption": "y", "label": 1}\n\n{"im')


def edit(file: str, key: str | int, **changes: object) -> Callable[[Path], None]:
    """Puts a field into one entry, or takes it out (None)."""

    def change(root: Path) -> None:
        path = root / file
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        content = lines if path.suffix == ".jsonl" else lines[0]
        entry = content["annotations"][key] if "annotations" in content else content[key]
        entry |= {name: value for name, value in changes.items() if value is not None}
        for name in [name for name, value in changes.items() if value is None]:
            del entry[name]
        write(path, content)

    return change


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("gqa", gqa_torn, r"testdev_balanced_questions\.json: is no JSON"),
        ("gqa", lambda root: write(root / "gqa/testdev_balanced_questions.json", "x"), "holds a str, neither a list"),
        ("gqa", lambda root: write(root / "gqa/testdev_balanced_questions.json", []), "holds no entries"),
        ("gqa", lambda root: write(root / "gqa/testdev_balanced_questions.json", [3]), "entry 0 is a int, not an obj"),
        ("gqa", edit("gqa/testdev_balanced_questions.json", "201", answer=5), "entry 201 has '5' as 'answer', which"),
        ("vsr", vsr_torn, r"test\.jsonl: line 3 is not JSON"),
        ("vsr", edit("vsr/test.jsonl", 1, label=True), "entry 1 has 'True' as 'label', which must be a whole number"),
        ("vizwiz", edit("vizwiz/val.json", 1, answers=["red"]), r"entry 1 has \['red'\] as 'answers', not a list of o"),
        ("iconvqa", edit("iconvqa/problems.json", "11", answer=3), "entry 1 has the answer 3, but 3 choices"),
        ("iconvqa", edit("iconvqa/problems.json", "7", choices=[]), r"entry 0 has \[\] as 'choices', not a list of te"),
        ("okvqa", edit("okvqa/mscoco_val2014_annotations_clean.json", 1, question_id=9), r"no answers to 1 .*: 401"),
        ("okvqa", edit("okvqa/okvqa_test_split.json", 0, question_id=401), "the official list has it, 1 .*: 400"),
        ("okvqa", lambda root: write(root / "okvqa/mscoco_val2014_annotations_clean.json", {}), "has no 'annotations'"),
    ],
)  # fmt: skip
def test_odd_files_are_reported(name: str, harm: Callable[[Path], object], message: str, root: Path) -> None:
    harm(root)
    with pytest.raises(DataError, match=message):
        read(name, root)


def test_many_odd_entries_are_counted(root: Path) -> None:
    write(root / "vizwiz/val.json", [{"image": "x"}] * 40)
    with pytest.raises(DataError, match=r"entry 2 has no 'question'\n.* 40 of 40 entries are like these"):
        read("vizwiz", root)


@pytest.mark.parametrize(
    ("override", "message"),
    [("gqa.image=x", "did you mean gqa.images"), ("gqa.images", "write BENCHMARK.PLACE"), ("images=x", "write BENCH")],
)
def test_a_wrong_place_is_reported(override: str, message: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        places_of("gqa", root, [override])


def test_refcoco(root: Path) -> None:
    entry = {"img_id": "COCO_train2014_000000000001_10", "sents": "left {cat}", "bbox": [1, 2, 3.5, 4]}
    write(root / "refcoco+/refcoco+_testA.json", [{**entry, "width": 40, "height": 30}])
    path = image(root / "coco/train2014/COCO_train2014_000000000001.jpg")
    (question,) = read("refcoco+", root, split="testA")
    assert (question.truth, list(question.images())) == ([1, 2, 3.5, 4], [path])
    assert question.text == "[refer] give me the location of left {cat}"
    write(root / "refcoco+/refcoco+_testA.json", [entry, {**entry, "width": 0, "height": 30, "bbox": [1, 2, 3]}])
    with pytest.raises(DataError, match=r"entry 0 has no 'width'\n.*entry 1 has \[1, 2, 3\] as 'bbox'"):
        read("refcoco+", root, split="testA")


def test_a_recipe_names_them_with_their_places(root: Path) -> None:
    checks = Checks()
    section = ScoredSection("gqa", root=str(root / "none"), places={"questions": str(root / "q.json")}, name="mine")
    write(root / "q.json", {"1": {"imageId": "n0", "question": "?", "answer": "x"}})
    task = open_section(section, 5, checks)
    assert (task.name, len(task.questions)) == ("mine", 1)
    with pytest.raises(DataError, match=r"1 of 1 images are missing.*none/gqa/gqa_images/n0\.jpg"):
        checks.finish()
    assert ScoredSection("refcocog", root="x").label == "refcocog_val"


def test_files_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tinygptv_ds.errors import DataError\nfrom tinygptv_ds.evaluation.cli import scores\n"
        "try:\n    scores('vqa', sys.argv[1:])\nexcept DataError:\n    sys.exit('torch' in sys.modules)\nsys.exit(3)"
    )
    options = ["--model", str(tmp_path), "--benchmarks", "gqa,hm", "--root", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_prompts_can_be_looked_at(root: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(exported), "--benchmarks", "hm,iconvqa", "--root", str(root), "--show-prompt"]
    assert scores("vqa", [*options, "--template", "training"]) == []
    memes, icons = capsys.readouterr().out.splitlines()
    assert memes.startswith('hm: "[INST] <Img><ImageHere></Img> This is an image writting')
    assert icons.endswith(" [/INST]'; the likeliest choice counts, each followed by '###'")
    with pytest.raises(ConfigError, match="'gpa' is none of these; did you mean gqa"):
        scores("vqa", ["--model", str(exported), "--benchmarks", "gpa"])
    with pytest.raises(ConfigError, match="refcocog has val, test"):
        scores("refer", ["--model", str(exported), "--benchmarks", "refcocog", "--splits", "testA"])
