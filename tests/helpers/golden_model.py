"""Models and packed rows from the reference data; nothing here assumes its sizes, names or cases."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.layouts.phi2 import parse_config
from tinygptv_ds.weights.layouts.tinygptv import canonical_name, original_source
from tinygptv_ds.weights.source import Source, check_weights, copy_weights

LOSS = {"rtol": 1e-5, "atol": 0}
HIDDEN = {"rtol": 1e-4, "atol": 1e-4}


@dataclass
class Packed:
    """A padded reference batch without its padding and holes, as keyword arguments of the packed forward."""

    inputs: dict
    keep: Tensor
    counts: list[int]


def read(path: Path) -> dict:
    return json.loads(path.read_bytes())


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def full_config(raw: dict, folder: Path) -> TinyGPTVConfig:
    vit, qformer = raw["vit"], raw["qformer"]
    return TinyGPTVConfig(
        vision_config=vision_config(vit),
        qformer_config=qformer_config(qformer, vit["embed_dim"]),
        text_config=vars_of(raw["phi"], folder),
        num_query_tokens=qformer["num_query_tokens"],
        proj_hidden_size=raw["proj_hidden"],
        **lora_settings(raw),
        end_sym=raw["end_sym"],
    )


def vision_config(vit: dict) -> dict:
    return {
        "image_size": vit["img_size"],
        "patch_size": vit["patch_size"],
        "hidden_size": vit["embed_dim"],
        "num_hidden_layers": vit["depth"],
        "num_attention_heads": vit["num_heads"],
        "intermediate_size": int(vit["embed_dim"] * vit["mlp_ratio"]),
    }


def qformer_config(qformer: dict, width: int) -> dict:
    return {
        "hidden_size": qformer["hidden_size"],
        "num_hidden_layers": qformer["num_hidden_layers"],
        "num_attention_heads": qformer["num_attention_heads"],
        "intermediate_size": qformer["intermediate_size"],
        "cross_attention_frequency": qformer["cross_attention_freq"],
        "layer_norm_eps": qformer["layer_norm_eps"],
        "encoder_hidden_size": width,
    }


def vars_of(phi: dict, folder: Path) -> dict:
    config = parse_config(phi, folder / "config.json").to_dict()
    return config | {"pad_token_id": phi["eos_token_id"]}


def lora_settings(raw: dict) -> dict:
    if not raw.get("lora_r"):
        return {}
    targets = {"lora_targets": tuple(raw["target_modules"])} if "target_modules" in raw else {}
    return {"lora_r": raw["lora_r"], "lora_alpha": raw["lora_alpha"], "lora_dropout": raw["lora_dropout"]} | targets


def language_config(raw: dict, folder: Path) -> TinyGPTVConfig:
    """Phi as in the reference, with the smallest of vision towers, which these tests do not use."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return TinyGPTVConfig(
        vision_config={"image_size": 14, "patch_size": 14, **small},
        qformer_config={"encoder_hidden_size": 8, **small},
        text_config=vars_of(raw, folder),
        proj_hidden_size=8,
        rotary_dtype="float32",  # here the original's module was built in fp32, not loaded in fp16
        **lora_settings(raw),
    )


def fill(module: nn.Module, source: Source) -> None:
    """Load every parameter of `module` from `source`, each exactly once."""
    parameters = dict(module.named_parameters())
    check_weights({name: tuple(p.shape) for name, p in parameters.items()}, source, "reference data and model disagree")
    copy_weights(parameters, source.weights)


def full_model(folder: Path) -> TinyGPTVForConditionalGeneration:
    model = TinyGPTVForConditionalGeneration(full_config(read(folder / "config.json"), folder))
    path = folder / "weights.safetensors"
    fill(model, original_source(open_weights(path), path))
    return model.eval()


def pack(attention_mask: Tensor, labels: Tensor) -> Packed:
    """The real positions of `[B, L]` end to end; positions keep their place in the padded row."""
    keep = attention_mask.bool()
    counts = keep.sum(1).tolist()
    positions = torch.arange(keep.shape[1]).expand_as(keep)
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert not ((following != -100) & ~keep).any(), "a hole predicts a target: it cannot be left out"
    packed_targets = following[keep]
    target_rows = (packed_targets != -100).nonzero().squeeze(1)
    return Packed(
        inputs={
            "position_ids": positions[keep],
            "cu_seqlens": torch.tensor([0, *counts]).cumsum(0).int(),
            "max_seqlen": max(counts),
            "target_rows": target_rows,
            "targets": packed_targets[target_rows],
        },
        keep=keep,
        counts=counts,
    )


def pack_layout(case: dict, attention_mask: Tensor, labels: Tensor, image_token: int) -> Packed:
    """As `pack`, with token ids and image rows from the layout that the reference wrote down."""
    packed = pack(attention_mask, labels)
    flat = [
        item
        for row, kept in zip(case["layout"], packed.keep.tolist(), strict=True)
        for item, real in zip(row, kept, strict=True)
        if real
    ]
    images = [(i, item) for i, item in enumerate(flat) if isinstance(item, dict)]
    rows = case["query_rows_per_image"]
    packed.inputs |= {
        "input_ids": torch.tensor([image_token if isinstance(item, dict) else item for item in flat]),
        "image_rows": torch.tensor([i for i, _ in images], dtype=torch.long),
        "image_index": torch.tensor([item["image"] * rows + item["row"] for _, item in images], dtype=torch.long),
    }
    return packed


def assert_gradients(module: nn.Module, expected: dict[str, Tensor], *, prefix: str = "") -> None:
    """Every `grad.<original name>` within 1e-4 of its largest entry."""
    parameters = dict(module.named_parameters())
    compared = 0
    for key, reference in expected.items():
        if not key.startswith("grad."):
            continue
        name = canonical_name(prefix + key.removeprefix("grad."))
        assert_gradient(parameters[name].grad, reference, name)
        compared += 1
    assert compared


def assert_gradient(ours: Tensor, reference: Tensor, name: str) -> None:
    assert ours is not None, f"{name} has no gradient"
    tolerance = 1e-4 * reference.abs().max().item() + 1e-9
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")
