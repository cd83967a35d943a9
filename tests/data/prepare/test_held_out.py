"""`prepare --held-out`: two parts that share no image, the same whatever the order, the place and the workers."""

import argparse
import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinygptv_ds.data.prepare.held_out import parse_amount, split_by_image
from tinygptv_ds.data.prepare.prepare import add_arguments, prepare, prepare_split, run
from tinygptv_ds.data.sets.common import PreparedSample, Skipped
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.errors import DataError

IMAGES = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions about each image, some about two images, and two about none."""
    root = tmp_path_factory.mktemp("root")
    for number in range(IMAGES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{number}.png")
    entries = [
        {"image": f"{n % IMAGES}.png", "question": f"q{n}", "answer": "a", "id": n % IMAGES} for n in range(3 * IMAGES)
    ]
    entries += [{"image": ["3.png", "4.png"], "question": "both?", "answer": "a", "id": 3}]
    entries += [{"question": "no image", "answer": "a", "id": "text"}, {"question": "no image", "answer": "a"}]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, [*entries, {"image": "1.png"}])))
    return root


def colours(folder: Path) -> set[int]:
    reader = ShardReader()
    samples = [reader.read(tar, i) for tar in folder.glob("*.tar") for i in range(sample_count(tar))]
    return {Image.open(io.BytesIO(image)).getpixel((0, 0))[0] for sample in samples for image in sample.images}


def tars(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.tar")}


def test_no_image_is_in_both_parts(root: Path, tmp_path: Path) -> None:
    reports = prepare_split("jsonl", root, tmp_path / "out", 0.2)
    train, held_out = (colours(tmp_path / "out" / side) for side in ("train", "held_out"))
    assert train | held_out == set(range(IMAGES))
    assert not train & held_out
    assert ({3, 4} <= train) != ({3, 4} <= held_out)
    assert reports["train"].samples + reports["held_out"].samples == 3 * IMAGES + 3
    assert 11 <= reports["held_out"].samples <= 14
    assert (reports["train"].skipped, reports["held_out"].skipped) == ({"missing_field": 1}, {})
    whole = prepare("jsonl", root, tmp_path / "whole")
    assert whole.samples == 3 * IMAGES + 3


def test_order_place_workers_and_resuming_make_no_difference(root: Path, tmp_path: Path) -> None:
    first = prepare_split("jsonl", root, tmp_path / "a", 13, samples_per_shard=10)
    prepare_split("jsonl", root, tmp_path / "b", 13, samples_per_shard=10, workers=2)
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    assert all(
        report.reused for report in prepare_split("jsonl", root, tmp_path / "a", 13, samples_per_shard=10).values()
    )
    assert not any(report.reused for report in first.values())
    moved = tmp_path / "moved"
    moved.mkdir()
    for image in root.glob("*.png"):
        (moved / image.name).write_bytes(image.read_bytes())
    lines = (root / "data.jsonl").read_text().splitlines()
    random.Random(1).shuffle(lines)
    (moved / "data.jsonl").write_text("\n".join(lines))
    prepare_split("jsonl", moved, tmp_path / "c", 13)
    assert colours(tmp_path / "c/held_out") == colours(tmp_path / "a/held_out")


def test_another_amount_or_a_folder_of_whole_shards_is_refused(root: Path, tmp_path: Path) -> None:
    prepare_split("jsonl", root, tmp_path / "a", 0.2)
    with pytest.raises(DataError, match=r"other settings \(held_out\)"):
        prepare_split("jsonl", root, tmp_path / "a", 0.3)
    with pytest.raises(DataError, match="not empty"):
        prepare("jsonl", root, tmp_path / "a")
    prepare("jsonl", root, tmp_path / "b")
    with pytest.raises(DataError, match="made without --held-out"):
        prepare_split("jsonl", root, tmp_path / "b", 0.2)


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "out"
    run(parser.parse_args(["jsonl", "--root", str(root), "--out", str(out), "--held-out", "6", "--workers", "1"]))
    printed = capsys.readouterr().out
    assert "jsonl/train: 57 samples" in printed
    assert "jsonl/held_out: 6 samples" in printed
    assert "  missing_field, e.g. data.jsonl:64: has no 'conversations'; its keys are image; read are" in printed
    assert f"train on {out}/train, evaluate on {out}/held_out" in printed.splitlines()[-1]
    with pytest.raises(DataError, match="digits takes no --held-out"):
        run(parser.parse_args(["digits", "--out", str(out), "--held-out", "6"]))


@pytest.mark.parametrize(("text", "amount"), [("0.1", 0.1), ("5", 5), ("1", 1), ("2.0", 2)])
def test_amounts(text: str, amount: float) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "inf", "10%", ""])
def test_amounts_that_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"share of the samples such as 0\.1"):
        parse_amount(text)


def sample(*images: str) -> PreparedSample:
    return PreparedSample("0", {"text": "".join(images), "answer": ""}, tuple(map(Path, images)))


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=3), min_size=1, max_size=20),
    st.floats(0.01, 0.99) | st.integers(1, 12),
)
def test_groups_stay_together(images: list[list[str]], amount: float) -> None:
    """However images are shared between samples, and never everything nor nothing is held out."""
    samples = [*(sample(*names) for names in images), Skipped("1", "bad_record", "")]
    try:
        split = split_by_image(samples, Path(), amount)
    except DataError:
        return
    sides = [split.is_held_out(entry) for entry in samples]
    assert sides[-1] is False
    for side, names in zip(sides, images, strict=False):
        for other, others in zip(sides, images, strict=False):
            assert side == other or not set(names) & set(others)
            assert side == other or names != others
    assert 0 < sum(sides) < len(images)


def test_the_amount_is_met_to_a_group() -> None:
    singles = [sample(f"{number}.jpg") for number in range(100)]
    for amount, number in ((0.1, 10), (0.001, 1), (25, 25), (99, 99)):
        split = split_by_image(singles, Path(), amount)
        assert sum(map(split.is_held_out, singles)) == number
    large = [sample("a.jpg")] * 50 + [sample("b.jpg")] * 40
    assert sum(map(split_by_image(large, Path(), 3).is_held_out, large)) == 40
    for samples, amount in ((singles[:1], 0.5), (singles, 100), ([], 0.5)):
        with pytest.raises(DataError, match="leave nothing to train on"):
            split_by_image(samples, Path(), amount)
