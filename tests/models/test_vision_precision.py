"""A frozen 16-bit vision path: a ViT outside autocast, as near to fp32 as inside; the same bits wherever it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import Blip2QFormerConfig

from tinygptv_ds.features.encode import encode
from tinygptv_ds.models.configuration import PHI_2, EvaViTConfig, TinyGPTVConfig
from tinygptv_ds.models.parameters import projections, qformer, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

VIT_NORMS = 2 * 12 + 1  # of a ViT of 12 blocks, with the one after it
QFORMER_NORMS = 1 + 12 * 2 + 6  # before the Q-Former's 12 layers and in them; every second one has cross-attention


class NormsLikeCuda(TorchFunctionMode):
    """Under autocast, run LayerNorms in fp32 with an fp32 output, as on a GPU; counts them and those outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_fp32 = self.in_own_dtype = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            self.in_fp32 += 1
            args, kwargs = tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, (args, kwargs))
        elif func is F.layer_norm:
            self.in_own_dtype += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model() -> TinyGPTVForConditionalGeneration:
    """Deeper than the other tests' models, so that roundings add up; only the projections are trained."""
    torch.manual_seed(0)
    phi = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "resid_pdrop": 0.0}
    phi |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = TinyGPTVConfig(
        vision_config=EvaViTConfig(56, 14, 96, 12, 4, 200),
        qformer_config=Blip2QFormerConfig(
            hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=128, encoder_hidden_size=96
        ),
        text_config=PHI_2 | phi,
        num_query_tokens=32,
    )
    model = TinyGPTVForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)
            elif "norm" not in name.lower() and "ln_" not in name:
                parameter.normal_(std=0.02)
        model.query_tokens.normal_()
    train_only(model, projections)
    return model.train()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (6, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def under_autocast(model: TinyGPTVForConditionalGeneration, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype):
        return model.encode_vision(pixels)


def distances(features: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the largest difference, the root of the mean square one, and 1 - cosine, all of fp32's features."""
    off = features.double() - exact.double()
    cosine = F.cosine_similarity(features.double(), exact.double(), dim=-1)
    return {
        "max": off.abs().max().item(),
        "rms": off.square().mean().sqrt().item(),
        "1 - cosine": (1 - cosine.min()).item(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_no_worse_than_under_autocast(
    model: TinyGPTVForConditionalGeneration, pixels: Tensor, dtype: torch.dtype
) -> None:
    """Both are compared with fp32's features of the same, rounded weights."""
    model.to(dtype)
    with NormsLikeCuda() as now:
        after = under_autocast(model, pixels, dtype)
    model.requires_grad_(True)  # what is trained stays under autocast, as all was once
    with NormsLikeCuda() as once:
        before = under_autocast(model, pixels, dtype)
    assert (now.in_own_dtype, now.in_fp32) == (VIT_NORMS, QFORMER_NORMS)
    assert (once.in_own_dtype, once.in_fp32) == (0, VIT_NORMS + QFORMER_NORMS)
    exact = model.float().encode_vision(pixels).detach()
    found = {"before": distances(before.to(dtype), exact), "after": distances(after, exact)}
    print(dtype, found)
    for name, distance in found["after"].items():
        assert distance < 1.1 * found["before"][name], (name, found)
    assert found["after"]["1 - cosine"] < (2e-3 if dtype == torch.bfloat16 else 5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_same_bits_in_training_features_and_generation(
    model: TinyGPTVForConditionalGeneration, pixels: Tensor, dtype: torch.dtype
) -> None:
    model.to(dtype)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    with NormsLikeCuda():
        training = under_autocast(model, pixels, dtype)
        generation = model.encode_vision(pixels)
        features = encode(model, pixels, name)
    assert training.dtype == generation.dtype == dtype
    assert torch.equal(training, generation)
    assert torch.equal(training, features)


def test_fp32_weights_stay_under_autocast(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    """A model in fp32 that is trained under autocast asks for 16-bit matrix products, its vision path included."""
    with NormsLikeCuda() as norms:
        under_autocast(model, pixels, torch.bfloat16)
    assert (norms.in_own_dtype, norms.in_fp32) == (0, VIT_NORMS + QFORMER_NORMS)


def test_a_frozen_vit_before_a_trained_q_former(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    """Each has its own rule: the ViT's 16-bit weights, and the Q-Former's fp32 ones under autocast."""
    train_only(model, projections, qformer)
    for part in (model.visual_encoder, model.ln_vision):
        part.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), NormsLikeCuda() as norms:
        model.encode_vision(pixels).float().sum().backward()
    assert (norms.in_own_dtype, norms.in_fp32) == (VIT_NORMS, QFORMER_NORMS)
    assert model.query_tokens.grad is not None and model.query_tokens.grad.dtype == torch.float32
