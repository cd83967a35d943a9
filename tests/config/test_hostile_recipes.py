"""Recipes that are damaged, hostile or senseless: one short message that names key and value, at once, and no code."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.plain_yaml import parse_yaml
from tinygptv_ds.errors import ConfigError

RECIPE = """stage: 1
seed: 7
model: {phi: p, eva_vit: e, qformer: q}
data:
  datasets: [{name: a, shards: a}]
optimizer: {lr: 1e-4, min_lr: 0}
train: {batch_size: 12, micro_batch_size: 2}
"""
LISTS = "".join(f", &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
MAPS = "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


def with_seed(text: str) -> str:
    return RECIPE.replace("seed: 7", f"seed: {text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_seed("2024-13-45"), "line 2, seed: '2024-13-45' is no valid timestamp"),
        (with_seed("2024-01-01"), "line 2, seed: YAML reads '2024-01-01' as a timestamp"),
        (with_seed("1:30"), "line 2, seed: YAML reads 1:30 as 90, in base 60"),
        (with_seed("010"), "line 2, seed: YAML reads 010 as octal 8"),
        (with_seed("0x_"), "line 2, seed: '0x_' is no valid int"),
        (with_seed("!!int abc"), "line 2, seed: 'abc' is no valid int"),
        (with_seed("!!bool abc"), "line 2, seed: 'abc' is no valid bool"),
        (with_seed("!!binary aGVsbG8="), "line 2, seed: YAML reads 'aGVsbG8=' as a binary"),
        (with_seed("!!set {a, b}"), "line 2, seed: the tag tag:yaml.org,2002:set is not supported"),
        (with_seed("9" * 5000), r"line 2, seed: '9999.*\.\.\.' is too long for a number"),
        (with_seed("0x" + "f" * 290_000), "line 2, seed: '0xffff.*' is too long for a number"),
        (with_seed("1:" * 145_000 + "1"), "line 2, seed: '1:1:.*' is too long for a number"),
        (with_seed("1:" * 145_000 + "1.0"), "line 2, seed: '1:1:.*' is too long for a number"),
        (with_seed("!!int " + "1:" * 145_000 + "1"), "line 2, seed: '1:1:.*' is too long for a number"),
        (with_seed("9" * 100), "seed must be between"),
        ("? " + "9" * 290_000 + "\n: 1\n", "line 1: a key must be text, which '9999.*characters.* is not"),
        ("".join(f"k{i}: \n" for i in range(7_000)) + "k0: \n", "line 7001: k0 is given twice"),
        (with_seed("-1"), "seed must be between 0 and .* not -1"),
        (with_seed("." + "inf"), "line 2, seed: .inf is no finite number"),
        (with_seed("[" * 5000 + "]" * 5000), "line 2: nested more than 40 levels deep"),
        (with_seed("[&a0 [" + ",".join("x" * 10) + "]" + LISTS + "]"), "line 2: more than 15,000 values"),
        ("a0: &a0 {k: v}\n" + MAPS + RECIPE, "more than 15,000 values"),
        (with_seed("&s [*s]"), r"line 2: \*s is used within what it names"),
        (
            RECIPE + "x: !!python/object/apply:os.system ['touch CANARY']\n",
            "line 8, x: the tag .*is not supp",
        ),
        (RECIPE + "[1, 2]: 3\n", "line 8: a key must be text"),
        (RECIPE + "5: 3\n", "line 8: a key must be text, which '5' is not"),
        (RECIPE + "on: 3\n", "line 8: a key must be text, which 'on' is not"),
        (RECIPE + "seed: 8\n", "line 8: seed is given twice"),
        (with_seed(r'"\uD800"'), r"line 2, seed: .* holds half a character"),
        (RECIPE + "---\n" + RECIPE, "line 8, .* another document"),
        (RECIPE + "\x07", "not valid YAML .*#x0007"),
        ("# " + "x" * 400_000, "300,001 characters are too long"),
        ("", "holds no recipe"),
        ("42", "holds no recipe"),
        (RECIPE.replace("1e-4", "1e999"), "optimizer.lr must be a finite number"),
        (RECIPE.replace("1e-4", "nan"), "optimizer.lr must be a finite number"),
        (RECIPE.replace("1e-4", "1" + "0" * 400), "line 6, optimizer.lr: '1000.*' is too long for a number"),
        (RECIPE.replace("name: a", "name: ../../../../x"), "data.datasets: name '../../../../x' must consist of"),
        (RECIPE.replace("name: a", "name: '<b>'"), "data.datasets: name '<b>' must consist of"),
        (RECIPE.replace("12,", "8000000000000,"), "train.batch_size must be at most 10,000,000"),
        (
            RECIPE.replace("12,", "12, epochs: 10000000000, steps_per_epoch: 10000000000,"),
            "train.total_steps must",
        ),
        (RECIPE.replace("12,", "12, startup_minutes: 1e300,"), "train.startup_minutes must be at most"),
        (RECIPE.replace("q}", "q, lora_r: 4000000000}"), "model.lora_r must be at most 8,192, not 4000000000"),
        (RECIPE.replace("q}", "q, proj_hidden_size: 2400000000000}"), "model.proj_hidden_size must be at most"),
        (RECIPE.replace("0}", "0, betas: [0.9, 1.5]}"), r"optimizer.betas must be two numbers in \[0, 1\)"),
    ],
)
def test_each_is_named_at_once(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe)
    assert time.process_time() - start < 1
    assert str(caught.value).startswith(str(recipe)) and len(str(caught.value)) < 500 + len(str(tmp_path))
    assert not (tmp_path / "CANARY").exists()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(RECIPE.encode() + b"# \xe9\n")
    for path, message in [
        (tmp_path / "latin.yaml", "is not UTF-8"),
        (tmp_path, "cannot be read: .*Is a directory"),
        (Path("x" * 5000), "cannot be read: File name too long"),
        (Path("a\0b"), "cannot be read: .*null"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_recipe(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=" + "[" * 3000, r"--set seed=\[\[.*nested more than 40"),
        ("a." * 3000 + "b=1", "3001 keys deep"),
        ("data.datasets.²=1", "'²' is not an index"),
        ("data.datasets." + "9" * 5000 + "=1", "is not an index of a list of 1"),
        ("x" * 5000 + "=1", "unknown key xxx"),
        ("seed=\udcff", "not valid YAML"),
    ],
)
def test_overrides(override: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(tmp_path / "r.yaml", [override])
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


def test_anchors_and_merges_may_be_used() -> None:
    text = "a: &one {x: 1, y: [1.5, yes]}\nb: {<<: *one, x: 2}\nc: *one\n"
    one: dict[str, Any] = {"x": 1, "y": [1.5, True]}
    assert parse_yaml(text) == {"a": one, "b": {**one, "x": 2}, "c": one}


@given(st.text(alphabet=st.sampled_from("ab:-&*!<[]{}#|>'\"% 0159._e~\n?,@")))
def test_any_text_is_a_value_or_an_error(text: str) -> None:
    try:
        value = parse_yaml(text)
    except ConfigError:
        return
    assert value is None or type(value) in (bool, int, float, str, list, dict)
