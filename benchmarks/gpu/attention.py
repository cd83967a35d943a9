"""Attention backends compared with SDPA in fp32, and the whole model packed compared with padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.machine import seconds
from benchmarks.gpu.model import build, make_batches, model_config, overrides
from benchmarks.gpu.plan import Case
from benchmarks.gpu.results import add, add_check
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.models.attention import (
    PackedLayout,
    available_backends,
    causal_mask,
    make_layout,
    varlen_attention,
)
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.transfer import model_inputs

HEADS = {"published": (32, 80), "tiny": (2, 8)}  # of Phi: number and width
# Rounding to 8 and 11 bits makes errors below these in sums of this length; a wrong mask or scale makes at least 0.1.
LIMITS = {"bf16": 1e-2, "fp16": 2e-3}
MODEL_LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 8e-3}


def row_lengths(size: str) -> dict[str, list[int]]:
    """Return lengths of packed samples as in the stages: short captions, a few questions, long conversations."""
    random = torch.Generator().manual_seed(0)

    def draw(count: int, low: int, high: int) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=random).tolist()

    if size == "tiny":
        return {"stage 1": draw(6, 4, 12), "stage 4": draw(2, 8, 20), "long": [40, 1, 17]}
    return {"stage 1": draw(64, 40, 80), "stage 4": draw(16, 80, 300), "long": [1500, 1, 700, 333, 1024, 65, 128, 2]}


def compare_backends(device: torch.device, size: str, out: Path) -> None:
    """Measure and check every backend at every shape in both dtypes, forward and backward."""
    for shape, lengths in row_lengths(size).items():
        for precision, limit in LIMITS.items():
            q, k, v, gradient = _random_inputs(sum(lengths), *HEADS[size], DTYPES[precision], device)
            wanted = _results(
                q.float(), k.float(), v.float(), gradient.float(), lambda q, k, v, n=lengths: _one_by_one(q, k, v, n)
            )
            for backend in available_backends(device, DTYPES[precision]):
                layout = _layout(lengths, backend, device)

                def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout = layout) -> Tensor:
                    return varlen_attention(q, k, v, layout)

                found = _results(q, k, v, gradient, attend)
                errors = {name: _relative_error(found[name], wanted[name]) for name in wanted}
                times = _times(q, k, v, gradient, attend, device)
                row = {"shape": shape, "precision": precision, "backend": backend, "errors": errors, **times}
                add(out, "attention", row)
                worst = max(errors.values(), key=lambda error: (error != error, error))
                add_check(out, f"attention, {shape}, {precision}, {backend}: error against SDPA in fp32", worst, limit)


def _random_inputs(tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    random = torch.Generator(device).manual_seed(tokens)
    for _ in range(4):
        yield torch.randn(tokens, heads, width, device=device, generator=random).to(dtype)


def _layout(lengths: list[int], backend: str, device: torch.device) -> PackedLayout:
    boundaries = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return make_layout(boundaries, max(lengths), sum(lengths), backend)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Return SDPA of each sample separately, by plain matrix products, without packing or padding."""
    samples = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    with sdpa_kernel(SDPBackend.MATH):
        rows = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in samples]
    return torch.cat(rows, dim=1).transpose(0, 1)


def _results(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, attend: Callable[..., Tensor]) -> dict[str, Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    gradients = torch.autograd.grad(out, inputs, gradient.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def _times(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, attend: Callable[..., Tensor], device: torch.device
) -> dict[str, float]:
    times = 20 if device.type == "cuda" else 2
    with torch.no_grad():
        forward = seconds(lambda: attend(q, k, v), device, times)
    return {"forward": forward, "both": seconds(lambda: _results(q, k, v, gradient, attend), device, times)}


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error in norm; NaN if anything is not finite."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def compare_packed_with_padded(device: torch.device, out: Path) -> None:
    """Check losses and gradients of the whole tiny model with every backend against padded rows in fp32."""
    recipe = load_recipe(project_root() / "stages/stage4.yaml", overrides(4, "tiny"))
    config = model_config(recipe, "tiny")
    model = build(config, torch.float32, device).eval()
    batch = make_batches(config, Case(4, 2, "fp32", "pixels", 6), 0, pinned=False).loaded[0].batch.to(device)
    wanted = _with_gradients(model, _padded_losses(model, model_inputs(batch)))
    for precision, limit in MODEL_LIMITS.items():
        for backend in available_backends(device, DTYPES[precision]):
            model.attention = backend
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                losses = model(**model_inputs(batch)).token_losses
            found = _with_gradients(model, losses)
            errors = {name: _relative_error(found[name], wanted[name]) for name in wanted}
            add(out, "whole_model", {"precision": precision, "backend": backend, "errors": errors})
            worst = max(errors.values(), key=lambda error: (error != error, error))
            add_check(
                out, f"whole tiny model, {precision}, {backend}: packed, error against padded in fp32", worst, limit
            )


def _with_gradients(model: TinyGPTVForConditionalGeneration, losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    losses.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"losses": losses.detach(), "gradients": torch.cat(gradients).float()}


def _padded_losses(model: TinyGPTVForConditionalGeneration, inputs: dict) -> Tensor:
    """Return the losses of the packed forward pass, computed with every sample in its own padded row."""
    lengths, longest = inputs["cu_seqlens"].diff(), inputs["max_seqlen"]
    ids, rows = inputs["input_ids"], inputs["image_rows"]
    place = make_layout(inputs["cu_seqlens"], longest, len(ids), "sdpa").padded_rows
    assert place is not None  # SDPA pads
    images = model.project(model.encode_vision(inputs["pixel_values"])).flatten(0, 1)
    embeds = model.get_input_embeddings()(ids).index_copy(0, rows, images[inputs["image_index"]])

    def padded(x: Tensor) -> Tensor:
        filled = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, place, x)
        return filled.unflatten(0, (len(lengths), longest))

    mask = causal_mask(torch.arange(longest, device=ids.device) < lengths[:, None], longest)
    hidden = model.language_model.model(padded(embeds), padded(inputs["position_ids"]), mask=mask)
    targets = hidden.flatten(0, 1)[place][inputs["target_rows"]]
    return F.cross_entropy(model.language_model.lm_head(targets).float(), inputs["targets"], reduction="none")
