"""The charts of scores in TensorBoard's custom layout: one for each benchmark, with the tag of its score."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tinygptv_ds.board_tags import board_tag
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.train.metrics.board import describe_run, open_board

RULES = {
    "vqa": ["strict", "contains"],
    "refcoco+": ["strict", "iou"],
    "caption": [],
}  # each benchmark's, as it has them


@pytest.mark.parametrize("names", [list(RULES), []])
def test_each_benchmark_has_its_chart(names: list[str], raw_recipe: Callable[..., Any], tmp_path: Path) -> None:
    scored = [SimpleNamespace(name=name, benchmark=SimpleNamespace(rules=dict.fromkeys(RULES[name]))) for name in names]
    ranks = SimpleNamespace(world_size=2)
    recipe = build_recipe(raw_recipe(), "test")
    board = open_board(tmp_path, None)
    describe_run(board, SimpleNamespace(recipe=recipe, scored=scored, precision="bf16", zero_stage=2, ranks=ranks))
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Loss", "Scores", "Mixture", "Speed"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[1].chart}
    assert list(charts) == (names or ["strict"])
    written = [board_tag(f"eval/{name}/{score}") for name in RULES for score in ("strict", "contains", "cider")]
    matched = {title: [tag for tag in written if re.match(each, tag)] for title, (each,) in charts.items()}
    expected = {"vqa": ["2_scores/vqa/strict"], "refcoco+": ["2_scores/refcoco+/strict"]}
    expected["caption"] = ["2_scores/caption/cider"]
    every = [f"2_scores/{name}/strict" for name in RULES]
    assert matched == (expected if names else {"strict": every})
