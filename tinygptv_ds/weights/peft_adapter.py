"""Adapters in peft's format, with LoRA in the variants that peft trains; merging them into their base weights.

| variant | what it adds to a weight W |
|---|---|
| LoRA | `alpha / r * B A`; r and alpha may differ between layers (`rank_pattern`, `alpha_pattern`) |
| rsLoRA | `alpha / sqrt(r) * B A` (arXiv 2312.03732) |
| DoRA | each row of `W + alpha / r * B A` is scaled to a trained length (arXiv 2402.09353) |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.config.paths import local_path
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing, read_json
from tinygptv_ds.weights.merge_lora import merged_weight

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's own names of its two files
ADAPTER_CONFIG = "adapter_config.json"
_LAYER = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")
# Options under which peft computes something else with the same tensors.
_UNREAD = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


@dataclass(frozen=True)
class LoRALayer:
    """LoRA of one linear layer, not read yet.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
        scaling: the factor of `B A`.
        magnitude: of DoRA, the length of each row `[out]`; None without.
    """

    a: Stored
    b: Stored
    scaling: float
    magnitude: Stored | None

    @property
    def rank(self) -> int:
        """LoRA's rank."""
        return self.a.shape[0]

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with this LoRA merged, computed in fp32 as peft does."""
        update = merged_weight(weight, self.a.read(), self.b.read(), self.scaling)
        if self.magnitude is None:
            return update
        return update * (self.magnitude.read().float() / torch.linalg.vector_norm(update, dim=1))[:, None]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter, opened.

    Attributes:
        folder: with its two files.
        base: the model that it was trained on, as its configuration names it; None where it does not.
        layers: LoRA by the canonical name of its layer.
        modules: tensors that replace those of the model, by canonical name.
    """

    folder: Path
    base: str | None
    layers: dict[str, LoRALayer]
    modules: dict[str, Stored]

    @property
    def base_folder(self) -> Path | None:
        """The folder of the model that it was trained on, if it is here."""
        folder = None if self.base is None else local_path(self.base)
        return folder if folder is not None and folder.is_dir() else None

    @property
    def variant(self) -> str:
        """What is peculiar about its LoRA, for a report; "LoRA" for the plain one of one rank and one scale."""
        several = len({(layer.rank, layer.scaling) for layer in self.layers.values()}) > 1
        dora = any(layer.magnitude is not None for layer in self.layers.values())
        return ("DoRA" if dora else "LoRA") + (" of several ranks or scales" if several else "")

    @property
    def alpha(self) -> float | None:
        """The alpha of plain LoRA that computes the same; None where there is none."""
        layer = next(iter(self.layers.values()), None)
        return None if layer is None or self.variant != "LoRA" else layer.scaling * layer.rank


def is_adapter(folder: Path) -> bool:
    """Return whether a folder is one of peft's adapters."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path, weights: Mapping[str, Stored]) -> PeftAdapter:
    """Return the adapter in a folder.

    Args:
        folder: with `adapter_config.json`.
        weights: its tensors by canonical name.

    Raises:
        WeightsError: it is no LoRA, LoRA of a kind that is not read here, or not complete.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    _check_config(config, path)
    parts: dict[str, dict[str, Stored]] = {}
    modules = {}
    for name, stored in weights.items():
        match = _LAYER.fullmatch(name)
        if match:
            parts.setdefault(match[1], {})[match[2]] = stored
        else:
            modules[name] = stored
    layers = {layer: _layer(layer, part, config, folder) for layer, part in parts.items()}
    base = config.get("base_model_name_or_path")
    return PeftAdapter(folder, base if isinstance(base, str) and base else None, layers, modules)


