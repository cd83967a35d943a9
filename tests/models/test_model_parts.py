"""What a stage trains, its weight decay, and the rules of LoRA and the norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PhiConfig

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.configuration import EvaViTConfig, TinyGPTVConfig
from tinygptv_ds.models.eva_vit import build_eva_vit, interpolate_pos_embed
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.parameters import lora, norms, projections, train_only, weight_decay_groups
from tinygptv_ds.models.phi import RMSNorm, rotary_tables, rotate
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration


def full_size(lora_r: int) -> TinyGPTVForConditionalGeneration:
    with torch.device("meta"):
        return TinyGPTVForConditionalGeneration(TinyGPTVConfig(lora_r=lora_r))


def test_stage_1_trains_projections_and_norm_weights() -> None:
    trained = train_only(full_size(0), projections, norms)
    assert trained[:4] == ["llama_proj.weight", "llama_proj.bias", "llama_proj2.weight", "llama_proj2.bias"]
    prefix = "language_model.model.layers.31."
    kinds = ("self_attn.q_layernorm", "self_attn.k_layernorm", "input_layernorm", "post_layernorm")
    assert trained[4:][-5:] == [
        *(f"{prefix}{kind}.weight" for kind in kinds),
        "language_model.model.final_layernorm.weight",
    ]
    assert len(trained) == 4 + 32 * 4 + 1


def test_training_lora_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains lora, of which the model has none"):
        train_only(full_size(0), projections, norms, lora)


def test_freezing_is_complete() -> None:
    model = full_size(64)
    train_only(model, projections, norms, lora)
    train_only(model, projections)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if projections(n)
    }


def test_no_decay_for_vectors_and_named_ones() -> None:
    model = nn.Module()
    model.matrix = nn.Parameter(torch.zeros(2, 2))
    model.vector = nn.Parameter(torch.zeros(2))
    model.ln_matrix = nn.Parameter(torch.zeros(2, 2))
    model.bias_matrix = nn.Parameter(torch.zeros(2, 2))
    model.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    decayed, plain = weight_decay_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model.matrix)]
    assert [id(p) for p in plain["params"]] == [id(model.vector), id(model.ln_matrix), id(model.bias_matrix)]


def test_lora_starts_as_its_base_and_drops_out_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = LoRALinear(6, 4, lora_r=2, lora_alpha=8, lora_dropout=0.9), torch.randn(5, 6)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    nn.init.ones_(layer.lora_B.weight)
    layer.eval()
    update = 8 / 2 * (x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + update)
    assert not torch.equal(layer.train()(x), layer.eval()(x))


def test_rms_norm() -> None:
    norm, x = RMSNorm(8), torch.randn(3, 8)
    nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_depends_on_distance_alone() -> None:
    """Scores of rotated queries and keys do not change when both are shifted; the rest of a head is not rotated."""
    rope = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}
    config = PhiConfig(hidden_size=16, num_attention_heads=2, rope_parameters=rope)
    q, k = torch.randn(2, 1, 2, 8)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [
            rotate(x, *rotary_tables(torch.tensor([at]), config, torch.float32)) for x, at in ((q, at_q), (k, at_k))
        ]
        assert torch.equal(turned[0][..., 4:], q[..., 4:])
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(7, 4), score(103, 100), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(7, 4), score(7, 6))


def test_rotary_tables_are_rounded_as_the_original_s() -> None:
    """The original loads Phi in fp16 and therefore builds its tables in fp16; `rotary_dtype` selects this."""
    config = TinyGPTVConfig()
    assert config.rotary_dtype == "float16"
    positions = torch.arange(50)
    exact = rotary_tables(positions, config.text_config, torch.float32)
    rounded = rotary_tables(positions, config.text_config, torch.float16)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float(), b)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("width", [1408, 32, 40, 7 * 16])
def test_the_mlp_has_the_width_that_was_asked_for(width: int) -> None:
    """timm takes a ratio and rounds the product down."""
    hidden = int(width * 4.3637)
    with torch.device("meta"):
        vit = build_eva_vit(EvaViTConfig(28, 14, width, 1, 4, hidden))
    assert vit.blocks[0].mlp.fc1.out_features == hidden


def test_positions_of_the_right_size_are_left_alone() -> None:
    positions = torch.randn(1, 1 + 9, 4)
    assert interpolate_pos_embed(positions, 9) is positions
    larger = interpolate_pos_embed(positions.half(), 16)
    assert (larger.shape, larger.dtype) == ((1, 17, 4), torch.float16)
