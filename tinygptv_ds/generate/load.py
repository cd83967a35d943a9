"""Loading of a model for inference, from an exported folder, a run, or base weights with an adapter; 16, 8 or 4 bit.

Weights are read from their files into the model one at a time, each in its final form and on its device, so that a
second copy of the model never exists. Quantized layers are created one by one, too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from tinygptv_ds.config.paths import local_path
from tinygptv_ds.config.quantization import check_bitsandbytes
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.generate.quantize import AdaptedLinear, quantized_linear
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.eva_vit import KEY_BIAS
from tinygptv_ds.models.frozen_linear import keep_vit_weights_inside, linear_layers
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processes import return_freed_memory
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.weights.assemble import meta_model
from tinygptv_ds.weights.detect import PROVENANCE, open_any
from tinygptv_ds.weights.io import Stored, read_json
from tinygptv_ds.weights.layouts.layers import MOST_LAYERS
from tinygptv_ds.weights.layouts.tinygptv import original_source
from tinygptv_ds.weights.merge_lora import merge_lora
from tinygptv_ds.weights.opening import open_model_weights
from tinygptv_ds.weights.peft_adapter import ADAPTER_CONFIG, PeftAdapter, is_adapter, merge_adapter, read_adapter
from tinygptv_ds.weights.resolve import resolve
from tinygptv_ds.weights.safetensors_writer import convert_tensor
from tinygptv_ds.weights.source import Source, check_weights

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "image_size", "patch_size"),
)
_LARGEST = 1_000_000


class LoadedModel(NamedTuple):
    """A model ready to answer, in evaluation mode, with its processor."""

    model: TinyGPTVForConditionalGeneration
    processor: TinyGPTVProcessor


def load_model(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    bits: int = 16,
    device: str | None = None,
    merge: bool = False,
    quantize_vision: bool = False,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    adapter: Path | None = None,
) -> LoadedModel:
    """Load a model that is ready to answer, with its processor.

    Args:
        path: an exported folder, trained weights in any form that `resolve` takes, or an adapter that peft has trained
            on an exported folder, which its configuration names.
        dtype: dtype of computation and of the weights that are not quantized; None: `default_dtype`.
        bits: 16: all weights in `dtype`; 8 and 4 quantize the linear layers of Phi's blocks, but not embeddings, norms,
            LoRA, projections and Q-Former.
        device: "cpu", "cuda", "cuda:1", ...; None: a GPU if there is one.
        merge: merge LoRA into the weights that it adapts before they are quantized; False leaves it as it is stored.
        quantize_vision: quantize the linear layers of the ViT, too.
        recipe: for trained weights that do not name their base weights, as in `resolve`.
        overrides: changes to that recipe.
        adapter: a folder of peft's for the model; its LoRA is merged.

    Raises:
        WeightsError: there is no model at `path`, the adapter does not belong to it, or its base weights are not found.
        ConfigError: the device, or `bits` with this device or dtype, is not available here.
    """
    path = local_path(path)
    target = _device(device)
    dtype = dtype or default_dtype(target)
    check_bits(bits, target, dtype)
    if quantize_vision and bits == 16:
        raise ConfigError("quantizing the ViT needs 8 or 4 bits; with 16 nothing is quantized")
    if adapter is None and is_adapter(path) and not (path / PROVENANCE).is_file():
        path, adapter = _base_of(path), path
    weights, config, processor = _open(path, recipe, overrides)
    if adapter is not None:
        weights = merge_adapter(weights, _open_adapter(local_path(adapter), path))
    if merge and config.lora_r:
        weights, config = merge_lora(weights, config), copy.deepcopy(config)
        config.lora_r = 0
    model = meta_model(config)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper of `to` loses its signature
    if bits < 16:
        _quantize(model, weights, bits, target, quantize_vision)
    _fill(model, weights, target)
    if (path / "generation_config.json").is_file():
        with _named(path):
            model.generation_config = GenerationConfig.from_pretrained(path)
    return LoadedModel(model.eval(), processor)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 if the device computes in it: GPUs since Ampere (before: fp16), CPUs with AVX-512 (else: fp32)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32


def check_bits(bits: int, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a model can be loaded in `bits` bits here.

    Raises:
        ConfigError: it cannot; the message says what to install or to choose.
    """
    if bits not in (16, 8, 4):
        raise ConfigError(f"bits must be 16, 8 or 4, not {bits}")
    if bits == 16:
        return
    check_bitsandbytes(bits)
    if bits == 8 and device.type == "cuda" and dtype == torch.float32:
        raise ConfigError("8 bits on a GPU compute in 16 bit; use bf16 or fp16 instead of fp32")


