"""What training from features saves: a step from pixels against the same step from features, and the share by count.

The model that is timed is a small one of the published proportions: Phi has 2.6 times the parameters of the ViT.
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
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

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
        name: the stage.
        image_size: pixels.
        text_tokens: next to a sample's one image.
        pixels: seconds of a step, forward and backward, from pixels.
        features: the same from features.
        ratio: of the two.
        published_ratio: of the operations of a step at the published sizes, by count.
        images_per_second: through ViT and Q-Former, when features are made.
        same_loss: whether both ways gave the same loss, bit for bit.
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
    parser.add_argument("--size", choices=list(SIZES), default="small", help="tiny: to try the script out")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a step (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=5, help="that are timed; the fastest counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
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
    print("* operations of a step from pixels to those from features, at the published sizes, by count")
    if args.json:
        figures = {"machine": platform.platform(), "threads": torch.get_num_threads(), **vars(args)}
        figures = {key: value for key, value in figures.items() if key != "json"}
        args.json.write_text(json.dumps(figures | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def measure(name: str, size: str, image_size: int, text_tokens: int, batch: int, steps: int) -> Row:
    """Both ways on the same model and the same samples."""
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
        1 + vision_operations(published) / llm_operations(published, text_tokens),
        batch / encoding,
        loss == same,
    )


def make_model(size: str, image_size: int) -> TinyGPTVForConditionalGeneration:
    """Random weights; what the stages train is trained."""
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
    """Samples of one image and then `text_tokens` tokens, all of which are learnt."""
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
    """Forward and backward; returns the loss."""
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(**inputs).token_losses.mean()
    loss.backward()
    return loss.item()


def fastest(call: Callable[[], float], times: int) -> tuple[float, float]:
    """(seconds of the fastest call after one that warms up, what it returns)."""
    result, seconds = call(), []
    for _ in range(times):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def vision_operations(config: TinyGPTVConfig) -> float:
    """Of one image, forward: 2 for each weight and row, 4 for each pair of rows and channel in attention."""
    vit, qformer, queries = config.vision_config, config.qformer_config, config.num_query_tokens
    patches = (vit.image_size // vit.patch_size) ** 2
    rows, width = 1 + patches, vit.hidden_size
    block = 2 * rows * (4 * width**2 + 2 * width * vit.intermediate_size) + 4 * rows**2 * width
    embedding = 2 * patches * 3 * vit.patch_size**2 * width
    own, cross = qformer.hidden_size, 2 * rows * 2 * width * qformer.hidden_size
    layer = 2 * queries * (4 * own**2 + 2 * own * qformer.intermediate_size) + 4 * queries**2 * own
    crossed = qformer.num_hidden_layers / qformer.cross_attention_frequency
    cross += 2 * queries * 2 * own**2 + 4 * queries * rows * own
    return vit.num_hidden_layers * block + embedding + qformer.num_hidden_layers * layer + crossed * cross


def llm_operations(config: TinyGPTVConfig, text_tokens: int) -> float:
    """Of one sample through projections and Phi, forward and backward; frozen weights have no gradient of their own."""
    phi, queries = config.text_config, config.num_query_tokens
    rows, width = queries + text_tokens, phi.hidden_size
    block = 2 * rows * (4 * width**2 + 2 * width * phi.intermediate_size) + 4 * rows**2 * width
    head = 2 * text_tokens * width * phi.vocab_size
    projections = 2 * queries * config.proj_hidden_size * (config.qformer_config.hidden_size + width)
    return 2 * (phi.num_hidden_layers * block + head) + 3 * projections


if __name__ == "__main__":
    run_command(main)
