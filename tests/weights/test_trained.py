"""What a stage trained goes to disk and into the next stage whole, and nothing half-fitting is taken."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.weight_layouts import load_into, tiny_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import lora
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.layouts.tinygptv import canonical_name, original_name
from tinygptv_ds.weights.trained import PARTS, save_trained

NORM = "language_model.model.layers.1.input_layernorm.weight"


@pytest.fixture
def fresh() -> Callable[..., TinyGPTVForConditionalGeneration]:
    def make(**changes: object) -> TinyGPTVForConditionalGeneration:
        config = tiny_config(changes.pop("lora_r", 3))
        for name, value in changes.items():
            setattr(config, name, value)
        return TinyGPTVForConditionalGeneration(config)

    return make


@pytest.fixture
def run(tmp_path: Path, trained: dict[str, Tensor]) -> Path:
    save_trained(trained, tiny_config(), tmp_path / "run/model", {"stage": 3})
    return tmp_path / "run"


def assert_loaded(model: TinyGPTVForConditionalGeneration, trained: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("path", ["", "model", "model/trained.safetensors"])
def test_there_and_back(run: Path, trained: dict[str, Tensor], fresh: Callable, path: str) -> None:
    model = fresh()
    assert load_into(model, run / path) == set(trained)
    assert_loaded(model, trained)


def test_what_is_written(run: Path, trained: dict[str, Tensor]) -> None:
    assert sorted(p.name for p in run.iterdir()) == ["model"]
    assert sorted(p.name for p in (run / "model").iterdir()) == [
        "config.json",
        "provenance.json",
        "trained.safetensors",
    ]
    stored = load_file(run / "model/trained.safetensors")
    assert stored.keys() == trained.keys()
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert TinyGPTVConfig.from_pretrained(run / "model").lora_r == 3
    notes = json.loads((run / "model/provenance.json").read_text())
    assert notes["stage"] == 3
    assert len(notes["sha256"]["trained.safetensors"]) == 64


def test_low_precision_is_stored_in_fp32(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    save_trained({n: t.bfloat16() for n, t in trained.items()}, tiny_config(), tmp_path / "model", {})
    assert {t.dtype for t in load_file(tmp_path / "model/trained.safetensors").values()} == {torch.float32}


def test_a_failed_write_leaves_the_old_one(run: Path, trained: dict[str, Tensor], fresh: Callable) -> None:
    class Failing(TinyGPTVConfig):
        def to_json_string(self, *_: object, **__: object) -> str:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_trained({n: t + 1 for n, t in trained.items()}, Failing(), run / "model", {})
    model = fresh()
    load_into(model, run)
    assert_loaded(model, trained)
    save_trained({n: t + 1 for n, t in trained.items()}, tiny_config(), run / "model", {})
    load_into(model, run)
    assert_loaded(model, {n: t + 1 for n, t in trained.items()})
    assert sorted(p.name for p in run.iterdir()) == ["model"]


def test_stage_1_to_2(
    base: Callable[..., ModelSection], tmp_path: Path, trained: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Without LoRA in the file the model gets LoRA of its own without effect, and logs it."""
    without = {name: tensor for name, tensor in trained.items() if not lora(name)}
    save_trained(without, tiny_config(lora_r=0), tmp_path / "run/model", {"stage": 1})
    section = base(lora_r=3, init_from=str(tmp_path / "run"), allow_missing=["lora"])
    with caplog.at_level(logging.INFO, logger="tinygptv_ds"):
        model = build_model(section, TextSection(), frozen_dtype=torch.float32)
    assert_loaded(model, without)
    assert all(not p.any() for name, p in model.named_parameters() if ".lora_B." in name)
    assert "run has no lora, which starts from initial values" in caplog.text
    assert f"run: {len(without)} tensors loaded" in caplog.text
    assert "initialized: 8 tensors of LoRA, 4 tensors of added norms" in caplog.text  # their biases, never trained


def test_v0_q_former(base: Callable[..., ModelSection], tmp_path: Path, values: dict, trained: dict) -> None:
    """The first released stage 4 had trained the Q-Former too: its values replace BLIP-2's."""
    qformer = {n: t + 1 for n, t in values.items() if n.startswith(("qformer.", "query_tokens"))}
    state = {original_name(n, lora=True): t for n, t in (trained | qformer).items()}
    torch.save({"model": state, "optimizer": {}, "epoch": 1}, tmp_path / "stage4.pth")
    section = base(lora_r=3, init_from=str(tmp_path / "stage4.pth"))
    model = build_model(section, TextSection(), frozen_dtype=torch.float32)
    assert_loaded(model, trained | qformer)
    assert model.frozen_updates.keys() == qformer.keys()
    assert all(torch.equal(model.frozen_updates[name], tensor) for name, tensor in qformer.items())


