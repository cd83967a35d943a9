"""Short trainings next to frozen weights that are stored in fewer than 16 bit, in this process."""

from typing import Any

import torch

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.models.frozen_linear import quantized_buffers
from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.transfer import model_inputs
from tinygptv_ds.weights.assemble import build_model


def built(raw: dict[str, Any]) -> TinyGPTVForConditionalGeneration:
    """Build the model of a recipe; it trains projections, norms and LoRA."""
    recipe = build_recipe(raw, "r")
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.text, frozen_dtype=torch.float32)
    train_only(model, projections, norms, lora)
    return model.train()


def trained(raw: dict[str, Any], steps: int = 10) -> tuple[list[float], TinyGPTVForConditionalGeneration]:
    """Train for some steps by plain torch, twice on each batch; return the losses and the model."""
    recipe, model = build_recipe(raw, "r"), built(raw)
    batches = MicroBatches(open_stream(recipe), open_tokens(recipe, model.config), rank=0, world_size=1)
    adamw = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(**model_inputs(batches[step % (steps // 2), 0].batch)).token_losses.mean()
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


def check_frozen_weights_stay(model: TinyGPTVForConditionalGeneration, fresh: TinyGPTVForConditionalGeneration) -> None:
    """Compare what is frozen in a trained model, quantized or not, with a model that was just built."""
    before, after = (quantized_buffers(m) for m in (fresh, model))
    assert len(before) > 0 and all(torch.equal(value, after[name]) for name, value in before.items())
    frozen = {name: p for name, p in fresh.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in frozen.items())
