"""Which way the images of a dataset are read, and that training, the check and features all read them that way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import verbs
from helpers.turned import turned_image
from transformers import AutoTokenizer

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.checks import check_data
from tinygptv_ds.data.loader.background import background_of, reading_of
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.sets import DATASETS
from tinygptv_ds.data.shards.cache import ShardCache
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.features.encode import ImageChunks
from tinygptv_ds.processing.image import WHITE, to_pixels
from tinygptv_ds.processing.sequence import ImageTokens
from tinygptv_ds.train.callbacks.first_samples import count_images


def test_the_name_decides() -> None:
    for name, entry in DATASETS.items():
        assert background_of(DatasetSection(name, "x")) == (WHITE if entry.own else None)
    assert background_of(DatasetSection("mine", "x")) == WHITE
    assert background_of(DatasetSection("mine", "x", background="none")) is None
    assert background_of(DatasetSection("laion", "x", background="#ff0000")) == (255, 0, 0)
    assert reading_of(DatasetSection("laion", "x")) == {}
    assert reading_of(DatasetSection("mine", "x")) == {"background": [255, 255, 255]}


def test_no_color() -> None:
    with pytest.raises(ConfigError, match="datasets, mine: background must be"):
        DatasetSection("mine", "x", background="rgb(1, 2)")
    with pytest.raises(ConfigError, match="datasets, mine: background: 'whyte' is no color"):
        background_of(DatasetSection("mine", "x", background="whyte"))


@pytest.mark.parametrize(("name", "background"), [("mine", WHITE), ("laion", None)])
def test_everything_reads_alike(
    name: str,
    background: tuple | None,
    raw_recipe: Callable[..., dict[str, Any]],
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    record = json.dumps({"text": "what", "answer": "red"}).encode()
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("0", {"png": turned_image((255, 0, 0)), "json": record})
        writer.write("1", {"json": record})
    changes = {"data__datasets": [{"name": name, "shards": str(tmp_path / "d")}]}
    recipe = build_recipe(raw_recipe(**changes, train__batch_size=2, train__micro_batch_size=2), "test")
    tokens = Tokens(AutoTokenizer.from_pretrained(recipe.model.phi), recipe.text, ImageTokens(-1, 3), 28)
    expected = to_pixels(turned_image((255, 0, 0)), 28, background=background)
    batch = MicroBatches(open_stream(recipe), tokens, rank=0, world_size=1)[0, 0].batch
    assert np.array_equal(batch.pixel_values.numpy(), expected[None])
    assert [ref.index == 0 for ref in batch.sample_ids] == batch.has_image().tolist()
    assert count_images([batch]) == f"{name} 1 with image, 1 text only"
    chunks = ImageChunks(writer.tars, [2], 2, 28, ShardCache(), background_of(recipe.data.datasets[0]))
    assert np.array_equal(chunks[0][2][0].pixels, expected[None])
    verbs.call(check_data, recipe_file(**changes), "--json", tmp_path / "check.json")
    tally = json.loads((tmp_path / "check.json").read_text())["training"][0]["tally"]
    assert (tally["with_images"], tally["text_only"], list(tally["image_notes"].values())) == (1, 1, [1, 1])
    printed = capsys.readouterr().out
    assert ("1 images turned upright by EXIF" in printed) == (background is not None)
    assert ("1 images with alpha, which is dropped" in printed) == (background is None)
