"""Phi-2's three layouts are read as one, and the conversions between them lose nothing."""

import json
from pathlib import Path

import pytest
import torch
from helpers.weight_layouts import HEADS, PHI, phi_state, save_phi
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.layouts.phi2 import (
    fuse_remote,
    fuse_split,
    parse_config,
    phi_config,
    phi_source,
    split_fused,
    to_layout,
    unfuse_remote,
)

heads_and_dims = st.tuples(st.integers(1, 5), st.integers(1, 6))
# A weight [rows, columns], a bias [rows] (no columns), or LoRA's B [rows, rank].
columns = st.one_of(st.none(), st.integers(1, 4))


def counted(rows: int, columns: int | None) -> Tensor:
    """Every entry different, so that any wrong move shows."""
    shape = (rows,) if columns is None else (rows, columns)
    return torch.arange(rows * (columns or 1)).reshape(shape)


@given(heads_and_dims, columns)
def test_split_and_fused_are_inverse(sizes: tuple[int, int], columns: int | None) -> None:
    heads, head_dim = sizes
    fused = counted(3 * heads * head_dim, columns)
    assert torch.equal(fuse_split(*split_fused(fused, heads), heads), fused)
    q, k, v = counted(3 * heads * head_dim, columns).chunk(3)
    assert all(map(torch.equal, split_fused(fuse_split(q, k, v, heads), heads), (q, k, v)))


@given(heads_and_dims, columns)
def test_remote_and_fused_are_inverse(sizes: tuple[int, int], columns: int | None) -> None:
    heads, head_dim = sizes
    wqkv = counted(3 * heads * head_dim, columns)
    assert torch.equal(unfuse_remote(fuse_remote(wqkv, heads), heads), wqkv)
    assert torch.equal(fuse_remote(unfuse_remote(wqkv, heads), heads), wqkv)


@given(heads_and_dims, columns)
def test_remote_and_split_mean_the_same(sizes: tuple[int, int], columns: int | None) -> None:
    """The first remote code stacks q, k and v: fusing it is fusing its thirds."""
    heads, head_dim = sizes
    wqkv = counted(3 * heads * head_dim, columns)
    assert torch.equal(fuse_remote(wqkv, heads), fuse_split(*wqkv.chunk(3), heads))


@given(heads_and_dims, st.integers(1, 4), st.integers(1, 3))
def test_lora_b_splits_as_its_weight(sizes: tuple[int, int], width: int, rank: int) -> None:
    heads, head_dim = sizes
    a, b = counted(rank, width), counted(3 * heads * head_dim, rank)
    whole = split_fused(b @ a, heads)
    assert all(torch.equal(part @ a, product) for part, product in zip(split_fused(b, heads), whole, strict=True))


def test_fused_rows_are_heads_then_qkv() -> None:
    q, k, v = (torch.full((4, 1), float(i)) + torch.arange(4.0)[:, None] / 10 for i in range(3))
    fused = fuse_split(q, k, v, heads=2).squeeze(1).tolist()
    assert fused == pytest.approx([0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 0.2, 0.3, 1.2, 1.3, 2.2, 2.3])


@pytest.mark.parametrize("container", ["one safetensors", "many safetensors", "one bin", "many bin"])
@pytest.mark.parametrize("layout", ["split", "fused", "remote"])
def test_every_layout_and_container(tmp_path: Path, values: dict[str, Tensor], layout: str, container: str) -> None:
    folder = save_phi(tmp_path / "phi", phi_state(values, layout), container)
    source = phi_source(folder, HEADS)
    expected = {f"language_model.{name}" for name in phi_state(values, "fused")}
    assert source.weights.keys() == expected
    for name, stored in source.weights.items():
        assert stored.shape == tuple(values[name].shape)
        assert torch.equal(stored.read(), values[name]), name


def test_back_to_transformers(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """Transformers' own Phi, saved by itself, read, and given back to it."""
    config = PhiConfig(**{k: v for k, v in PHI.items() if k != "partial_rotary_factor"})
    theirs = PhiForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    again = to_layout(phi_source(tmp_path, HEADS).weights, HEADS, "split")
    state = theirs.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name].read(), state[name]) for name in state)


@pytest.mark.parametrize("layout", ["split", "fused", "remote"])
def test_there_and_back(tmp_path: Path, values: dict[str, Tensor], layout: str) -> None:
    """What a layout's file holds comes out again, name for name and bit for bit."""
    state = phi_state(values, layout)
    again = to_layout(phi_source(save_phi(tmp_path / "phi", state), HEADS).weights, HEADS, layout)
    assert again.keys() == state.keys()
    for name, stored in again.items():
        assert stored.shape == tuple(state[name].shape)
        assert torch.equal(stored.read(), state[name]), name


def test_rotary_tables_of_old_files_are_ignored(tmp_path: Path, values: dict[str, Tensor]) -> None:
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    folder = save_phi(tmp_path / "phi", phi_state(values, "split") | table)
    assert phi_source(folder, HEADS).ignored == list(table)


def test_two_layouts_at_once_are_refused(tmp_path: Path, values: dict[str, Tensor]) -> None:
    folder = save_phi(tmp_path / "phi", phi_state(values, "split") | phi_state(values, "fused"))
    with pytest.raises(WeightsError, match=r"several layouts \(fused, split\)"):
        phi_source(folder, HEADS)


def test_no_phi_is_refused(tmp_path: Path) -> None:
    save_file({"model.layers.0.attention.wq": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no attention weights of Phi"):
        phi_source(tmp_path, HEADS)


def test_a_missing_third_is_named(tmp_path: Path, values: dict[str, Tensor]) -> None:
    state = phi_state(values, "split")
    del state["model.layers.1.self_attn.v_proj.weight"]
    folder = save_phi(tmp_path / "phi", state)
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight missing"):
        phi_source(folder, HEADS)


def test_a_missing_shard_is_named(tmp_path: Path, values: dict[str, Tensor]) -> None:
    folder = save_phi(tmp_path / "phi", phi_state(values, "split"), "many safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of the 2 shards .* missing \(model-00002-of-00002\.safetensors\)"):
        phi_source(folder, HEADS)


NEW = {k: v for k, v in PHI.items() if k != "partial_rotary_factor"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
OLD = {
    "vocab_size": 20,
    "n_embd": 12,
    "n_inner": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_head_kv": None,
    "n_positions": 64,
    "rotary_dim": 3,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
}


@pytest.mark.parametrize("raw", [PHI, NEW, OLD], ids=["early 2024", "today", "first remote code"])
def test_config_spellings(tmp_path: Path, raw: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = phi_config(tmp_path)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, name) == PHI[name]
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert (config.layer_norm_eps, config.resid_pdrop, config.max_position_embeddings) == (1e-5, 0.1, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"embd_pdrop": 0.1}, "dropout on embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary embedding of type 'linear'"),
        ({"partial_rotary_factor": None}, "no partial_rotary_factor"),
    ],
)
def test_a_config_of_something_else_is_refused(change: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        parse_config(PHI | change, Path("config.json"))