def check_adapter_layers(adapter: PeftAdapter) -> None:
    """Check that LoRA is on layers that a TinyGPT-V has, as far as their names say.

    Raises:
        WeightsError: it is of another model, for example of a Phi with separate q, k and v.
    """
    ours = ("language_model.", "qformer.", "visual_encoder.", "llama_proj.", "llama_proj2.")
    foreign = [
        layer for layer in adapter.layers if not f"{layer}.".startswith(ours) or re.search(r"\.[qkv]_proj$", layer)
    ]
    if foreign:
        kinds = sorted({layer.rpartition(".")[2] for layer in adapter.layers})
        raise WeightsError(
            f"{adapter.folder}: an adapter of peft, not whole weights: LoRA on {', '.join(kinds)} of "
            f"{adapter.base or 'another model'}, which has other layers than TinyGPT-V. Merge it into that model "
            "(peft's merge_and_unload, then save_pretrained) and name the result, e.g. as model.phi"
        )


def merge_adapter(weights: Mapping[str, Stored], adapter: PeftAdapter) -> dict[str, Stored]:
    """Return the weights of a model with an adapter applied; each merged one is computed when it is read.

    Args:
        weights: all weights of the model by canonical name.
        adapter: belongs to them.

    Raises:
        WeightsError: the adapter has layers or shapes that the model has not.
    """
    check_adapter_layers(adapter)
    unknown = [name for name in adapter.modules if name not in weights]
    unknown += [layer for layer in adapter.layers if f"{layer}.weight" not in weights]
    if unknown:
        raise WeightsError(f"{adapter.folder}: the model has no {listing(unknown)}; the adapter is another model's")
    merged = dict(weights)
    for name, stored in adapter.modules.items():
        _check_shape(name, stored.shape, weights[name].shape, adapter.folder)
        merged[name] = stored
    for layer, lora in adapter.layers.items():
        base = merged[f"{layer}.weight"]
        _check_shape(layer, (lora.b.shape[0], lora.a.shape[1]), base.shape, adapter.folder)
        merged[f"{layer}.weight"] = Stored(base.shape, torch.float32, partial(_read_merged, base, lora))
    return merged


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    wrong = [name for name in _UNREAD if config.get(name)]
    if config.get("peft_type") != "LORA":
        wrong.insert(0, f"peft_type {config.get('peft_type')}")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        wrong.append(f"init_lora_weights {config['init_lora_weights']}")
    if wrong:
        raise WeightsError(
            f"{path}: LoRA, rsLoRA and DoRA on linear layers are read, not {', '.join(wrong)}; merge the adapter into "
            "its model with peft's merge_and_unload instead"
        )


def _layer(layer: str, parts: Mapping[str, Stored], config: Mapping[str, Any], folder: Path) -> LoRALayer:
    if not {"A", "B"} <= parts.keys() or len(parts["A"].shape) != 2 or len(parts["B"].shape) != 2:
        raise WeightsError(f"{folder}: LoRA of {layer} needs two matrices, lora_A and lora_B; save the adapter again")
    rank = parts["A"].shape[0]
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    expected = _by_pattern(config.get("rank_pattern"), layer, config.get("r"))
    if parts["B"].shape[1] != rank or expected != rank or not isinstance(alpha, int | float):
        raise WeightsError(
            f"{folder}: LoRA of {layer} is of rank {rank} and {parts['B'].shape[1]}, {ADAPTER_CONFIG} says {expected} "
            f"with lora_alpha {alpha}; the two files do not belong together"
        )
    magnitude = parts.get("magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise WeightsError(f"{folder}: use_dora is {config.get('use_dora')}, but {layer} says otherwise; save it again")
    return LoRALayer(parts["A"], parts["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of a layer's name; the default where none is.

    peft takes patterns as regular expressions; a file's own are not run, so only names with plain dots are read.
    """
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise WeightsError(
                f"{ADAPTER_CONFIG}: the pattern {pattern!r} of ranks or alphas is no plain name of a layer; merge the "
                "adapter into its model with peft's merge_and_unload instead"
            )
        if f".{layer}".endswith(f".{name}"):
            return value
    return default


def _check_shape(name: str, given: tuple[int, ...], expected: tuple[int, ...], folder: Path) -> None:
    if given != expected:
        raise WeightsError(
            f"{folder}: {name} is {list(given)}, in the model {list(expected)}; the adapter belongs to another model"
        )


def _read_merged(base: Stored, lora: LoRALayer) -> Tensor:
    return lora.merged(base.read())