SPELLINGS = {
    "peft 0.2": lambda name: original_name(name, lora=True),
    "peft 0.3": lambda name: original_name(name, lora=True).replace("_A.", "_A.default.").replace("_B.", "_B.default."),
    "other adapter": lambda name: original_name(name, lora=True).replace("_A.", "_A.mine.").replace("_B.", "_B.mine."),
    "without wrapper": lambda name: original_name(name, lora=False),
    "wrapped for several devices": lambda name: "module." + original_name(name, lora=True),
    "compiled": lambda name: "_orig_mod." + original_name(name, lora=True),
    "norms as modules to save": lambda name: re.sub(
        r"(_layernorm)\.", r"\1.modules_to_save.default.", original_name(name, lora=True)
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_original(tmp_path: Path, trained: dict, fresh: Callable, spelling: str) -> None:
    state = {SPELLINGS[spelling](name): tensor for name, tensor in trained.items()}
    assert state.keys() != trained.keys()
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(
        {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}, tmp_path / "checkpoint_3.pth"
    )
    model = fresh()
    assert load_into(model, tmp_path / "checkpoint_3.pth") == set(trained)
    assert_loaded(model, trained)


def test_as_the_installed_peft_names_them(tmp_path: Path, values: dict, trained: dict, fresh: Callable) -> None:
    """Phi wrapped by peft itself, under the original's attribute `llama_model`; only what it trains is saved."""
    phi = fresh(lora_r=0).language_model
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query_key_value", "dense"])
    wrapped = get_peft_model(phi, config)  # not a transformers model: peft takes any module
    names = {f"llama_model.{name}" for name, _ in wrapped.named_parameters()}
    canonical = {canonical_name(name): name for name in names}
    assert canonical.keys() == {name for name in values if name.startswith("language_model.")}
    state = {canonical.get(name, name): tensor for name, tensor in trained.items()}
    assert any(".lora_A.default.weight" in name for name in state)
    torch.save({"model": state}, tmp_path / "x.pth")
    model = fresh()
    assert load_into(model, tmp_path / "x.pth") == set(trained)
    assert_loaded(model, trained)


def test_base_layer_spelling(tmp_path: Path, values: dict, trained: dict, fresh: Callable) -> None:
    """Newer peft renames the adapted weight; a file that holds it too is understood."""
    name = "language_model.model.layers.0.self_attn.dense.weight"
    state = {original_name(n, lora=True): t for n, t in trained.items()}
    state[original_name(name, lora=True).replace("dense.weight", "dense.base_layer.weight")] = values[name]
    torch.save({"model": state}, tmp_path / "x.pth")
    model = fresh()
    assert name in load_into(model, tmp_path / "x.pth")
    assert_loaded(model, trained | {name: values[name]})


def test_minigpt4_projection(tmp_path: Path, trained: dict, fresh: Callable, caplog: pytest.LogCaptureFixture) -> None:
    first = {name: tensor for name, tensor in trained.items() if name.startswith("llama_proj.")}
    torch.save({"model": first}, tmp_path / "vicuna.pth")
    model = fresh()
    with caplog.at_level(logging.INFO, logger="tinygptv_ds"):
        assert load_into(model, tmp_path / "vicuna.pth", ["llama_proj2", "norms", "lora"]) == set(first)
    assert_loaded(model, first)
    assert "vicuna.pth has no norms, which starts from initial values" in caplog.text


def save(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (lambda s: s.pop(NORM), {}, f"missing: {NORM}"),
        (lambda s: s.pop("llama_proj2.bias"), {}, r"missing: llama_proj2\.bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), {}, "unexpected: surprise"),
        (lambda s: s.update({NORM: torch.zeros(7)}), {}, rf"wrong shape: {NORM} is \[7\] instead of \[12\]"),
        (lambda s: None, {"lora_r": 0}, r"holds LoRA of rank 3, the model has none .* set model\.lora_r=3"),
        (lambda s: None, {"lora_r": 4}, r"holds LoRA of rank 3, the model's is 4; set model\.lora_r=3"),
        (lambda s: [s.pop(n) for n in list(s) if ".dense.lora_" in n], {}, r"missing: .*dense\.lora_A.*lora_targets"),
        (lambda s: s.pop(next(n for n in s if ".lora_B." in n)), {}, "missing: .*lora_B"),
    ],
    ids=["norm", "projection", "unknown", "shape", "no LoRA here", "another rank", "other targets", "half of LoRA"],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, trained: dict, fresh: Callable, change: Callable, model: dict, message: str
) -> None:
    state = dict(trained)
    change(state)
    target = fresh(**model)
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    with pytest.raises(WeightsError, match=message):
        load_into(target, save(tmp_path, state))
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("lora", r"holds no LoRA: it is of stage 1, .* --set 'model\.allow_missing=\[lora\]'"),
        ("norms", r"holds no trained norms, without which Phi answers 'the the the'"),
        ("llama_proj2", "holds no second projection"),
    ],
)
def test_weights_of_the_wrong_stage(tmp_path: Path, trained: dict, fresh: Callable, part: str, named: str) -> None:
    """A part that is not there at all is an error, unless the recipe lets it start from initial values."""
    state = {name: tensor for name, tensor in trained.items() if not PARTS[part](name)}
    model = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(WeightsError, match=named):
        load_into(model, save(tmp_path, state))
    assert load_into(model, save(tmp_path, state), [part]) == set(state)
    assert_loaded(model, state | {name: before[name] for name in trained if PARTS[part](name)})


