"""The count of operations, against torch's own counter (tiny model) and against figures by hand (published model)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.data.loader.sample import open_tokens
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.flops import BatchCounts, FlopRates, peak_flops, step_flops
from tinygptv_ds.models.parameters import Part, lora, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.metrics.accumulator import _work
from tinygptv_ds.train.transfer import model_inputs
from tinygptv_ds.weights.assemble import build_model

ATTENTION = ("scaled_dot_product", "_flash", "_efficient")  # kernels, of which torch counts some and not others


def everything(name: str) -> bool:
    return True


def products(model: TinyGPTVForConditionalGeneration, inputs: dict[str, Any]) -> float:
    """Return the operations in matrix products, forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        output = model(**inputs)
        (output.token_losses.sum() + output.anchor).backward()
    by_op = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in by_op.items() if not any(part in str(op) for part in ATTENTION))


def without_kernels(costs: FlopRates, config: TinyGPTVConfig, vision_passes: int) -> FlopRates:
    """Return the same without the attention of Phi and the ViT; that of the Q-Former consists of counted products."""
    text, vision = config.text_config, config.vision_config
    rows = (vision.image_size // vision.patch_size) ** 2 + 1
    image = 4 * rows**2 * vision.hidden_size * vision.num_hidden_layers * vision_passes
    half = 6 * text.hidden_size * text.num_hidden_layers
    return FlopRates(costs.token - half, costs.square - half, costs.target, costs.image - image)


@pytest.mark.parametrize(
    ("parts", "lora_r", "vision_passes"),
    [((projections, norms), 0, 1), ((projections, norms, lora), 4, 1), ((everything,), 4, 3)],
    ids=["stage 1", "stage 4", "everything"],
)
def test_as_torch_counts(
    parts: tuple[Part, ...], lora_r: int, vision_passes: int, raw_recipe: Callable[..., dict[str, Any]]
) -> None:
    """The count of a step with images, texts and conversations has every product of both passes, and nothing else."""
    raw = raw_recipe(model__lora_r=lora_r, train__batch_size=24, train__micro_batch_size=24)
    recipe = build_recipe(raw, "test")
    model = build_model(recipe.model, recipe.text, frozen_dtype=torch.float32).train()
    trained = train_only(model, *parts)
    batch = MicroBatches(open_stream(recipe), open_tokens(recipe, model.config), rank=0, world_size=1)[0, 0].batch
    assert len(batch.pixel_values) >= model._fewest_images()  # no black ones are added
    costs = without_kernels(step_flops(model.config, trained), model.config, vision_passes)
    assert costs.of(BatchCounts(*_work(batch))) == products(model, model_inputs(batch))


def test_causal_attention_is_half_of_a_square() -> None:
    """A sample of n tokens has n (n + 1) / 2 pairs, with two products forward and four backward in every layer."""
    config = TinyGPTVConfig()
    costs = step_flops(config, ["llama_proj.weight"])
    n, text = 100, config.text_config
    alone = costs.of(BatchCounts(tokens=n, squares=n * n)) - costs.of(BatchCounts(tokens=n, squares=0))
    alone += n * 6 * text.hidden_size * text.num_hidden_layers
    assert alone == pytest.approx(n * (n + 1) / 2 * 4 * text.hidden_size * 3 * text.num_hidden_layers)


@pytest.mark.parametrize(
    ("case", "teraflops"),
    [
        ({"size": 224, "lora": 0, "tokens": 48, "targets": 15}, 1.03),
        ({"size": 224, "lora": 64, "tokens": 48, "targets": 15}, 1.04),
        ({"size": 224, "lora": 64, "tokens": 160, "targets": 100}, 2.24),
        ({"size": 448, "lora": 64, "tokens": 128, "targets": 40}, 3.63),
        ({"size": 448, "lora": 64, "tokens": 512, "targets": 256}, 7.80),
        ({"size": 224, "lora": 0, "tokens": 48, "targets": 15, "from_features": True}, 0.49),
        ({"size": 448, "lora": 64, "tokens": 512, "targets": 256, "from_features": True}, 5.52),
        ({"size": 448, "lora": 64, "tokens": 512, "targets": 256, "recomputed": 1.0}, 10.45),
    ],
)
def test_the_published_model(case: dict[str, Any], teraflops: float) -> None:
    """A sample of each stage matches figures calculated by hand from the published sizes."""
    case = dict(case)
    sizes = {"vision_config": {"image_size": case.pop("size")}, "lora_r": case.pop("lora")}
    work = BatchCounts(case["tokens"], case["tokens"] ** 2, case["targets"], 1)
    options = {name: case[name] for name in ("from_features", "recomputed") if name in case}
    trained = [f"llama_proj{n}.weight" for n in ("", "2")]
    assert step_flops(TinyGPTVConfig(**sizes), trained, **options).of(work) / 1e12 == pytest.approx(
        teraflops, rel=0.015
    )


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_goes_by_the_whole_name(device: str, peak: float | None) -> None:
    assert peak_flops(device, "bf16") == peak_flops(device, "fp16") == peak
    assert peak_flops(device, "fp32") is None


def test_no_torch_is_needed() -> None:
    """An estimate may pass any object that has the sizes."""
    config = TinyGPTVConfig(lora_r=8)
    parts = {
        name: SimpleNamespace(**getattr(config, name).to_dict())
        for name in ("vision_config", "qformer_config", "text_config")
    }
    same = SimpleNamespace(**{**config.to_dict(), **parts})
    assert step_flops(same, []) == step_flops(config, [])
