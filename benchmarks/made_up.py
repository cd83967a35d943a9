"""Random weights in the layouts of the released files, of the published or of a tiny size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tinygptv_ds.models.configuration import PHI_2, TinyGPTVConfig
from tinygptv_ds.models.parameters import is_trainable, lora
from tinygptv_ds.weights.assemble import meta_model
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.layouts import blip2
from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS, to_layout
from tinygptv_ds.weights.layouts.tinygptv import original_name
from tinygptv_ds.weights.safetensors_writer import write_weights

ROOT = Path(__file__).resolve().parents[1]
_TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TINY_QFORMER = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
_SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")
_TINY_PHI = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES = {
    "published": TinyGPTVConfig(lora_r=64),
    "tiny": TinyGPTVConfig(
        vision_config={**_TINY_VIT, "image_size": 28},
        qformer_config={**_TINY_QFORMER, "encoder_hidden_size": 16},
        text_config={**PHI_2, **_TINY_PHI, "num_attention_heads": 2, **dict.fromkeys(_SPECIAL, 40)},
        num_query_tokens=4,
        proj_hidden_size=24,
        lora_r=4,
    ),
}


@dataclass(frozen=True)
class MadeUp:
    """The files that `make_weights` has written.

    Attributes:
        phi: a folder of safetensors shards, split layout, fp16.
        phi_bin: a folder of .bin shards, first remote code's layout, fp16.
        eva_vit: a file like `eva_vit_g.pth`, fp16, with one block more than is used.
        qformer: a file like BLIP-2's, fp32.
        trained: a file like the released one of stage 4, fp32.
        recipe: a recipe of stage 4 that names all of these.
        larger: an image size of twice the ViT's.
        model_bytes: bytes of the model in memory, frozen weights in 16 bit, trainable ones in fp32.
    """

    phi: Path
    phi_bin: Path
    eva_vit: Path
    qformer: Path
    trained: Path
    recipe: Path
    larger: int
    model_bytes: int


def make_weights(folder: Path, size: str) -> MadeUp:
    """Write all files for a model of one of `SIZES`."""
    torch.manual_seed(0)
    config = SIZES[size]
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    made = MadeUp(
        phi=folder / "phi",
        phi_bin=folder / "phi_bin",
        eva_vit=folder / "eva_vit_g.pth",
        qformer=folder / "blip2.pth",
        trained=folder / "stage4.pth",
        recipe=folder / "stage4.yaml",
        larger=2 * config.vision_config.image_size,
        model_bytes=sum(torch.Size(shape).numel() * (4 if is_trainable(name) else 2) for name, shape in shapes.items()),
    )
    _make_phi(made, shapes, config)
    depth = config.vision_config.num_hidden_layers
    vit = {n.removeprefix("visual_encoder."): s for n, s in shapes.items() if n.startswith("visual_encoder.")}
    last = {n.replace(f"blocks.{depth - 1}.", f"blocks.{depth}."): s for n, s in vit.items()}
    torch.save({name: random(shape, torch.float16) for name, shape in {**vit, **last}.items()}, made.eva_vit)
    parts = ("qformer.", "ln_vision.", "query_tokens")
    qformer = {blip2.original_name(n): random(s, torch.float32) for n, s in shapes.items() if n.startswith(parts)}
    torch.save({"model": qformer}, made.qformer)
    trained = {original_name(n, lora=True): random(s, torch.float32) for n, s in shapes.items() if is_trainable(n)}
    moments = {i: {"exp_avg": t, "exp_avg_sq": t.square()} for i, t in enumerate(trained.values())}
    torch.save({"model": trained, "optimizer": {"state": moments}, "epoch": 49}, made.trained)
    made.recipe.write_text(yaml.safe_dump(_recipe(made, config)), encoding="utf-8")
    return made


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return normal values that are small enough for any dtype."""
    return torch.empty(shape, dtype=torch.float32).normal_(std=0.02).to(dtype)


def _make_phi(made: MadeUp, shapes: dict[str, tuple[int, ...]], config: TinyGPTVConfig) -> None:
    plain = {
        name: Stored(shape, torch.float16, partial(random, shape, torch.float16))
        for name, shape in shapes.items()
        if name.startswith("language_model.") and not lora(name) and not ADDED_NORMS.fullmatch(name)
    }
    text = config.text_config
    for folder, layout, write in ((made.phi, "split", write_weights), (made.phi_bin, "remote", _write_bin)):
        folder.mkdir()
        write(folder, to_layout(plain, text.num_attention_heads, layout))
        text.save_pretrained(folder)
        assert isinstance(text.eos_token_id, int)
        _tokenizer(text.eos_token_id).save_pretrained(folder)


def _write_bin(folder: Path, tensors: dict[str, Stored]) -> None:
    """Write two .bin shards with their index."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name].read() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _tokenizer(last: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(last)} | {"<|endoftext|>": last}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def _recipe(made: MadeUp, config: TinyGPTVConfig) -> dict:
    raw = yaml.safe_load((ROOT / "stages/stage4.yaml").read_text(encoding="utf-8"))
    paths = {"phi": made.phi, "eva_vit": made.eva_vit, "qformer": made.qformer, "init_from": made.trained}
    raw["model"] |= {part: str(path) for part, path in paths.items()}
    raw["model"] |= {
        "image_size": config.vision_config.image_size,
        "eva_vit_depth": config.vision_config.num_hidden_layers,
        "eva_vit_heads": config.vision_config.num_attention_heads,
        "qformer_heads": config.qformer_config.num_attention_heads,
        "proj_hidden_size": config.proj_hidden_size,
        "lora_r": config.lora_r,
    }
    return raw
