"""The comments of recipes are the documentation of the fields, and every field has some."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.config.evaluation_section import EvaluationSection, ScoredSection
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.config.recipe import ModelSection, Recipe, TextSection
from tinygptv_ds.config.render import field_docs, recipe_docs, recipes, render
from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
SECTIONS = (
    *(Recipe, ModelSection, TextSection, DataSection, DatasetSection),
    *(OptimizerSection, TrainSection, EvaluationSection, ScoredSection),
)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_its_documentation_below_it(section: type) -> None:
    assert list(field_docs(section)) == [each.name for each in fields(section)]


def test_every_recipe_is_rendered() -> None:
    assert len(recipes()) == 9
    assert set(recipes()) == set((ROOT / "stages").rglob("*.yaml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_recipes_equal_their_rendering(path: Path) -> None:
    """If this fails, run `python -m tinygptv_ds.config.render` and commit the result."""
    text = path.read_text()
    assert render(text) == text
    values = yaml.safe_load(text)
    sections = {name: section for name, section in values.items() if isinstance(section, dict) and name != "deepspeed"}
    keys = {(name,) for name in values} | {(name, key) for name, section in sections.items() for key in section}
    assert keys == set(recipe_docs())


def test_values_and_remarks_stay() -> None:
    lines = ["# A header.", "", "# an old comment", "seed: 3  # a remark", "data:", "  datasets:", "    - {name: a}"]
    text = "\n".join([*lines, "    # - {name: b}", "  only: [a]", ""])
    docs = recipe_docs()
    rendered = render(text)
    assert yaml.safe_load(rendered) == yaml.safe_load(text)
    assert "# A header.\n\n" in rendered and "seed: 3  # a remark" in rendered and "    # - {name: b}\n" in rendered
    assert "# an old comment" not in rendered
    assert f"# {docs[('seed',)]}\nseed: 3" in rendered and f"  # {docs[('data', 'only')]}\n  only:" in rendered
    assert render(rendered) == rendered


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.batchsize is no key of a recipe"):
        render("train:\n  batchsize: 3\n")