def _device(wanted: str | None) -> torch.device:
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"there is no device {wanted!r}; choose cpu, cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {wanted!r}: cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"device {wanted!r}: torch sees {count} GPU(s) here; `tinygptv_ds doctor` says more, or use cpu"
        )
    return device


def _open(
    path: Path, recipe: Path | None, overrides: Sequence[str]
) -> tuple[dict[str, Stored], TinyGPTVConfig, TinyGPTVProcessor]:
    """Return all weights, none of which has been read, the configuration and the processor."""
    if not ((path / "config.json").is_file() and (path / "processor_config.json").is_file()):
        found = resolve(path, recipe, overrides)
        return found.weights(), found.config, TinyGPTVProcessor.for_model(found.config, found.tokenizer())
    if recipe is not None or overrides:
        raise ConfigError(f"{path} is an exported folder, which needs neither a recipe nor --set: leave them out")
    with _named(path):
        config = TinyGPTVConfig.from_pretrained(path)
        processor = TinyGPTVProcessor.from_pretrained(path, trust_remote_code=False)
    weights = open_model_weights(path, "trained").stored
    with _named(path):
        _check_sizes(config, len(weights))
        shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    check_weights(shapes, Source(path, weights, []), "The folder is of another version or damaged: export it again")
    return weights, config, processor


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a folder's JSON files into one line; transformers raises errors of any kind."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(f"{folder}: a damaged exported folder ({reason}); export or copy it again") from None


def _check_sizes(config: TinyGPTVConfig, tensors: int) -> None:
    """Check the numbers that modules are built by, before shapes can be compared: a layer has at least one tensor.

    Args:
        config: of the folder.
        tensors: the number of its tensors.

    Raises:
        ValueError: one is no size, or far too large.
    """
    layers = min(tensors, MOST_LAYERS)
    for part in ("vision_config", "qformer_config", "text_config"):
        for name in _SIZES:
            size = getattr(getattr(config, part), name, 1)
            if not (isinstance(size, int) and 1 <= size <= (layers if name == "num_hidden_layers" else _LARGEST)):
                raise ValueError(f"{part}.{name} of config.json is {size!r}")


def _base_of(adapter: Path) -> Path:
    """Return the exported folder that peft has trained an adapter on."""
    opened = open_any(adapter)
    found = read_adapter(adapter, original_source(opened.stored, adapter).weights)
    if found.base_folder is None:
        raise WeightsError(
            f"{adapter}: an adapter of peft on {found.base or 'a model that it does not name'}, which is not here; "
            f"name the model's folder, and the adapter with --adapter {adapter}"
        )
    return found.base_folder


def _open_adapter(folder: Path, model: Path) -> PeftAdapter:
    """Open an adapter for a model.

    Raises:
        WeightsError: it is none of peft's, or its LoRA is already merged into the model.
    """
    if not is_adapter(folder):
        raise WeightsError(
            f"{folder} is no folder of peft's with {ADAPTER_CONFIG}; other trained weights are themselves the MODEL"
        )
    opened, notes = open_any(folder), model / PROVENANCE
    base = read_json(notes) if notes.is_file() else {}
    if base.get("lora") == "merged" and base.get("trained") == opened.notes.get("trained"):
        raise WeightsError(
            f"{model} already has the LoRA of {folder} merged, which would count twice; leave --adapter out, or name "
            "the model exported with --drop-lora"
        )
    return read_adapter(folder, original_source(opened.stored, folder).weights)


def _quantize(
    model: TinyGPTVForConditionalGeneration,
    weights: Mapping[str, Stored],
    bits: int,
    device: torch.device,
    vision: bool,
) -> None:
    """Replace each linear layer of the blocks by a quantized one, one after the other."""
    dtype = model.dtype
    for weight, layer in list(linear_layers(model, vision=vision)):
        name = weight.removesuffix(".weight")
        bias = None if layer.bias is None else weights[f"{name}.bias"].read().to(device, dtype)
        made = quantized_linear(weights[weight].read(), bias, bits, dtype, device)
        model.set_submodule(name, AdaptedLinear(made, layer) if isinstance(layer, LoRALinear) else made)
        return_freed_memory()
    keep_vit_weights_inside(model, vision=vision)


def _fill(model: nn.Module, weights: Mapping[str, Stored], device: torch.device) -> None:
    """Read every parameter that is still on the meta device, one at a time, in its dtype."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = convert_tensor(name, weights[name].read(), parameter.dtype)
            _place(model, name, nn.Parameter(value.to(device), requires_grad=False))
            del value
            return_freed_memory()
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            if not name.endswith(KEY_BIAS):
                raise WeightsError(f"no file has {name}; install the version of timm that requirements.txt names")
            _place(model, name, torch.zeros_like(buffer, device=device))


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(value, nn.Parameter):
        module._parameters[leaf] = value
    else:
        module._buffers[leaf] = value
