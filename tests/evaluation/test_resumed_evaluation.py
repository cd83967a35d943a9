"""An evaluation that was killed resumes from the answers that it has, on any number of ranks, and gives the same."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import forked, tiny
from safetensors.torch import load_file, save_file

from tinygptv_ds.distributed import Ranks
from tinygptv_ds.errors import ConfigError, DataError, WeightsError
from tinygptv_ds.evaluation import runner, scored_model
from tinygptv_ds.evaluation.answer_log import AnswerLog
from tinygptv_ds.evaluation.cli import scores

QUESTIONS, BATCH = 61, 2


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with one image, and one in the middle without any."""
    made = tiny.samples("vqa", QUESTIONS)
    made[30] = tiny.samples("text", 31)[30]
    return tiny.write_shards(tmp_path_factory.mktemp("held_out") / "vqa", made, samples_per_shard=20)


@pytest.fixture(scope="module")
def options(exported: Path, held_out: Path) -> list[str]:
    given = ["--model", str(exported), "--shards", str(held_out), "--batch-size", str(BATCH)]
    return [*given, "--max-new-tokens", "12", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Without interruption, on one rank."""
    out = tmp_path_factory.mktemp("whole")
    (result,) = scores("vqa", [*options, "--out", str(out)])
    assert result["questions"] == len(result["predictions"]) == QUESTIONS
    assert len({row["raw"] for row in result["predictions"]}) > 5  # so that a mix-up shows
    return out, result


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("answers-*.jsonl") for line in path.read_text().splitlines()]


def test_killed_on_one_rank_resumed_on_two(options: list[str], whole: tuple[Path, dict], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "vqa"
    own = folder / "answers-00000.jsonl"
    with forked.launched("eval/vqa.py", [*options, "--out", str(tmp_path / "out")], tmp_path / "out") as run:
        run.wait_for(own)
        while own.stat().st_size < 2000:
            assert run.processes[0].is_alive(), run.output
            time.sleep(0.005)
        run.tell(0, signal.SIGKILL)
        assert run.end() == [-signal.SIGKILL]
    before = own.read_bytes()
    assert before.count(b"\n") < QUESTIONS and not (folder / "results.json").exists()
    own.write_bytes(before + b'{"number": 60, "prompt": "')  # as a kill amid a write leaves it
    argv = [*options, "--out", str(tmp_path / "out")]
    with forked.launched("eval/vqa.py", argv, tmp_path / "out", ranks=2) as run:
        assert run.end() == [0, 0], run.output
    result = json.loads((folder / "results.json").read_text())
    assert result == whole[1]
    assert own.read_bytes().startswith(before)
    assert (folder / "answers-00001.jsonl").stat().st_size > 0
    assert sorted(line["number"] for line in lines(folder)) == list(range(QUESTIONS))


def asked_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the questions of each later call of the model."""
    counts: list[int] = []
    answers = runner.answers

    def counted(model: object, processor: object, prompts: list, *given: object, **named: object) -> Iterator[str]:
        counts.append(len(prompts))
        return answers(model, processor, prompts, *given, **named)

    monkeypatch.setattr(runner, "answers", counted)
    return counts


def test_only_what_is_missing_is_asked(
    options: list[str], whole: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is not whole is asked again as it was, so that its answers have the same neighbours."""
    folder = tmp_path / "vqa"
    folder.mkdir()
    kept = (whole[0] / "vqa/answers-00000.jsonl").read_bytes().splitlines(keepends=True)[: 3 * BATCH + 1]
    (folder / "answers-00003.jsonl").write_bytes(b"".join(kept))
    counts = asked_again(monkeypatch)
    (result,) = scores("vqa", [*options, "--out", str(tmp_path)])
    assert sum(counts) == QUESTIONS - 3 * BATCH
    assert result == whole[1]
    counts.clear()
    (result,) = scores("vqa", [*options, "--out", str(tmp_path), "--limit", "5"])
    assert counts == [] and result["predictions"] == whole[1]["predictions"][:5]


def test_other_settings_are_refused_or_start_again(
    options: list[str], whole: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores("vqa", [*options, "--out", str(tmp_path), "--limit", "3"])
    changed = [*options, "--out", str(tmp_path), "--limit", "3", "--max-new-tokens", "3"]
    with pytest.raises(ConfigError, match=r"other settings \(max_new_tokens: 12 there, 3 here\): --fresh"):
        scores("vqa", changed)
    counts = asked_again(monkeypatch)
    (result,) = scores("vqa", [*changed, "--fresh"])
    assert sum(counts) == 3 and result["decoding"]["max_new_tokens"] == 3
    settings = json.loads((tmp_path / "vqa/settings.json").read_text())
    (tmp_path / "vqa/settings.json").write_text(json.dumps(settings | {"checkpoint": "0" * 64}))
    with pytest.raises(ConfigError, match="checkpoint: "):
        scores("vqa", changed)


def test_other_weights_are_refused_before_they_are_hashed(
    options: list[str], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their names, in the time of a header, however large the file is."""
    folder = shutil.copytree(exported, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"another.weight": torch.zeros(3)}, folder / "model.safetensors")
    monkeypatch.setattr(scored_model, "hashes", lambda _: pytest.fail("hashed"))
    with pytest.raises(WeightsError, match=r"unexpected: another\.weight"):
        scores("vqa", ["--model", str(folder), *options[2:], "--out", str(tmp_path / "out")])


def test_answers_to_another_question_are_not_taken(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, 0, ["a", "b", "c"]) as log:
        log.add(range(2), ["1", {"losses": [0.5]}])
        with pytest.raises(ConfigError, match="another evaluation is writing"), AnswerLog(tmp_path, 0, ["a"]):
            pass
    with AnswerLog(tmp_path, 1, ["a", "changed", "c"]) as log:
        assert (log.known([0]), log.known([0, 1])) == (["1"], None)
    with AnswerLog(tmp_path, 1, ["a"]) as log:
        assert log.known([0]) == ["1"]


@pytest.mark.parametrize(("count", "batch", "world"), [(0, 4, 2), (1, 4, 3), (61, 2, 2), (64, 8, 8), (10, 3, 4)])
def test_every_question_once_and_as_many_batches_on_every_rank(count: int, batch: int, world: int) -> None:
    shares = [runner.share(count, batch, Ranks(rank, rank, world, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    numbers = sorted(number for share in shares for part in share if part is not None for number in part)
    assert numbers == list(range(count))
    alone = set(runner.share(count, batch, Ranks(0, 0, 1, 1)))
    assert {part for share in shares for part in share if part is not None} == alone


def test_an_image_that_cannot_be_decoded_is_named(options: list[str], tmp_path: Path, exported: Path) -> None:
    made = tiny.samples("vqa", 4)
    made[2] = type(made[2])("torn", made[2].record, (made[2].images[0][:80],))
    shards = tiny.write_shards(tmp_path / "torn", made)
    with pytest.raises(DataError, match=r"vqa, question 00000\.tar/torn: the image cannot be decoded"):
        scores("vqa", [*options, "--shards", str(shards), "--out", str(tmp_path / "out")])


def test_choices_are_ranked_alike_in_any_batch(exported: Path, tmp_path: Path) -> None:
    from helpers import benchmark_files

    root = benchmark_files.all_of_vqa(tmp_path / "root")
    given = ["--model", str(exported), "--benchmarks", "iconvqa", "--root", str(root), "--dtype", "fp32"]
    one, two = (
        scores("vqa", [*given, "--batch-size", str(size), "--out", str(tmp_path / str(size))])[0] for size in (1, 2)
    )
    for alone, adjacent in zip(one["predictions"], two["predictions"], strict=True):
        assert alone["losses"] == pytest.approx(adjacent["losses"], rel=1e-5) and alone["answer"] == adjacent["answer"]
    assert [len(row["losses"]) for row in one["predictions"]] == [2, 3]


def test_scores_are_logged_at_the_checkpoints_step(options: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "board"
    given = [*options, "--limit", "2", "--out", str(tmp_path / "out"), "--tensorboard", str(board)]
    with pytest.raises(ConfigError, match=r"the step of .* is unknown"):
        scores("vqa", given)
    (result,) = scores("vqa", [*given, "--step", "1200"])
    events = EventAccumulator(str(board))
    events.Reload()
    assert {"2_scores/vqa/strict", "2_scores/vqa/compat", "2_scores/vqa/empty_answers"} <= set(events.Tags()["scalars"])
    (event,) = events.Scalars("2_scores/vqa/strict")
    assert (event.step, event.value) == (1200, pytest.approx(result["strict"]))


def test_steps_of_models() -> None:
    from tinygptv_ds.evaluation.scored_model import _step

    recipe = tiny.recipe(Path("w"), {"x": Path("y")}, train__steps_per_epoch=7, train__epochs=3)
    notes = [{"step": 5}, {"recipe": recipe}, {"recipe": "00ff"}, {}]
    assert [_step(SimpleNamespace(notes=each)) for each in notes] == [5, 21, None, None]
