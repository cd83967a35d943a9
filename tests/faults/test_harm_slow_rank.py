"""One rank's loader ten times slower than the other's: the same steps, the straggler named, and what a run reports."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from harm_slow_loader import slow_rank
from helpers import tiny
from helpers.forked import Ranks, ended
from helpers.launcher import ZERO_3
from helpers.written import Written
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from stages.tiny.quickstart import training_lines

STEPS = 4
NAMES = ("vqa", "text", "chat", "pair")


class Runs(NamedTuple):
    """The same recipe on two ranks under ZeRO-3, one of them slow, and on one rank without validation."""

    slow: Ranks
    alone: Ranks
    report: Path


@pytest.fixture(scope="module")
def runs(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("slow")
    raw = tiny.recipe(weights, shards, train__steps_per_epoch=STEPS, train__validate_every=2)
    raw["data"]["validation_share"] = 0.25
    recipe = tiny.write_recipe(folder / "recipe.yaml", raw)
    fault = {"fault": slow_rank, "rank": 1, "seconds": 0.3, "report": folder / "wandb.json"}
    slow = ended(recipe, folder / "slow", ZERO_3, "--set=train.trackers=[wandb]", ranks=2, **fault)
    alone = ended(recipe, folder / "alone", "--set=train.validate_every=0")
    return Runs(slow, alone, folder)


def lines(done: Written, name: str) -> list[dict]:
    return [line for line in done.metrics if name in line]


def test_all_ranks_do_the_same_steps(runs: Runs) -> None:
    """Nothing is lost to the slow rank: the losses are those of a run without it."""
    slow, alone = (training_lines(done.folder / "metrics.jsonl") for done in (runs.slow, runs.alone))
    assert [line["step"] for line in slow] == [line["step"] for line in alone] == list(range(1, STEPS + 1))
    for mine, other in zip(slow, alone, strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


def test_the_straggler_is_named(runs: Runs) -> None:
    """It is named from the second step on, since in the first one everything warms up."""
    for line in lines(runs.slow, "perf/slowest_rank")[1:]:
        assert line["perf/slowest_rank"] == 1
        assert line["perf/data_wait_max_pct"] > 20 > 2 * line["perf/data_wait_pct"] - line["perf/data_wait_max_pct"]
        assert line["perf/slowest_seconds"] >= 0.6  # two micro-batches a step
    log = (runs.slow.folder / "log.txt").read_text()
    assert log.count("rank 1 holds up the others: data wait") >= STEPS - 1
    assert "rank 0 holds up" not in log
    assert "holds up" not in (runs.alone.folder / "log.txt").read_text()


def test_validation_is_the_same_on_any_ranks(runs: Runs) -> None:
    """Two ranks under ZeRO-3, one of them without an image now and then, give what one rank gives, and train alike."""
    slow, alone = lines(runs.slow, "val/loss"), lines(runs.alone, "val/loss")
    assert [line["step"] for line in slow] == [2, STEPS] and [line["step"] for line in alone] == [STEPS]
    wanted = {"val/loss", *(f"val/loss_{name}" for name in NAMES)}
    assert wanted == {name for name in slow[0] if name.startswith("val/")}
    for name in wanted:
        assert slow[1][name] == pytest.approx(alone[0][name], rel=1e-5), name
        assert slow[1][name] < slow[0][name] + 0.1
    assert f"step {STEPS}: validation loss {alone[0]['val/loss']:.4f} (vqa " in runs.alone.output


def test_the_first_samples_are_shown(runs: Runs) -> None:
    """The log and TensorBoard have one sample of each dataset, with the target tokens marked."""
    log = (runs.slow.folder / "log.txt").read_text()
    events = EventAccumulator(str(runs.slow.folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (event,) = events.Tensors("8_samples/first_of_each_dataset/text_summary")
    (table,) = event.tensor_proto.string_val
    rows = table.decode().splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(NAMES)
    for name, row in zip(NAMES, rows, strict=True):
        assert "&lt;&lt;" in row and "###>>" in row
        (message,) = [line for line in log.splitlines() if f"INFO   {name} | " in line]
        assert "<<" in message and "###>>" in message
    assert len(events.Images("8_samples/first_images")) == 1


def test_one_entry_of_hyperparameters(runs: Runs) -> None:
    events = EventAccumulator(str(runs.slow.folder / "tensorboard"))
    events.Reload()
    found = events.PluginTagToContent("hparams")
    assert len([tag for tag in found if tag.endswith("session_start_info")]) == 1
    (start,) = [content for tag, content in found.items() if tag.endswith("session_start_info")]
    assert b"optimizer.lr" in start and b"zero_stage" in start and b"train.batch_size" in start
    assert not [path for path in (runs.slow.folder / "tensorboard").iterdir() if path.is_dir()]
    tags = sorted(events.Tags()["scalars"])
    assert tags[:2] == ["1_loss/train", "1_loss/val"]  # what TensorBoard opens on
    assert {"5_perf/tflops", "4_optimizer/spike", "6_data/mix_vqa", "3_loss_by_dataset/val_vqa"} <= set(tags)
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    matched = {title: [tag for tag in tags if re.fullmatch("|".join(each), tag)] for title, each in charts.items()}
    assert matched["training and validation"] == tags[:2] and "6_data/mix_vqa" in matched["per cent of the samples"]
    empty = {title for title, found in matched.items() if not found}
    assert empty == {"strict"}  # nothing is scored here


def test_the_metrics_of_hyperparameters_are_there(runs: Runs) -> None:
    events = EventAccumulator(str(runs.slow.folder / "tensorboard"))
    events.Reload()
    (content,) = [text for tag, text in events.PluginTagToContent("hparams").items() if tag.endswith("experiment")]
    found = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert {info.name.tag for info in found} == {"1_loss/train", "1_loss/val"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_get_every_metric(runs: Runs) -> None:
    """They have the names of metrics.jsonl, over steps of their own, in a run that a resumed one finds again."""
    settings, *sent, end = json.loads((runs.report / "wandb.json").read_text())
    assert settings["project"] == "tinygptv" and settings["resume"] == "allow" and settings["name"] == "slow"
    assert settings["id"] == json.loads((runs.slow.folder / "trackers.json").read_text())["wandb"]
    assert settings["config"]["train"]["batch_size"] == 8 and settings["*"] == "step" and end == 0
    written = runs.slow.metrics
    assert [line["step"] for line in sent] == [line["step"] for line in written] == [1, 2, 2, 3, 4, 4]
    for mine, line in zip(sent, written, strict=True):
        line.pop("time")
        assert mine == line and all(math.isfinite(value) for value in mine.values())
