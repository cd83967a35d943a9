"""What `check-data` finds is what training would meet, and it needs no torch for it."""

import gzip
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import verbs
from helpers.patience import PATIENCE
from PIL import Image

from tinygptv_ds.config.load import apply_overrides, build_recipe
from tinygptv_ds.data.checks import check_data as check
from tinygptv_ds.data.shards.index import load_index
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.weights.recipe_files import check_files

ROOT = Path(__file__).parents[3]
RAW = Callable[..., dict[str, Any]]
FILE = Callable[..., Path]


def image(size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def write(folder: Path, changes: dict[int, dict[str, bytes]], count: int = 10) -> Path:
    """`count` samples with an image in shards of five, some with other members."""
    with ShardWriter(folder, 5) as writer:
        for number in range(count):
            record = {"text": "what", "answer": f"a {number}"}
            good = {"jpg": image(), "json": json.dumps(record).encode()}
            writer.write(f"{number:04d}", changes.get(number, good))
    return folder


def answered(record: dict[str, Any], **members: bytes) -> dict[str, bytes]:
    return {**(members or {"jpg": image()}), "json": json.dumps(record).encode()}


BROKEN = {
    1: {"jpg": image(), "json": b"{"},
    2: answered({"caption": "a cat"}, txt=b"no image"),
    3: answered({"text": "<ImageHere> twice", "answer": "x", "raw": True}, txt=b"no image"),
    4: answered({"text": "what"}),
    6: answered({"text": "what", "answer": "x"}, jpg=image()[:300]),
    7: answered({"text": "what", "answer": " "}),
    8: answered({"text": "long", "answer": "y" * 500}),
}


def checked(recipe: Path, tmp_path: Path, *options: object) -> tuple[dict[str, Any], int]:
    """(what --json holds, exit code) of the verb in this process."""
    code, out = 0, tmp_path / "check.json"
    try:
        verbs.call(check, recipe, "--json", out, *options)
    except SystemExit as left:
        code = left.code
    return json.loads(out.read_text()), code


def of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    (one,) = [each for each in found["training"] if each["section"]["name"] == name]
    return one


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--all", "--workers", 2)])
def test_broken_samples_are_named_and_counted(
    options: tuple, recipe_file: FILE, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same in one process and in several."""
    folder = write(tmp_path / "d", BROKEN)
    recipe = recipe_file(data__datasets=[{"name": "d", "shards": str(folder)}])
    found, code = checked(recipe, tmp_path, *options)
    tally = of("d", found)["tally"]
    assert (code, tally["looked_at"]) == (1, 10)
    once = dict.fromkeys(("bad_json", "missing_image", "corrupt_image", "empty_answer"), 1)
    assert tally["unusable"] == {**once, "bad_record": 2}
    assert [(b["key"], b["reason"], Path(b["shard"]).name) for b in tally["broken"]] == [
        ("0001", "bad_json", "00000.tar"),
        ("0002", "missing_image", "00000.tar"),
        ("0003", "bad_record", "00000.tar"),
        ("0004", "bad_record", "00000.tar"),
        ("0006", "corrupt_image", "00001.tar"),
        ("0007", "empty_answer", "00001.tar"),
    ]
    assert "<ImageHere>" in tally["broken"][2]["message"]
    assert (tally["images"], tally["missing_images"], tally["corrupt_images"]) == (8, 1, 1)
    assert tally["longest_text"] > 500 and tally["longest_sample"].endswith("sample 0008")
    printed = capsys.readouterr().out
    assert (
        "6 of 10 samples drop out (1 bad_json, 2 bad_record, 1 corrupt_image, 1 empty_answer, 1 missing_image)"
        in printed
    )
    assert all(b["message"] in printed for b in tally["broken"])


def test_broken_samples_are_those_that_training_leaves_out(raw_recipe: RAW, recipe_file: FILE, tmp_path: Path) -> None:
    """Reason by reason and message by message, against the loader."""
    from transformers import AutoTokenizer

    from tinygptv_ds.data.loader.dataset import MicroBatches
    from tinygptv_ds.data.loader.sample import Tokens
    from tinygptv_ds.processing.sequence import ImageTokens

    changes = {"data__datasets": [{"name": "d", "shards": str(write(tmp_path / "d", BROKEN))}]}
    recipe = build_recipe(raw_recipe(**changes, train__batch_size=10, train__micro_batch_size=10), "test")
    tokens = Tokens(AutoTokenizer.from_pretrained(recipe.model.phi), recipe.text, ImageTokens(-1, 3), 28)
    loaded = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)[0, 0]
    found, _ = checked(recipe_file(**changes), tmp_path)
    broken = {(b["reason"], b["message"]) for b in of("d", found)["tally"]["broken"]}
    assert broken == {(skipped.reason, skipped.message) for skipped in loaded.skipped}


def test_a_few_broken_samples_train_and_more_than_the_recipe_allows_do_not(recipe_file: FILE, tmp_path: Path) -> None:
    """As in a run, where `max_skipped_share` decides; a dataset that is too broken is left out by the option."""
    bad = write(tmp_path / "bad", dict.fromkeys(range(5), BROKEN[1]))
    good = write(tmp_path / "good", {})
    datasets = [{"name": "bad", "shards": str(bad), "weight": 1}, {"name": "good", "shards": str(good), "weight": 9}]
    found, code = checked(recipe_file(data__datasets=datasets, data__max_skipped_share=0.05), tmp_path)
    assert (code, found["complete"], found["skipped_share"]) == (0, True, pytest.approx(0.05))
    found, code = checked(recipe_file(data__datasets=datasets, data__max_skipped_share=0.04), tmp_path)
    assert (code, found["left_out"], found["options"]) == (1, ["bad"], ["--set 'data.only=[good]'"])
    assert [share["name"] for share in found["plan"]["shares"]] == ["good"]


def test_samples_are_spread_over_all_shards(recipe_file: FILE, tmp_path: Path) -> None:
    """One broken sample in each shard of five; with one sample a shard, the first, none is met."""
    folder = write(tmp_path / "d", dict.fromkeys(range(4, 100, 5), BROKEN[1]), count=100)
    recipe = recipe_file(data__datasets=[{"name": "d", "shards": str(folder)}])
    tally = of("d", checked(recipe, tmp_path, "--samples", 20)[0])["tally"]
    assert (tally["looked_at"], tally["unusable"]) == (20, {})
    tally = of("d", checked(recipe, tmp_path, "--samples", 50)[0])["tally"]
    assert (tally["looked_at"], tally["unusable"]) == (50, {"bad_json": 10})
    tally = of("d", checked(recipe, tmp_path, "--all")[0])["tally"]
    assert (tally["looked_at"], tally["unusable"]) == (100, {"bad_json": 20})


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_what_is_missing_and_the_option_that_trains_on_the_rest(
    raw_recipe: RAW, shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The option is given to a run as it is, and that run finds all its data."""
    from helpers import tiny

    raw = raw_recipe(data__validation=[{"name": "v", "shards": "nowhere"}, {"name": "w", "shards": str(shards["vqa"])}])
    raw["data"]["datasets"] += [{"name": "gqa", "shards": str(tmp_path / "{00000..00011}.tar")}]
    shutil.copy(shards["vqa"] / "00000.tar", tmp_path / "00003.tar")
    found, code = checked(tiny.write_recipe(tmp_path / "r.yaml", raw), tmp_path)
    gqa = of("gqa", found)
    assert (code, gqa["found"], gqa["missing"], gqa["samples"]) == (1, 1, 11, 5)
    assert [Path(name).name for name in gqa["first_missing"]] == [f"{n:05d}.tar" for n in (0, 1, 2, 4, 5)]
    assert "train_balanced_questions.json" in gqa["how_to_get"]
    assert found["left_out"] == ["gqa", "v"]
    printed = capsys.readouterr().out
    option = printed.partition("To train on the others: ")[2].strip()
    overrides = [word for word in shlex.split(option) if word != "--set"]
    recipe = build_recipe(apply_overrides(raw, overrides), "test")
    check_files(recipe)
    assert [d.name for d in recipe.data.used] == ["vqa", "text", "chat", "pair"]
    assert [d.name for d in recipe.data.validation] == ["w"]
    narrower = printed.partition("shard(s) that are there: --set ")[2].splitlines()[0]
    narrowed = build_recipe(apply_overrides(raw, [narrower]), "test")
    assert expand_shards(narrowed.data.datasets[4].shards) == [tmp_path / "00003.tar"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\n<!DOCTYPE html><title>404</title>", "a web page"),
        (gzip.compress(b"a tar", mtime=0), "gunzip"),
        (b"\xff\xd8\xff\xe0 a photograph", "no uncompressed tar file"),
        ("folder", "it is a folder"),
        ("pipe", "it is a pipe or a device"),
        ("a link to itself", "Too many levels of symbolic links"),
        (b"", None),  # holds no sample, which is a warning
        (b"\0" * 1024, None),
    ],
)
def test_what_is_no_tar_is_found_before_weights_are_read(
    content: bytes | str, named: str | None, raw_recipe: RAW, shards: dict[str, Path], tmp_path: Path
) -> None:
    """Among thousands, nor is a pipe waited for; the option that is proposed does without the dataset."""
    from helpers import tiny

    folder = Path(shutil.copytree(shards["vqa"], tmp_path / "d"))
    odd = folder / "00009.tar"
    if isinstance(content, bytes):
        odd.write_bytes(content)
    else:
        make = {"folder": odd.mkdir, "pipe": lambda: os.mkfifo(odd), "a link to itself": lambda: odd.symlink_to(odd)}
        make[content]()
    raw = raw_recipe()
    raw["data"]["datasets"].append({"name": "odd", "shards": str(folder)})
    recipe = build_recipe(raw, "test")
    if named is None:
        check_files(recipe)
        return
    with pytest.raises(ConfigError, match=rf"{odd}.*{named}") as error:
        check_files(recipe)
    assert "data.only=[vqa, text, chat, pair]" in str(error.value)
    found, code = checked(tiny.write_recipe(tmp_path / "r.yaml", raw), tmp_path)
    assert code == 1 and odd.name in json.dumps(of("odd", found))
    for number in range(10, 14):
        shutil.copy(ROOT / "README.md", folder / f"{number:05d}.tar")
    with pytest.raises(ConfigError, match="4 more of its 8 shards cannot be read"):
        check_files(recipe)


def test_nothing_is_there(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published recipe on a bare machine: every dataset with the way to it."""
    monkeypatch.chdir(tmp_path)
    found, code = checked(ROOT / "stages/stage4.yaml", tmp_path)
    assert (code, len(found["left_out"]), found["options"], found["plan"]) == (1, 20, None, None)
    printed = capsys.readouterr().out
    assert printed.count("tinygptv-ds prepare") == 20 and "No training dataset is left." in printed


def test_a_shard_that_is_cut_short(recipe_file: FILE, shards: dict[str, Path], tmp_path: Path) -> None:
    """Inside a sample and behind the last; also when its index is there, so that no run would speak of it again."""
    folder = Path(shutil.copytree(shards["vqa"], tmp_path / "d"))
    tar, whole = folder / "00001.tar", (shards["vqa"] / "00001.tar").read_bytes()
    index = load_index(tar)
    last = index.members(4)[-1]
    recipe = recipe_file(data__datasets=[{"name": "d", "shards": str(folder)}])
    for length, samples in ((index.members(3)[0].offset + 5, 3), (last.offset + last.size, 4)):
        tar.write_bytes(whole[:length])
        for _ in range(2):
            found, code = checked(recipe, tmp_path)
            assert (code, found["left_out"]) == (1, [])
            assert of("d", found)["tally"]["cut_shards"] == [
                f"{tar}: cut short at byte {length}; its {samples} complete samples are used"
            ]


def test_a_file_that_is_no_tar(recipe_file: FILE, shards: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards["vqa"], tmp_path / "d"))
    (folder / "00001.tar").write_bytes(b"<html>404</html>" * 100)
    datasets = [{"name": "d", "shards": str(folder)}, {"name": "vqa", "shards": str(shards["vqa"])}]
    found, code = checked(recipe_file(data__datasets=datasets), tmp_path)
    (message,) = of("d", found)["unreadable"]
    assert message.startswith(f"{folder}/00001.tar: no uncompressed tar")
    assert (code, of("d", found)["samples"], found["left_out"]) == (1, 7, ["d"])
    assert found["options"] == ["--set 'data.only=[vqa]'"]


def test_members_behind_the_last_sample_are_no_damage(recipe_file: FILE, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("a.json", b'{"text": "", "answer": "x"}'), ("README", b"not of a sample" * 100)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found, code = checked(recipe_file(data__datasets=[{"name": "d", "shards": str(folder)}]), tmp_path)
    assert (code, of("d", found)["tally"]["cut_shards"]) == (0, [])


# ---- the mixture -----------------------------------------------------------------------------------------------------


def test_the_mixture_is_what_the_stream_gives(raw_recipe: RAW, recipe_file: FILE, tmp_path: Path) -> None:
    """Counted in the stream itself: exact shares, the pass, and the epochs."""
    changes = {"data__only": ["chat", "vqa"]}
    raw = raw_recipe(**changes)
    for dataset, weight in zip(raw["data"]["datasets"], (3, 7, 1.5, 2), strict=True):
        dataset["weight"] = weight
    changes["data__datasets"] = raw["data"]["datasets"]
    found, code = checked(recipe_file(**changes), tmp_path)
    plan = found["plan"]
    assert code == 0
    assert {s["name"]: (s["per_cycle"], s["percent"]) for s in plan["shares"]} == {
        "vqa": (2, pytest.approx(200 / 3)),
        "chat": (1, pytest.approx(100 / 3)),
    }
    stream = open_stream(build_recipe(raw, "test")).order
    refs = [ref for step in range(plan["steps_per_pass"]) for ref in stream.step(step)]
    seen = {name: [r for r in refs if r.dataset == name] for name in ("vqa", "chat")}
    assert all(len({(r.shard, r.index) for r in refs}) == 12 for refs in seen.values())
    before = [r for r in refs[: -plan["batch_size"]] if r.dataset == "chat"]
    assert len({(r.shard, r.index) for r in before}) < 12
    for share in plan["shares"]:
        assert share["epochs_per_pass"] == pytest.approx(len(seen[share["name"]]) / 12, abs=0.1)
        assert share["epochs_of_run"] == pytest.approx(6 * 8 * share["percent"] / 100 / 12)


# ---- a dataset's own files -------------------------------------------------------------------------------------------


@pytest.fixture
def gqa_root(tmp_path: Path) -> Path:
    """Eight questions, two of them about an image that is not there."""
    folder = tmp_path / "root/gqa"
    folder.mkdir(parents=True)
    entries = [{"image": f"{n}.jpg", "question": "q", "answer": "a"} for n in (0, 1, 9, 2, 3, 9)]
    (folder / "train_balanced_questions.json").write_text(json.dumps([*entries, {"image": "0.jpg"}, entries[0]]))
    (folder / "images").mkdir()
    for number in range(4):
        (folder / f"images/{number}.jpg").write_bytes(image())
    return tmp_path / "root"


def test_own_files_below_a_root(
    gqa_root: Path, recipe_file: FILE, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipe_file(data__datasets=[{"name": "gqa", "shards": str(tmp_path / "none")}])
    sources = of("gqa", checked(recipe, tmp_path, "--root", gqa_root)[0])["sources"]
    assert sources["files"] == {"gqa/train_balanced_questions.json": True, "gqa/images": True}
    assert (sources["entries"], sources["all_entries"], sources["missing_images"]) == (8, True, 2)
    assert sources["first_missing"].endswith("9.jpg does not exist") and sources["unusable"] == {"missing_field": 1}
    assert "of all 8 annotation entries, 2 (25.00 %) lack their image" in capsys.readouterr().out
    sources = of("gqa", checked(recipe, tmp_path, "--root", gqa_root, "--samples", 3)[0])["sources"]
    assert (sources["entries"], sources["all_entries"], sources["missing_images"]) == (3, False, 1)
    (gqa_root / "gqa/train_balanced_questions.json").write_text("{")
    sources = of("gqa", checked(recipe, tmp_path, "--root", gqa_root)[0])["sources"]
    assert "is no JSON" in sources["problem"]
    (gqa_root / "gqa/train_balanced_questions.json").unlink()
    sources = of("gqa", checked(recipe, tmp_path, "--root", gqa_root)[0])["sources"]
    assert (sources["files"]["gqa/train_balanced_questions.json"], sources["entries"]) == (False, 0)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_without_torch(recipe_file: FILE) -> None:
    """The whole command in a process that cannot import it."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'webdataset', 'deepspeed')));"
        "from tinygptv_ds.cli import main; main(['check-data', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_file())],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Everything that" in done.stdout and "25.00 %" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", 0], "at least 1"),
        (["--root", "nowhere"], "no such folder"),
        (["--set", "data.only=[vqu]"], "did you mean vqa"),
        (["--set", "data.datasets.0.weight=0.123456789"], "rounder weights"),
    ],
)
def test_mistakes(options: list, message: str, recipe_file: FILE) -> None:
    with pytest.raises(ConfigError, match=message):
        verbs.call(check, recipe_file(), *options)
