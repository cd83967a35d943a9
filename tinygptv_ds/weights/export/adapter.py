"""The export of trained weights as an adapter in peft's own format, which belongs to an exported base model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.files import whole_folder
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.weights.assemble import meta_model
from tinygptv_ds.weights.io import listing
from tinygptv_ds.weights.layouts.tinygptv import canonical_name
from tinygptv_ds.weights.peft_adapter import ADAPTER_WEIGHTS
from tinygptv_ds.weights.provenance import write_provenance
from tinygptv_ds.weights.resolve import Resolved
from tinygptv_ds.weights.safetensors_writer import write_file

# What the published stages train next to LoRA: the projections and all of Phi's norms. peft saves modules whole, so
# also the norms' biases, which no stage trains.
_MODULES_TO_SAVE = (
    "llama_proj",
    "llama_proj2",
    "input_layernorm",
    "q_layernorm",
    "k_layernorm",
    "post_layernorm",
    "final_layernorm",
)
_README = """# {name}

LoRA, projections and norms of a TinyGPT-V as an adapter of peft. It belongs to the same model without LoRA:

```bash
tinygptv-ds export RUN --drop-lora --dtype fp32 --out BASE
```

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("BASE", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{name}")
```

The verbs of tinygptv_ds and `model.init_from` of a recipe read this folder, too.
"""


def export_adapter(resolved: Resolved, out: Path, *, dtype: torch.dtype | None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` with the names that the installed peft gives.

    Args:
        resolved: the model.
        out: the folder; it also gets the provenance of `export_trained`, and a README.
        dtype: of the weights; None keeps each one's own.

    Raises:
        WeightsError: the model has no LoRA, or trained weights outside of LoRA, projections and norms.
    """
    if not resolved.config.lora_r:
        raise WeightsError(
            f"{resolved.opened.path} has no LoRA, which an adapter of peft needs; export it with --to trained"
        )
    config = _lora_config(resolved.config)
    names = _peft_names(resolved.config, config)
    others = resolved.trained.weights.keys() - names.keys()
    if others:
        raise WeightsError(
            f"{resolved.opened.path} also trained {listing(others)}, which this adapter of peft has no place for; "
            "export it with --to trained"
        )
    weights = resolved.weights()
    with whole_folder(out) as partial:
        write_file(partial / ADAPTER_WEIGHTS, {names[name]: weights[name] for name in names}, dtype=dtype)
        config.save_pretrained(str(partial))
        write_provenance(partial, resolved.provenance())
        (partial / "README.md").write_text(_README.format(name=out.name), encoding="utf-8")


def _lora_config(config: TinyGPTVConfig) -> LoraConfig:
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # annotated as an int, but a factor like any other
        lora_dropout=config.lora_dropout,
        # A pattern, because the Q-Former has layers called `dense`, too.
        target_modules=rf"language_model\..*\.({'|'.join(config.lora_targets)})",
        modules_to_save=list(_MODULES_TO_SAVE),
        inference_mode=True,
    )


def _peft_names(config: TinyGPTVConfig, lora_config: LoraConfig) -> dict[str, str]:
    """Return peft's name in the file of each tensor of the adapter by canonical name, from a model without memory."""
    plain = copy.deepcopy(config)
    plain.lora_r = 0
    with torch.device("meta"):
        wrapped = get_peft_model(meta_model(plain), copy.deepcopy(lora_config), low_cpu_mem_usage=True)
    names: dict[str, str] = {}
    for name in get_peft_model_state_dict(wrapped):
        canonical = canonical_name(name)
        assert canonical is not None, name
        names[canonical] = name
    return names
