"""The original's training step as a baseline: the same random weights and samples, in the way its code computes.

Right padding to the longest sample, attention as plain matrix products with an additive mask, logits of all rows in
fp32, everything under fp16 autocast with a gradient scaler, normalised fp32 pixels copied from memory that is not
pinned, AdamW tensor by tensor, and the loss read on the host after every step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.machine import this_device, wait
from benchmarks.gpu.model import build, make_batches, model_config, overrides
from benchmarks.gpu.plan import SIZES, Case
from benchmarks.gpu.results import MEASURED, OUT_OF_MEMORY, add, add_check
from tinygptv_ds.cli import run_command
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.data.loader.batch import Batch
from tinygptv_ds.models import phi
from tinygptv_ds.models.attention import causal_mask, make_layout
from tinygptv_ds.models.parameters import weight_decay_groups
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.metrics.reporter import memory_gib
from tinygptv_ds.train.transfer import model_inputs

WARM_UP = 3
# The mean losses of both procedures without dropout differ by rounding to 11 and to 8 bits.
SAME_LOSS = 2e-2


@dataclass(frozen=True)
class PaddedBatch:
    """A batch in padded rows, on the host.

    Attributes:
        ids: int64 `[B, L]`.
        positions: int64 `[B, L]`.
        labels: int64 `[B, L]`, of the tokens at these places; -100 without a loss.
        mask: `[B, L]`, 1 for real tokens.
        pixels: fp32 `[N, 3, S, S]`, normalised.
        image_rows: int64 `[R]`, places of image rows among `B * L`.
        image_index: int64 `[R]`, which rows of the images go there.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    pixels: Tensor
    image_rows: Tensor
    image_index: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        """Copy to a device; the host waits for each tensor."""
        return PaddedBatch(**{name: value.to(device) for name, value in vars(self).items()})


def padded(batch: Batch, normalize: Callable[[Tensor], Tensor]) -> PaddedBatch:
    """Return a packed batch in padded rows."""
    lengths, longest = batch.cu_seqlens.diff(), int(batch.max_seqlen)
    place = make_layout(batch.cu_seqlens, longest, len(batch.input_ids), "sdpa").padded_rows
    assert place is not None and batch.image_rows is not None and batch.pixel_values is not None
    count = len(batch.pixel_values) * len(batch.image_rows) // max(len(batch.pixel_values), 1)
    index = torch.arange(count) if batch.image_index is None else batch.image_index
    labels = torch.full((len(batch.input_ids),), IGNORE)
    labels[batch.target_rows + 1] = batch.targets

    def rows(values: Tensor, filling: int) -> Tensor:
        filled = torch.full((len(lengths) * longest,), filling, dtype=values.dtype).index_copy(0, place, values)
        return filled.view(len(lengths), longest)

    return PaddedBatch(
        rows(batch.input_ids, 0),
        rows(batch.position_ids, 0),
        rows(labels, IGNORE),
        (torch.arange(longest) < lengths[:, None]).long(),
        normalize(batch.pixel_values),
        place[batch.image_rows],
        index,
    )


def eager_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _implementation: str
) -> tuple[Tensor, None]:
    """Attend by plain matrix products, with an additive mask and a softmax in fp32; see `padded_attention`."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
    return (scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2), None


@contextmanager
def as_the_original(model: TinyGPTVForConditionalGeneration) -> Iterator[None]:
    """Have the model attend eagerly, and draw dropout from torch's generator."""
    for block in model.visual_encoder.blocks:
        vars(block.get_submodule("attn"))["fused_attn"] = False
    model.qformer.config._attn_implementation = "eager"
    undecided = patch.object(model.language_model.model, "_dropout", lambda *_: None)
    with patch.object(phi, "padded_attention", eager_attention), undecided:
        yield


def mean_loss(model: TinyGPTVForConditionalGeneration, batch: PaddedBatch) -> Tensor:
    """Return the mean loss of a batch on the device, a scalar with a graph."""
    with torch.no_grad():
        pixels = batch.pixels.to(model.visual_encoder.patch_embed.proj.weight.dtype)
        patches = model.ln_vision(model.visual_encoder.forward_features(pixels))
        queries = model.query_tokens.expand(len(patches), -1, -1)
        features = model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
    images = model.llama_proj2(model.llama_proj(features)).flatten(0, 1)
    embeds = model.get_input_embeddings()(batch.ids)
    flat = embeds.flatten(0, 1).index_copy(0, batch.image_rows, images[batch.image_index].to(embeds.dtype))
    mask = causal_mask(batch.mask, batch.ids.shape[1])
    hidden = model.language_model.model(flat.view_as(embeds), batch.positions, mask=mask)
    logits = model.language_model.lm_head(hidden).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE)


class OriginalTraining:
    """The original's loop over batches."""

    def __init__(self, model: TinyGPTVForConditionalGeneration, device: torch.device) -> None:
        self._model, self._device = model, device
        self._scaler = torch.amp.GradScaler(device.type)
        self._adamw = torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=1e-5, foreach=False)

    def step(self, batch: PaddedBatch) -> float:
        """Train on a batch; the host waits for its loss."""
        moved = batch.to(self._device)
        with torch.autocast(self._device.type, torch.float16):
            loss = mean_loss(self._model, moved)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._adamw)
        self._scaler.update()
        self._adamw.zero_grad()
        return loss.item()


def compare_losses(model: TinyGPTVForConditionalGeneration, batch: Batch, name: str, out: Path) -> None:
    """Check the original's mean loss, without dropout, against that of our packed rows on the same weights."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.float16):
        ours = float(model(**model_inputs(batch.to(device))).token_losses.mean())
        with as_the_original(model):
            theirs = float(mean_loss(model, padded(batch, model.normalize).to(device)))
    model.train()
    add_check(out, f"{name}: difference of the loss from ours", abs(theirs - ours) / abs(ours), SAME_LOSS)


def measure(case: Case, size: str, steps: int, out: Path) -> dict[str, object]:
    """Return the figures of the original's procedure in a case."""
    device = this_device()
    recipe = load_recipe(project_root() / f"stages/stage{case.stage}.yaml", overrides(case.stage, size))
    model = build(model_config(recipe, size), torch.float16, device)
    batches = make_batches(model.config, case, 0, pinned=False)
    compare_losses(model, batches.loaded[0].batch, str(case), out)
    model.train()
    on_host = [padded(each.batch, model.normalize) for each in batches.loaded]
    losses = []
    with as_the_original(model):
        training = OriginalTraining(model, device)
        for number in range(WARM_UP):
            losses.append(training.step(on_host[number % len(on_host)]))
        wait(device)
        began = time.perf_counter()
        for number in range(WARM_UP, WARM_UP + steps):
            losses.append(training.step(on_host[number % len(on_host)]))
        wait(device)
        seconds = (time.perf_counter() - began) / steps
    rates = {
        "samples_s": case.batch / seconds,
        "target_tokens_s": case.batch * batches.mean.targets / seconds,
        "step_seconds": seconds,
    }
    return {
        "case": asdict(case),
        "status": MEASURED,
        "losses": losses,
        "rates": rates,
        "memory_gib": {"allocated": memory_gib(device)},
    }


def main() -> None:
    """Measure the original's procedure in one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", required=True, help="a list of one case, as JSON")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, help="not used")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (case,) = (Case(**each) for each in json.loads(args.cases))
    try:
        add(args.out, "steps", measure(case, args.size, args.steps, args.out))
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0]
        add(args.out, "steps", {"case": asdict(case), "status": OUT_OF_MEMORY, "why": reason})
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
