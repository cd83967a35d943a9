"""CPU time of a training step next to the original's procedure, on the same random weights and samples, in one run.

The original's procedure is that of `benchmarks/original.py`: padded rows, eager attention, logits of all rows. It runs
on the modules of our model, so weights and matrix products are the same, and the losses must be.

    python benchmarks/cpu_step.py               # ViT 8 x 256, Phi 8 x 512, vocabulary 51,200, one thread
    python benchmarks/cpu_step.py --batch short # 64 to 190 tokens, 40 of them targets
    python benchmarks/cpu_step.py --products    # operations of matrix products by part, and their share of the time
    python benchmarks/cpu_step.py --profile     # the operations of our step that take longest
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.model import build
from benchmarks.original import PaddedBatch, as_the_original, mean_loss, padded
from tinygptv_ds.data.loader.batch import Batch, collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.models.configuration import PHI_2, TinyGPTVConfig
from tinygptv_ds.models.loss import PackedOutput
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE, TokenRow
from tinygptv_ds.train.transfer import model_inputs

Model = TinyGPTVForConditionalGeneration
_ORIGINAL, _OURS = "the original's procedure", "ours, from pixels"
_FROM_FEATURES = "the original's procedure from features"


class Samples(NamedTuple):
    """The samples of a batch, of one image each.

    Attributes:
        lengths: tokens of each.
        targets: target tokens of each; None: a third of its tokens.
    """

    lengths: tuple[int, ...]
    targets: int | None = None


BATCHES = {
    "long": Samples((448, 352, 288, 256, 224, 192, 128, 96)),  # a conversation next to short questions
    "medium": Samples((320, 256, 224, 192, 160, 128, 96, 72)),
    "short": Samples((190, 172, 154, 136, 118, 100, 82, 64), 40),
}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution"}
_PRODUCTS |= {"aten::_scaled_dot_product_flash_attention_for_cpu" + of for of in ("", "_backward")}
_PARTS = {
    "ViT": "visual_encoder",
    "Q-Former": "qformer",
    "Phi": "language_model.model",
    "head": "language_model.lm_head",
}
_TOLERANCE = 1e-4  # of the losses, in fp32


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size", choices=["small", "tiny"], default="small", help="of the model (default: %(default)s)"
    )
    parser.add_argument("--batch", choices=list(BATCHES), default="long", help="the samples (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--products", action="store_true", help="print what matrix products take instead")
    parser.add_argument("--profile", action="store_true", help="print our step's operations instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = build(configuration(args.size), torch.float32, torch.device("cpu")).train()
    samples = BATCHES[args.batch]
    if args.profile:
        print(profile(model, samples))
    elif args.products:
        print("\n".join(products(model, samples)))
    else:
        seconds, losses = compare(model, args.repeat, samples)
        print("\n".join(table(seconds, losses)))
        if args.json:
            args.json.write_text(json.dumps({"seconds": seconds, "losses": losses}, indent=1) + "\n", encoding="utf-8")


def configuration(size: str) -> TinyGPTVConfig:
    """Return the sizes of the model that is measured; without dropout, so that both procedures give one loss."""
    layers, wide, vocabulary = (8, 512, 51_200) if size == "small" else (2, 64, 512)
    vit = {"image_size": 224 if size == "small" else 28, "hidden_size": wide // 2, "num_hidden_layers": layers}
    vit |= {"num_attention_heads": 4, "intermediate_size": 2 * wide}
    qformer = Blip2QFormerConfig(
        hidden_size=wide // 2,
        num_hidden_layers=layers // 2,
        num_attention_heads=4,
        intermediate_size=wide,
        encoder_hidden_size=wide // 2,
    )
    text = {"vocab_size": vocabulary, "hidden_size": wide, "intermediate_size": 4 * wide, "resid_pdrop": 0.0}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 8}
    text |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return TinyGPTVConfig(
        vision_config=vit,
        qformer_config=qformer,
        text_config=PHI_2 | text,
        proj_hidden_size=wide,
        lora_r=16,
        lora_dropout=0.0,
    )


def compare(model: Model, repeat: int, samples: Samples) -> tuple[dict[str, float], dict[str, float]]:
    """Return the CPU seconds and the losses of our and the original's steps, run in turn."""
    steps = losses_of(model, samples)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: one_step(model, loss)[1] for name, loss in steps.items()}  # and warms up
    for _ in range(repeat):
        for name, loss in steps.items():
            seconds[name].append(one_step(model, loss)[0])
    first, second = losses[_ORIGINAL], losses[_OURS]
    assert abs(first - second) < _TOLERANCE * abs(first), f"losses differ: {first} and {second}"
    return {name: min(taken) for name, taken in seconds.items()}, losses


