"""The READMEs in two languages say the same, and their figures are those of the code."""

import re
from pathlib import Path

import pytest

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.estimate.data_summary import summarize_data
from tinygptv_ds.estimate.estimate import estimate
from tinygptv_ds.estimate.gpus import cards_named

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
CARDS = ("RTX-3090", "RTX-4090", "A100-80GB", "H100-80GB")


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def skeleton(text: str) -> dict[str, list]:
    """What both languages share: headings' levels, code without its remarks, tables' shapes, links, code in prose."""
    prose = without_blocks(text)
    blocks = [
        re.sub(r"\s+# .*$", "", code, flags=re.M) for code in re.findall(r"^```.*?^```$", text, flags=re.M | re.S)
    ]
    links = re.findall(r"\]\(([^)]+)\)", prose) + re.findall(r'(?:src|srcset)="([^"]+)"', prose)
    return {
        "headings": re.findall(r"^(#+) ", prose, flags=re.M),
        "blocks": blocks,
        "tables": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "links": [link for link in links if not link.startswith("README")],
        "code": re.findall(r"`([^`\n]+)`", prose),
    }


@pytest.mark.parametrize("what", ["headings", "blocks", "tables", "links", "code"])
def test_both_languages_are_in_step(what: str) -> None:
    english, chinese = skeleton(ENGLISH.read_text())[what], skeleton(CHINESE.read_text())[what]
    assert len(english) > 5 or what == "blocks"
    assert english == chinese


def test_each_links_to_the_other_and_to_files() -> None:
    assert "(README.zh-CN.md)" in ENGLISH.read_text() and "(README.md)" in CHINESE.read_text()
    images = re.findall(r'(?:src|srcset)="([^"]+)"', ENGLISH.read_text())
    assert len(images) == 2 and all((ROOT / image).is_file() for image in images)


def test_the_readme_is_short() -> None:
    prose = without_blocks(ENGLISH.read_text())
    assert len(re.findall(r"[A-Za-z][\w'-]*", re.sub(r"\]\([^)]+\)", "]", prose))) < 1200


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def test_memory_and_time_are_those_of_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no weights and no data there: the published sizes and the assumed lengths
    expected = []
    for stage in (1, 2, 3, 4):
        recipe = load_recipe(ROOT / f"stages/stage{stage}.yaml")
        found = estimate(recipe, cards_named(list(CARDS)), gpus=1, mfu=0.4, data=summarize_data(recipe))
        train = recipe.train
        steps = f"{train.batch_size} x {train.epochs * train.steps_per_epoch:,}"
        gib = f"{found.memory['ZeRO-2'].total / 2**30:.1f}"
        expected.append(" | ".join([steps, gib, *(duration(found.speed[card].hours) for card in CARDS)]))
    for document in (ENGLISH, CHINESE):
        missing = [line for line in expected if f"| {line} |" not in document.read_text()]
        assert missing == [], f"{document.name} lacks these parts of its table"
