"""Random weights of a tiny model in the released files' layouts, and a recipe that trains them, for the tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from tinygptv_ds.data.prepare.prepare import write_samples
from tinygptv_ds.data.sets.common import PreparedSample
from tinygptv_ds.models.configuration import EvaViTConfig
from tinygptv_ds.models.eva_vit import build_eva_vit

IMAGE_SIZE, QUERIES, WIDTH = 28, 3, 32
_TEXT = (
    "[vqa] what colour is the bus ? a red bus on the left [INST] [/INST] ###Human: ###Assistant: <Img></Img> "
    "describe 0 1"
)


def save_weights(folder: Path, seed: int = 0) -> Path:
    """Write `phi/`, `eva_vit_g.pth` and `blip2_pretrained_flant5xxl.pth` with random values."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    end = len(tokenizer) - 1
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    phi = PhiConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        rope_parameters=rope,
        resid_pdrop=0.1,
        bos_token_id=end,
        eos_token_id=end,
    )
    PhiForCausalLM(phi).save_pretrained(folder / "phi")
    tokenizer.save_pretrained(folder / "phi")
    vit = build_eva_vit(
        EvaViTConfig(
            image_size=IMAGE_SIZE, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
    )
    torch.save(vit.state_dict(), folder / "eva_vit_g.pth")
    torch.save({"model": _blip2()}, folder / "blip2_pretrained_flant5xxl.pth")
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([_TEXT] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe)
    fast.add_special_tokens(dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))
    return fast


def _blip2() -> dict[str, torch.Tensor]:
    config = Blip2QFormerConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        encoder_hidden_size=WIDTH,
    )
    state = {"query_tokens": torch.randn(1, QUERIES, WIDTH)}
    state |= {"ln_vision.weight": torch.ones(WIDTH), "ln_vision.bias": torch.zeros(WIDTH)}
    for name, tensor in Blip2QFormerModel(config).state_dict().items():
        lavis = name.replace("attention.attention.", "attention.self.").replace(
            "layernorm.", "embeddings.LayerNorm.", 1
        )
        state[f"Qformer.bert.{lavis}"] = tensor
    return state


def encoded_images(count: int, seed: int = 0) -> list[bytes]:
    """Encoded random images of unequal sizes."""
    import io

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        height, width = rng.integers(20, 60, size=2)
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
        encoded.append(out.getvalue())
    return encoded


def samples(kind: str, count: int, seed: int = 0) -> list[PreparedSample]:
    """`count` samples with one image ("caption", "vqa"), none ("text"), two ("pair") or several turns ("chat")."""
    rng = random.Random(seed)
    words = ["red", "bus", "left", "the", "what", "colour"]

    def phrase() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 8)))

    made = []
    for number, image in enumerate(encoded_images(count, seed)):
        record: dict[str, Any] = {"pool": "vqa", "text": phrase(), "answer": phrase(), "clean": ["text", "answer"]}
        if kind == "caption":
            record = {"caption": phrase()}
        if kind == "chat":
            record = {"conversation": [[phrase(), phrase()] for _ in range(3)]}
        if kind == "text":
            record = {"pool": None, "text": phrase(), "answer": phrase()}
        images = {"text": (), "pair": (image, image)}.get(kind, (image,))
        made.append(PreparedSample(f"{number:06d}", record, images))
    return made


def write_shards(out: Path, made: list[PreparedSample], samples_per_shard: int = 5) -> Path:
    """Samples as ordinary shards, as `prepare` writes them."""
    settings = {"samples": len(made)}
    write_samples(iter(made), out, samples_per_shard=samples_per_shard, total=len(made), settings=settings)
    return out


def recipe(weights: Path, shards: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """A recipe as plain values; `changes` are dotted keys with `__` for the dot."""
    raw: dict[str, Any] = {
        "stage": 4,
        "seed": 7,
        "model": {
            "phi": str(weights / "phi"),
            "eva_vit": str(weights / "eva_vit_g.pth"),
            "qformer": str(weights / "blip2_pretrained_flant5xxl.pth"),
            "image_size": IMAGE_SIZE,
            "eva_vit_depth": 2,
            "eva_vit_heads": 2,
            "qformer_heads": 2,
            "proj_hidden_size": 24,
            "lora_r": 4,
            "resid_dropout": 0.0,
            "lora_dropout": 0.0,
        },
        "text": {"prompt_template": "[INST] {} [/INST]", "end_sym": "###", "max_txt_len": 64},
        "data": {
            "datasets": [{"name": name, "shards": str(path)} for name, path in shards.items()],
            "num_workers": 0,
        },
        "optimizer": {"lr": 3e-3, "min_lr": 1e-3, "warmup_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "batch_size": 8,
            "micro_batch_size": 2,
            "epochs": 1,
            "steps_per_epoch": 6,
            "log_every": 1,
            "checkpoint_every": 0,
            "sample_count": 2,
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = raw
        for part in path:
            node = node[part]
        node[last] = value
    return raw


def write_recipe(path: Path, raw: dict[str, Any]) -> Path:
    """Save it as YAML."""
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def losses(run_dir: Path) -> list[float]:
    """The losses of a run, from its metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def export_model(weights: Path, out: Path) -> Path:
    """A whole model with its processor, as `export` writes it."""
    from tinygptv_ds.config.load import build_recipe
    from tinygptv_ds.processing.processor import TinyGPTVProcessor
    from tinygptv_ds.weights.assemble import build_model, load_tokenizer

    made = build_recipe(recipe(weights, {"none": weights}), "test")
    torch.manual_seed(3)
    model = build_model(made.model, made.text, frozen_dtype=torch.float32)
    model.save_pretrained(out)
    TinyGPTVProcessor.for_model(model.config, load_tokenizer(weights / "phi")).save_pretrained(out)
    return out
