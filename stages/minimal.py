"""The method in one flat file: stage 4 of TinyGPT-V in plain torch and DeepSpeed, for reading.

    deepspeed stages/minimal.py

Only the model and the batches come from the package. stages/stage4.py trains the same way, with the same losses, and
adds what a long run needs: resuming, checkpoints, logs, validation, and a check of everything that can go wrong.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.utils.data import DataLoader

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.distributed import complete_env, ranks_from_env
from tinygptv_ds.models.parameters import lora, norms, projections, train_only, weight_decay_groups
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.transfer import model_inputs
from tinygptv_ds.train.untouched import LeaveUntouched
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.trained import save_trained

# ---- weights: three published files, and what stage 3 has trained
MODEL = {
    "phi": "weights/phi-2",
    "eva_vit": "weights/eva_vit_g.pth",
    "qformer": "weights/blip2_pretrained_flant5xxl.pth",
    "init_from": "runs/stage3",
    "image_size": 448,  # pixels; an image becomes 32 tokens in any case
    "lora_r": 64,
    "lora_alpha": 16,
}
FROZEN_DTYPE = torch.bfloat16  # trained weights are fp32
OUT = Path("runs/minimal")

# ---- data: WebDataset shards, mixed by weight
DATASETS = [
    {"name": "gqa", "shards": "data/gqa/*.tar", "weight": 150},
    {"name": "refcoco", "shards": "data/refcoco/*.tar", "weight": 75},
    {"name": "llava_conversation", "shards": "data/llava_conversation/*.tar", "weight": 30},
]
TEXT = {"prompt_template": "[INST] {} [/INST]", "end_sym": "###", "max_txt_len": 1024}
NUM_WORKERS = 6

# ---- optimization: AdamW, a linear warm-up, then a cosine
SEED = 42
STEPS = 50_000
BATCH_SIZE = 8  # samples of one optimizer step over all ranks
MICRO_BATCH_SIZE = 2  # samples of one forward pass on one rank
LR, MIN_LR, WARMUP_LR, WARMUP_STEPS = 1e-5, 1e-6, 1e-6, 1000
WEIGHT_DECAY, BETAS = 0.05, (0.9, 0.999)

DEEPSPEED: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    "gradient_clipping": 0.0,  # left out, DeepSpeed clips at 1.0
    "steps_per_print": 1_000_000_000,
}


def main() -> list[float]:
    """Train and save the result; returns the loss of every step."""
    ranks = ranks_from_env()
    complete_env()  # one rank where no launcher has started this
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().device_name(), ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    accumulation = BATCH_SIZE // (MICRO_BATCH_SIZE * ranks.world_size)

    # The model: frozen ViT, Q-Former and Phi; projections, Phi's norms and LoRA are trained.
    torch.manual_seed(SEED)
    recipe = make_recipe()
    model = build_model(recipe.model, recipe.text, frozen_dtype=FROZEN_DTYPE)
    train_only(model, projections, norms, lora)
    model.train()  # frozen parts stay without dropout

    # The batches: rank r of R gets its share of every step; samples are packed end to end, without padding.
    micro_batches = MicroBatches(
        open_stream(recipe), open_tokens(recipe, model.config), rank=ranks.rank, world_size=ranks.world_size
    )
    places = [(step, number) for step in range(STEPS) for number in range(accumulation)]
    loader: DataLoader[MicroBatch] = DataLoader(
        micro_batches,
        sampler=places,
        batch_size=None,
        num_workers=NUM_WORKERS,
        pin_memory=device.type == "cuda",
    )

    # The engine: ZeRO shards gradients and optimizer states over the ranks.
    groups = weight_decay_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=device.type == "cuda")
    sizes = {"train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE, "gradient_accumulation_steps": accumulation}
    untouched = LeaveUntouched(optimizer, device)  # AdamW passes over the projections in a step without images
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**DEEPSPEED, **sizes})

    losses = []
    batches = iter(loader)
    for step in range(STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        step_batches = [next(batches).batch.to(device) for _ in range(accumulation)]
        # The loss is the mean over the target tokens of the whole step: of all ranks and micro-batches.
        counts = [sum(len(b.targets) for b in step_batches), sum(b.images for b in step_batches)]
        totals = sum_over_ranks(torch.tensor(counts, dtype=torch.float32, device=device))
        untouched.begin_step(totals)
        targets = totals[0]
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in step_batches:
            output = engine(**model_inputs(batch))
            loss = output.token_losses.sum() / targets * ranks.world_size  # DeepSpeed averages over ranks
            # The anchor is zero: it gives every rank a gradient for every weight, whether it has images or not.
            engine.backward(loss + output.anchor, scale_wrt_gas=False)
            engine.step()  # moves the weights after the last micro-batch
            total += output.token_losses.detach().double().sum()
        losses.append(float(sum_over_ranks(total) / targets))
        if ranks.is_main:
            print(f"step {step + 1}/{STEPS} | loss {losses[-1]:.4f} | lr {learning_rate(step):.2e}", flush=True)

    save(model, recipe, is_main=ranks.is_main)
    torch.distributed.destroy_process_group()
    return losses


def make_recipe() -> Recipe:
    """Return the constants above in the form that the package's model and data take."""
    return build_recipe(
        {
            "stage": 4,
            "seed": SEED,
            "model": MODEL,
            "text": TEXT,
            "data": {"datasets": DATASETS, "num_workers": NUM_WORKERS},
            "optimizer": {"lr": LR, "min_lr": MIN_LR},
            "train": {"batch_size": BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE, "steps_per_epoch": STEPS},
        },
        "stages/minimal.py",
    )


def learning_rate(step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < WARMUP_STEPS:
        return WARMUP_LR + (LR - WARMUP_LR) * step / WARMUP_STEPS
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    torch.distributed.all_reduce(value)
    return value


def save(model: TinyGPTVForConditionalGeneration, recipe: Recipe, *, is_main: bool) -> None:
    """Write the trained weights, which chat, eval and export take as they take a stage's."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {name: safe_get_full_fp32_param(p) for name, p in parameters.items()}  # collective: on all ranks
    if is_main:
        save_trained(state, model.config, OUT / "model", provenance_of(recipe))


if __name__ == "__main__":
    main()