ATTENTION = "llama_model.base_model.model.model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: s.update({ATTENTION + "q_proj.lora_A.default.weight": torch.zeros(3, 12)}), "on split q/k/v"),
        (
            lambda s: s.update({ATTENTION + "dense.lora_magnitude_vector.default.weight": torch.zeros(12)}),
            "The LoRA is DoRA",
        ),
        (lambda s: s.update({"llama_proj.weight": torch.zeros(5120, 6)}), "projection of MiniGPT-4's 13B model"),
        (lambda s: s.update({"llama_proj.weight": torch.zeros(7, 6)}), r"point model\.\* at the same ones"),
    ],
    ids=["split", "DoRA", "13B", "another model"],
)
def test_likely_causes(tmp_path: Path, trained: dict, fresh: Callable, change: Callable, cause: str) -> None:
    state = dict(trained)
    change(state)
    with pytest.raises(WeightsError, match=cause):
        load_into(fresh(), save(tmp_path, state))


def test_lora_alone_is_not_enough(tmp_path: Path, trained: dict, fresh: Callable) -> None:
    """As peft's own save_pretrained writes it."""
    state = {n.replace("language_model.", "base_model.model."): t for n, t in trained.items() if lora(n)}
    with pytest.raises(WeightsError, match="holds no first projection, so it is not a complete file of TinyGPT-V"):
        load_into(fresh(), save(tmp_path, state))


def test_another_alpha_is_refused(run: Path, fresh: Callable) -> None:
    with pytest.raises(WeightsError, match=r"lora_alpha 6, the model has 16; set model\.lora_alpha=6"):
        load_into(fresh(lora_alpha=16), run)


def test_an_unfinished_run_is_refused(tmp_path: Path, fresh: Callable) -> None:
    with pytest.raises(WeightsError, match="no weights there"):
        load_into(fresh(), tmp_path)
    (tmp_path / "recipe.yaml").write_text("stage: 1\n")
    with pytest.raises(WeightsError, match="has not finished and has no checkpoint yet"):
        load_into(fresh(), tmp_path)
    for step in ("step-00000010", "step-00000020", "step-00000030.partial"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"name its checkpoint .*step-00000020$"):
        load_into(fresh(), tmp_path)
    with pytest.raises(WeightsError, match="no such file or folder"):
        load_into(fresh(), tmp_path / "nowhere")


def test_a_damaged_recipe_of_the_run_is_named(tmp_path: Path, trained: dict, fresh: Callable) -> None:
    """The recipe names what else belongs to the model."""
    folder = tmp_path / "checkpoints/step-00000001"
    folder.mkdir(parents=True)
    save_file({f"weight/{name}": tensor for name, tensor in trained.items()}, folder / "state.safetensors")
    (folder / "state.json").write_text("{}")
    assert load_into(fresh(), folder) == set(trained)
    (tmp_path / "recipe.yaml").write_text("model: {phi: [")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: not valid YAML"):
        load_into(fresh(), folder)


def test_a_chain_of_stages(base: Callable[..., ModelSection], tmp_path: Path, trained: dict) -> None:
    """Stage 2's weights, loaded and saved again, are the same bytes' worth of values."""
    save_trained(trained, tiny_config(), tmp_path / "a/model", {})
    section = base(lora_r=3, lora_alpha=6.0)
    model = build_model(
        dataclasses.replace(section, init_from=str(tmp_path / "a")), TextSection(), frozen_dtype=torch.bfloat16
    )
    parameters = dict(model.named_parameters())
    save_trained({name: parameters[name] for name in trained}, model.config, tmp_path / "b/model", {})
    again = load_file(tmp_path / "b/model/trained.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())
