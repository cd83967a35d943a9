"""`convert` writes every input in the layout that is wanted, and what it writes is what it read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from helpers.weight_layouts import HEADS, PHI, blip2_state, eva_state, phi_state, save_phi
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.models.eva_vit import interpolate_pos_embed
from tinygptv_ds.weights import convert as verb
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.io import in_memory
from tinygptv_ds.weights.layouts.phi2 import phi_source
from tinygptv_ds.weights.layouts.tinygptv import BUFFER, original_name
from tinygptv_ds.weights.safetensors_writer import write_weights

LAYOUTS = ["split", "fused", "remote"]


def convert(source: Path, out: Path, *options: str) -> Path:
    call(verb, source, "--out", out, *options)
    return out


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("wanted", ["split", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_phi(tmp_path: Path, values: dict[str, Tensor], layout: str, wanted: str) -> None:
    source = save_phi(tmp_path / "phi", phi_state(values, layout), "many bin")
    out = convert(source, tmp_path / "out", "--layout", wanted)
    assert_same(load_file(out / "model.safetensors"), phi_state(values, wanted))
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["qk_layernorm"], config["dtype"]) == (2, False, "float32")
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 9
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_phi_of_the_first_remote_code_in_transformers(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """A layout that transformers cannot read any more computes there again."""
    source = save_phi(tmp_path / "phi", phi_state(values, "remote"))
    old = {"n_embd": 12, "n_inner": 16, "n_layer": 2, "n_head": HEADS, "vocab_size": 20, "rotary_dim": 3 * 2 // 2}
    (source / "config.json").write_text(
        json.dumps({**old, "layer_norm_epsilon": 1e-5, "architectures": ["PhiForCausalLM"]})
    )
    converted = convert(source, tmp_path / "out", "--layout", "split")
    model, report = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in phi_state(values, "split").items())


def test_phi_from_one_file(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """Its config.json is looked for next to it."""
    source = save_phi(tmp_path / "phi", phi_state(values, "split")) / "model.safetensors"
    assert_same(load_file(convert(source, tmp_path / "out") / "model.safetensors"), phi_state(values, "fused"))
    (tmp_path / "phi/config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json: .*belongs to the weights next to it"):
        convert(source, tmp_path / "again")


@pytest.mark.parametrize(
    ("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtypes(tmp_path: Path, values: dict[str, Tensor], option: str, dtype: torch.dtype) -> None:
    state = phi_state(values, "fused")
    out = convert(save_phi(tmp_path / "phi", state), tmp_path / "out", "--dtype", option)
    assert_same(load_file(out / "model.safetensors"), {name: tensor.to(dtype) for name, tensor in state.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_shards(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """Above the shard size there are several files and an index, which are read as one."""
    state = phi_state(values, "fused")
    out = save_phi(tmp_path / "out", {})
    (out / "model.safetensors").unlink()
    write_weights(out, {name: in_memory(tensor) for name, tensor in state.items()}, shard_bytes=2000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    again = {n.removeprefix("language_model."): s.read() for n, s in phi_source(out, HEADS).weights.items()}
    assert_same(again, state)


def test_eva_vit(tmp_path: Path, values: dict[str, Tensor]) -> None:
    state = eva_state(values)
    torch.save(state, tmp_path / "eva_vit_g.pth")
    used = {n: t for n, t in state.items() if not n.startswith(("norm.", "head."))}
    assert_same(load_file(convert(tmp_path / "eva_vit_g.pth", tmp_path / "same")), used)
    larger = load_file(convert(tmp_path / "eva_vit_g.pth", tmp_path / "larger", "--image-size", "56"))
    assert torch.equal(larger.pop("pos_embed"), interpolate_pos_embed(used.pop("pos_embed"), 16))
    assert_same(larger, used)
    with pytest.raises(WeightsError, match="patches of 14 pixels do not tile an image of 30"):
        convert(tmp_path / "eva_vit_g.pth", tmp_path / "x", "--image-size", "30")


def test_blip2(base: Callable[..., ModelSection], tmp_path: Path, values: dict[str, Tensor]) -> None:
    torch.save({"model": blip2_state(values)}, tmp_path / "blip2.pth")
    out = convert(tmp_path / "blip2.pth", tmp_path / "qformer.safetensors")
    parts = {n: t for n, t in values.items() if n.startswith(("qformer.", "ln_vision.", "query_tokens"))}
    assert_same(load_file(out), parts)
    section = base(qformer_file=out)
    built = dict(build_model(section, TextSection(), frozen_dtype=torch.float32).named_parameters())
    assert all(torch.equal(built[name], tensor) for name, tensor in parts.items())


def test_trained_weights_there_and_back(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    """Every dtype stays as it is: norms of the first release may be fp16."""
    trained = {name: tensor.half() if "layernorm" in name else tensor for name, tensor in trained.items()}
    state = {original_name(n, lora=True): t for n, t in trained.items()} | {BUFFER: torch.arange(512)[None]}
    torch.save({"model": state}, tmp_path / "x.pth")
    assert_same(load_file(convert(tmp_path / "x.pth", tmp_path / "x.safetensors")), trained)


def test_runs_and_projections(run: Path, tmp_path: Path, trained: dict[str, Tensor]) -> None:
    assert_same(load_file(convert(run, tmp_path / "run.safetensors")), trained)
    first = {name: tensor for name, tensor in trained.items() if name.startswith("llama_proj.")}
    torch.save({"model": first, "optimizer": {}, "epoch": 0}, tmp_path / "vicuna.pth")
    assert_same(load_file(convert(tmp_path / "vicuna.pth", tmp_path / "first.safetensors")), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--layout", "split"], "--layout is for Phi"), (["--image-size", "28"], "--image-size is for an EVA ViT")],
)
def test_an_option_without_effect_is_refused(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(run, tmp_path / "out", *options)


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(WeightsError, match="already exists"):
        convert(run, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, values: dict, run: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException
) -> None:
    source = save_phi(tmp_path / "phi", phi_state(values, "split")) if kind == "folder" else run
    before = sorted(path.name for path in tmp_path.iterdir())
    reads = iter(range(3))

    def failing(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if next(reads, None) is None:
            raise error
        return tensor

    monkeypatch.setattr("tinygptv_ds.weights.safetensors_writer.convert_tensor", failing)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_half_a_file_is_refused(tmp_path: Path, values: dict[str, Tensor]) -> None:
    state = phi_state(values, "split")
    state.pop("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(WeightsError, match=r"k_proj\.weight missing next to"):
        convert(save_phi(tmp_path / "phi", state), tmp_path / "out")
    state = blip2_state(values)
    state.pop("Qformer.bert.encoder.layer.2.output_query.dense.bias")
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "blip2.safetensors")
    with pytest.raises(WeightsError, match=r"missing: qformer\.encoder\.layer\.2\.output_query\.dense\.bias.* inspect"):
        convert(tmp_path / "blip2.safetensors", tmp_path / "out")


def test_sizes_are_those_of_the_configuration(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """Heads order the rows: a config.json of another Phi would scramble them."""
    folder = save_phi(tmp_path / "phi", phi_state(values, "split"))
    changes = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 3, "vocab_size": 21}
    for name, wrong in changes.items():
        (folder / "config.json").write_text(json.dumps(PHI | {name: wrong}))
        with pytest.raises(
            WeightsError, match=rf"config\.json: {name} is {wrong}, but the weights next to it .* {PHI[name]}"
        ):
            convert(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(PHI | {"num_attention_heads": 5}))
    with pytest.raises(WeightsError, match=r"config\.json: a width of 12 does not divide into 5 heads"):
        convert(folder, tmp_path / "out")
