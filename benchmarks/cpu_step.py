"""CPU time of a training step next to the original's procedure, on the same random weights and samples, in one run.

The original's procedure is written out plainly: samples padded on the right to the longest, eager attention with an
additive mask and a softmax in fp32, and fp32 logits of all rows, of which the loss then uses those with a target. It
runs on the modules of our model, so weights and matrix products are the same, and the losses must be.

    python benchmarks/cpu_step.py               # ViT 8 x 256, Phi 8 x 512, vocabulary 51,200, one thread
    python benchmarks/cpu_step.py --profile     # the operations of our step that take longest
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.model import build
from tinygptv_ds.data.loader.batch import collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.models.configuration import PHI_2, TinyGPTVConfig
from tinygptv_ds.models.phi import PhiBlock, PhiModel, rotary_tables, rotate
from tinygptv_ds.models.tinygptv import PackedOutput, TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE, TokenRow
from tinygptv_ds.train.transfer import model_inputs

Model = TinyGPTVForConditionalGeneration
_ORIGINAL, _OURS = "the original's procedure", "ours, from pixels"
LENGTHS = (448, 352, 288, 256, 224, 192, 128, 96)  # tokens: a conversation next to short questions
_TOLERANCE = 1e-4  # of the losses, in fp32


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size", choices=["small", "tiny"], default="small", help="of the model (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="print our step's operations instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = build(configuration(args.size), torch.float32, torch.device("cpu")).train()
    if args.profile:
        print(profile(model))
    else:
        seconds, losses = compare(model, args.repeat)
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


def compare(model: Model, repeat: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the CPU seconds and the losses of our and the original's steps, run in turn."""
    pixels, features = (inputs_of(model, source) for source in ("pixels", "features"))
    steps: dict[str, Callable[[], Tensor]] = {
        _ORIGINAL: lambda: original_loss(model, pixels),
        _OURS: lambda: our_loss(model, pixels),
        "the original's procedure from features": lambda: original_loss(model, features),
        "ours, from features": lambda: our_loss(model, features),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: one_step(model, loss)[1] for name, loss in steps.items()}  # and warms up
    for _ in range(repeat):
        for name, loss in steps.items():
            seconds[name].append(one_step(model, loss)[0])
    first, second = losses[_ORIGINAL], losses[_OURS]
    assert abs(first - second) < _TOLERANCE * abs(first), f"losses differ: {first} and {second}"
    return {name: min(taken) for name, taken in seconds.items()}, losses


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


def inputs_of(model: Model, source: str) -> dict[str, Any]:
    """Return a micro-batch of samples of these lengths with an image each, from pixels or features."""
    config, rng = model.config, np.random.default_rng(0)
    size, queries = config.vision_config.image_size, config.num_query_tokens
    rows = [_row(rng, config, length) for length in LENGTHS]
    refs = [SampleRef(index, "random", 0, 0, index) for index in range(len(rows))]
    features = torch.from_numpy(rng.standard_normal((len(rows), 1, queries, config.qformer_config.hidden_size)))
    cached = source == "features"
    pixels = rng.integers(0, 256, (len(rows), 0 if cached else 1, 3, size, size), dtype=np.uint8)
    made = list(features.float()) if cached else [None] * len(rows)
    samples = [Sample(*each) for each in zip(refs, rows, pixels, made, strict=True)]
    none = features[0][:0].float() if cached else None
    batch = collate(samples, ["random"], queries=queries, image_size=size, bos=0, no_features=none)
    return model_inputs(batch) | {"dropout_keys": None}


def _row(rng: np.random.Generator, config: TinyGPTVConfig, length: int) -> TokenRow:
    """Return an image and a question, and an answer of a third of the tokens."""
    ids, image = rng.integers(0, config.image_token_id, length), np.arange(4, 4 + config.num_query_tokens)
    ids[image] = config.image_token_id
    labels = np.where(np.arange(length) < length * 2 // 3, IGNORE, ids)
    return TokenRow(ids, labels, np.arange(length), image, np.arange(config.num_query_tokens))


def our_loss(model: Model, inputs: dict[str, Any]) -> Tensor:
    """Return the mean loss of the packed forward pass."""
    output = model(**inputs)
    assert isinstance(output, PackedOutput)
    return output.token_losses.mean() + output.anchor


def profile(model: Model) -> str:
    """Return the operations of our step, from pixels, that take longest."""
    inputs = inputs_of(model, "pixels")
    our_loss(model, inputs).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        our_loss(model, inputs).backward()
    averages = found.key_averages(group_by_input_shape=True)
    return averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40)


# ---- the original's procedure


def original_loss(model: Model, inputs: dict[str, Any]) -> Tensor:
    """Return the mean loss of the samples of a packed batch, padded and computed as the original does."""
    lengths = inputs["cu_seqlens"].diff().tolist()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.index_copy(0, inputs["image_rows"], _images(model, inputs).flatten(0, 1))
    labels = torch.full((len(embeds),), -100)
    labels[inputs["target_rows"] + 1] = inputs["targets"]
    padded, positions = (_pad(part, lengths) for part in (embeds, inputs["position_ids"]))
    logits = model.language_model.lm_head(_phi(model.language_model.model, padded, positions, lengths)).float()
    shifted = _pad(labels, lengths, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100)


def _images(model: Model, inputs: dict[str, Any]) -> Tensor:
    if inputs["image_features"] is not None:
        return model.project(inputs["image_features"])
    _set_fused_attention(model, fused=False)
    try:
        return model.project(model.encode_vision(inputs["pixel_values"]))
    finally:
        _set_fused_attention(model, fused=True)


def _set_fused_attention(model: Model, *, fused: bool) -> None:
    for block in model.visual_encoder.get_submodule("blocks").children():
        block.get_submodule("attn").__dict__["fused_attn"] = fused
    model.qformer.config._attn_implementation = "sdpa" if fused else "eager"


def _pad(packed: Tensor, lengths: list[int], value: float = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(packed.split(lengths)), batch_first=True, padding_value=value)


def _phi(phi: PhiModel, x: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
    """Return `[B, L, W]` after the final norm, with a mask that is added to the scores."""
    longest, lowest = x.shape[1], torch.finfo(x.dtype).min
    causal = torch.full((longest, longest), lowest).triu(1)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = (causal + torch.where(real, 0.0, lowest)[:, None, None, :]).clamp(min=lowest)
    tables = rotary_tables(positions, phi.text_config, phi.rotary_dtype)
    for block in phi.layers:
        assert isinstance(block, PhiBlock)
        h = block.input_layernorm(x)
        x = x + block.post_layernorm(_attention(block, h, tables, mask)) + _mlp(block, h)
    return phi.final_layernorm(x)


def _attention(block: PhiBlock, h: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    own = block.self_attn
    q, k, v = own.query_key_value(h).unflatten(-1, (own.heads, 3, own.head_dim)).unbind(-2)
    q, k = rotate(own.q_layernorm(q), *tables).transpose(1, 2), rotate(own.k_layernorm(k), *tables).transpose(1, 2)
    scores = q.float() @ k.float().transpose(2, 3) / own.head_dim**0.5 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return own.dense((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(-2))


def _mlp(block: PhiBlock, h: Tensor) -> Tensor:
    return block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))


if __name__ == "__main__":
    main()
