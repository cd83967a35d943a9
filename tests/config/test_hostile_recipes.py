"""Recipes that are damaged, hostile or senseless: one short message that names key and value, at once, and no code."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.deepspeed import load_deepspeed_json
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
        ("# " + "x" * 400_000, "it has more than 300,000 bytes"),
        ("".join(f"k{i}: 1\n" for i in range(20_000)), "line 7500: more than 15,000 values"),
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
            "train.cycles x train.epochs x train.steps_per_epoch must be at most",
        ),
        (RECIPE.replace("12,", "12, startup_minutes: 1e300,"), "train.startup_minutes must be at most"),
        (RECIPE.replace("q}", "q, lora_r: 4000000000}"), "model.lora_r must be at most 8,192, not 4000000000"),
        (RECIPE.replace("q}", "q, proj_hidden_size: 2400000000000}"), "model.proj_hidden_size must be at most"),
        (RECIPE.replace("12,", "12, epochs: 1000000000000000000,"), "train.epochs .* must be at most 1,000,000,000"),
        (RECIPE.replace("q}", "q, lora_alpha: 0}"), "model.lora_alpha must be positive"),
        (RECIPE.replace("q}", "q, lora_alpha: -1e30}"), "model.lora_alpha must be positive"),
        (RECIPE.replace("0}", "0, warmup_steps: -1}"), "optimizer.warmup_steps must be 0 or more"),
        (RECIPE.replace("phi: p", "phi: ''"), "model.phi must not be empty text"),
        (RECIPE.replace("shards: a", "shards: ''"), r"data.datasets\[0\].shards must not be empty text"),
        (RECIPE.replace("shards: a", 'shards: "a\\0b"'), r"data.datasets\[0\].shards holds a null character: 'a.x00b'"),
        (
            RECIPE.replace("shards: a", "shards: " + "a" * 20_000),
            "must have at most 10,000 characters, not 20,000",
        ),
        (
            RECIPE.replace("q}", f"q, attention: {'a' * 9000}}}"),
            "model.attention: 'aaa.*characters.* is not one of",
        ),
        (RECIPE.replace("q}", f"q, lora_targets: [{'a' * 9000}]}}"), "model.lora_targets: unknown .'aaa.*characters"),
        (RECIPE.replace("12,", f"12, mirror: {'a' * 9000},"), "train.mirror 'aaa.*9,002 characters.* is no URL"),
        (RECIPE.replace("12,", '12, keep_best: "a\\nb",'), r"train.keep_best is 'a.nb', which is not measured"),
        (RECIPE + '"\\e[31mred": 3\n', r"unknown key '.x1b\[31mred'"),
        (RECIPE + "'': 3\n", "unknown key '';"),
        (RECIPE + "text: {prompts: stage33}\n", "text.prompts: 'stage33' is no pool of prompts; did you mean stage3"),
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
    (tmp_path / "utf16.yaml").write_text(RECIPE, encoding="utf-16")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path, message in [
        (tmp_path / "latin.yaml", f"is not UTF-8 .byte {len(RECIPE) + 2}:"),
        (tmp_path / "utf16.yaml", "is not UTF-8 .byte 0:"),
        (tmp_path / "pipe.yaml", "cannot be read: it is a pipe or a device"),
        (Path("/dev/zero"), "cannot be read: it is a pipe or a device"),
        (tmp_path / "loop.yaml", "cannot be read: Too many levels"),
        (tmp_path, "cannot be read: it is a folder"),
        (Path("x" * 5000), "cannot be read: File name too long"),
        (Path("a\0b"), "cannot be read: .*null"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_recipe(path)
        with pytest.raises(ConfigError, match=r"no readable JSON|is not a readable JSON"):
            load_deepspeed_json(path)


@pytest.mark.parametrize("encoded", [RECIPE.encode("utf-8-sig"), RECIPE.replace("\n", "\r\n").encode()])
def test_files_of_other_editors(encoded: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(encoded)
    assert load_recipe(tmp_path / "r.yaml").seed == 7
    (tmp_path / "d.json").write_bytes(encoded[: encoded.index(b"stage")] + b'{"steps_per_print": 5}\r\n')
    assert load_deepspeed_json(tmp_path / "d.json") == {"steps_per_print": 5}


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