def losses_of(model: Model, samples: Samples) -> dict[str, Callable[[], Tensor]]:
    """Return the functions whose forward and backward passes are compared."""
    pixels, features = (batch_of(model, source, samples) for source in ("pixels", "features"))
    padded_pixels, padded_features = (padded(batch, model.normalize) for batch in (pixels, features))
    return {
        _ORIGINAL: lambda: original_loss(model, padded_pixels),
        _OURS: lambda: our_loss(model, pixels),
        _FROM_FEATURES: lambda: original_loss(model, padded_features),
        "ours, from features": lambda: our_loss(model, features),
    }


def table(seconds: Mapping[str, float], losses: Mapping[str, float]) -> list[str]:
    """Return a Markdown table of the seconds, and the losses from pixels."""
    whole = seconds[_ORIGINAL]
    lines = ["| step of 8 samples | CPU s | of the original's |", "|-|-|-|"]
    lines += [f"| {name} | {taken:.2f} | {taken / whole:.2f} |" for name, taken in seconds.items()]
    return [*lines, "", f"losses: {losses[_ORIGINAL]:.6f} and {losses[_OURS]:.6f}"]


def one_step(model: Model, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """Run forward and backward passes; return the CPU seconds of this process and the loss."""
    model.zero_grad()
    begin = time.process_time()
    value = loss()
    value.backward()
    return time.process_time() - begin, float(value.detach())


def batch_of(model: Model, source: str, samples: Samples = BATCHES["long"]) -> Batch:
    """Return a micro-batch of samples with an image each, from pixels or features."""
    config, rng = model.config, np.random.default_rng(0)
    size, queries = config.vision_config.image_size, config.num_query_tokens
    rows = [_row(rng, config, length, samples.targets or length - length * 2 // 3) for length in samples.lengths]
    refs = [SampleRef(index, "random", 0, 0, index) for index in range(len(rows))]
    features = torch.from_numpy(rng.standard_normal((len(rows), 1, queries, config.qformer_config.hidden_size)))
    cached = source == "features"
    pixels = rng.integers(0, 256, (len(rows), 0 if cached else 1, 3, size, size), dtype=np.uint8)
    made = list(features.float()) if cached else [None] * len(rows)
    loaded = [Sample(*each) for each in zip(refs, rows, pixels, made, strict=True)]
    none = features[0][:0].float() if cached else None
    return collate(loaded, ["random"], queries=queries, image_size=size, bos=0, no_features=none)


def _row(rng: np.random.Generator, config: TinyGPTVConfig, length: int, targets: int) -> TokenRow:
    """Return an image and a question, and an answer of so many tokens."""
    ids, image = rng.integers(0, config.image_token_id, length), np.arange(4, 4 + config.num_query_tokens)
    ids[image] = config.image_token_id
    labels = np.where(np.arange(length) < length - targets, IGNORE, ids)
    return TokenRow(ids, labels, np.arange(length), image, np.arange(config.num_query_tokens))


def our_loss(model: Model, batch: Batch) -> Tensor:
    """Return the mean loss of the packed forward pass."""
    output = model(**model_inputs(batch) | {"dropout_keys": None})
    assert isinstance(output, PackedOutput)
    return output.token_losses.mean() + output.anchor


def original_loss(model: Model, batch: PaddedBatch) -> Tensor:
    """Return the mean loss of the same samples as the original computes it."""
    with as_the_original(model):
        return mean_loss(model, batch)


def products(model: Model, samples: Samples) -> list[str]:
    """Return a Markdown table of the operations of matrix products, and of their share of a step's time."""
    steps = losses_of(model, samples)
    with FlopCounterMode(display=False) as of_vision, torch.no_grad():
        model.encode_vision(batch_of(model, "pixels", samples).pixel_values)
    vision = of_vision.get_total_flops() / 1e9
    lines = [
        "| GFLOP of matrix products | vision | all others | all | share of the time, with attention |",
        "|-|-|-|-|-|",
    ]
    for name in (_ORIGINAL, _OURS):
        one_step(model, steps[name])  # warms up
        with FlopCounterMode(display=False) as counter:
            one_step(model, steps[name])
        whole = counter.get_total_flops() / 1e9
        times = {event.key: event.self_cpu_time_total for event in _profiled(model, steps[name]).key_averages()}
        share = sum(taken for key, taken in times.items() if key in _PRODUCTS) / sum(times.values())
        lines.append(f"| {name} | {vision:.1f} | {whole - vision:.1f} | {whole:.1f} | {share:.0%} |")
    return lines


def _profiled(model: Model, loss: Callable[[], Tensor]) -> torch.profiler.profile:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        one_step(model, loss)
    return found


def profile(model: Model, samples: Samples) -> str:
    """Return the operations of our step, from pixels, that take longest."""
    loss = losses_of(model, samples)[_OURS]
    one_step(model, loss)  # warms up
    averages = _profiled(model, loss).key_averages(group_by_input_shape=True)
    return averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40)


if __name__ == "__main__":
    main()
