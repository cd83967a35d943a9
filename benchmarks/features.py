"""Time that training from features saves: a step from pixels compared with the same step from features.

The timed model is a small one of the published proportions: Phi has 2.6 times the parameters of the ViT. The same ratio
is counted in operations at the published sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from tinygptv_ds.cli import run_command
from tinygptv_ds.features.encode import encode
from tinygptv_ds.models.configuration import PHI_2, TinyGPTVConfig
from tinygptv_ds.models.flops import BatchCounts, step_flops
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import meta_model

_SPECIAL = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 40)
# ViT, Q-Former and Phi: width, blocks, heads.
SIZES = {
    "small": ((384, 12, 6), (256, 4, 4), (640, 11, 10)),
    "tiny": ((64, 2, 2), (32, 2, 2), (64, 2, 2)),
}
# Stages 1 and 2: a caption of 20 tokens at 224 pixels. Stage 4: a question and its answer, 60 tokens, at 448.
CASES = {"stages 1, 2": (224, 20), "stage 4": (448, 60)}


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        name: name of the stage.
        image_size: side of the image in pixels.
        text_tokens: text tokens of a sample, which has one image.
        pixels: seconds of a step, forward and backward, from pixels.
        features: seconds of the same step from features.
        ratio: `pixels` / `features`.
        published_ratio: the same ratio in operations of a step at the published sizes.
        images_per_second: speed of ViT and Q-Former when they compute features.
        same_loss: whether both losses are equal bit for bit.
    """

    name: str
    image_size: int
    text_tokens: int
    pixels: float
    features: float
    ratio: float
    published_ratio: float
    images_per_second: float
    same_loss: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Time every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="small", help="tiny: only to try the script")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a step (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps; the fastest is reported (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    print(
        f"{'':12} {'pixels':>6} {'text':>5} {'s from pixels':>14} {'from features':>14} {'ratio':>6} {'published*':>11}"
    )
    rows = []
    for name, (image_size, text_tokens) in CASES.items():
        rows.append(measure(name, args.size, image_size, text_tokens, args.batch_size, args.steps))
        row = rows[-1]
        print(
            f"{name:12} {image_size:>6} {text_tokens:>5} {row.pixels:>14.3f} {row.features:>14.3f} {row.ratio:>6.2f} "
            f"{row.published_ratio:>11.2f}",
            flush=True,
        )
    print("* ratio of operations at the published sizes, counted")
    if args.json:
        figures = {"machine": platform.platform(), "threads": torch.get_num_threads(), **vars(args)}
        figures = {key: value for key, value in figures.items() if key != "json"}
        args.json.write_text(json.dumps(figures | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def measure(name: str, size: str, image_size: int, text_tokens: int, batch: int, steps: int) -> Row:
    """Time both kinds of step on the same model and the same samples."""
    torch.manual_seed(0)
    model = make_model(size, image_size)
    pixels = torch.randint(0, 255, (batch, 3, image_size, image_size), dtype=torch.uint8)
    began = time.perf_counter()
    features = encode(model, pixels, "fp32")
    encoding = time.perf_counter() - began
    inputs = packed_rows(model.config, batch, text_tokens)
    from_pixels, loss = fastest(lambda: step(model, {**inputs, "pixel_values": pixels}), steps)
    from_features, same = fastest(lambda: step(model, {**inputs, "image_features": features}), steps)
    published = TinyGPTVConfig(vision_config={"image_size": image_size}, lora_r=64)
    return Row(
        name,
        image_size,
        text_tokens,
        from_pixels,
        from_features,
        from_pixels / from_features,
        flops_ratio(published, text_tokens),
        batch / encoding,
        loss == same,
    )


def make_model(size: str, image_size: int) -> TinyGPTVForConditionalGeneration:
    """Return a model with random weights that trains what the stages train."""
    vit, qformer, phi = SIZES[size]
    config = TinyGPTVConfig(
        vision_config={**_part(vit), "image_size": image_size},
        qformer_config={**_part(qformer), "encoder_hidden_size": vit[0]},
        text_config={**PHI_2, **_part(phi), "vocab_size": 1024, **_SPECIAL},
        proj_hidden_size=2 * phi[0],
        lora_r=8,
    )
    model = TinyGPTVForConditionalGeneration(config)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(parameter_name))
    return model.train()


def _part(size: tuple[int, int, int]) -> dict[str, int]:
    width, blocks, heads = size
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def packed_rows(config: TinyGPTVConfig, batch: int, text_tokens: int) -> dict[str, Tensor | int]:
    """Return packed samples of one image and then `text_tokens` target tokens each."""
    queries, length = config.num_query_tokens, config.num_query_tokens + text_tokens
    ids = torch.randint(0, 1000, (batch, length))
    ids[:, :queries] = config.image_token_id
    rows = torch.arange(batch * length).view(batch, length)
    return {
        "input_ids": ids.flatten(),
        "position_ids": torch.arange(length).repeat(batch),
        "cu_seqlens": torch.arange(0, batch * length + 1, length, dtype=torch.int32),
        "max_seqlen": length,
        "image_rows": rows[:, :queries].flatten(),
        "image_index": torch.arange(batch * queries),
        "target_rows": rows[:, queries - 1 : -1].flatten(),
        "targets": ids[:, queries:].flatten(),
    }


def step(model: TinyGPTVForConditionalGeneration, inputs: dict) -> float:
    """Run forward and backward, and return the loss."""
    model.zero_grad()
    torch.manual_seed(0)  # for dropout
    loss = model(**inputs).token_losses.mean()
    loss.backward()
    return loss.item()


def fastest(call: Callable[[], float], times: int) -> tuple[float, float]:
    """Return the seconds of the fastest call after a warm-up, and the result of the last call."""
    result, seconds = call(), []
    for _ in range(times):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def flops_ratio(config: TinyGPTVConfig, text_tokens: int) -> float:
    """Return the operations of a sample's training step from pixels divided by those from features."""
    rows = config.num_query_tokens + text_tokens
    sample = BatchCounts(rows, rows**2, text_tokens, 1)
    trained = [name for name, _ in meta_model(config).named_parameters() if is_trainable(name)]
    from_features = step_flops(config, trained, from_features=True)
    return step_flops(config, trained).of(sample) / from_features.of(sample)


if __name__ == "__main__":
    run_command(main)
