"""Parts of a model: what was trained alone, the same for the original's code, and the language model alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.files import whole_file, whole_folder
from tinygptv_ds.models.parameters import lora
from tinygptv_ds.weights.detect import Opened
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.layouts.expected_shapes import expected_shapes, in_order
from tinygptv_ds.weights.layouts.original import BUFFER, BUFFER_LENGTH, original_name
from tinygptv_ds.weights.layouts.phi2 import to_layout
from tinygptv_ds.weights.layouts.phi_config import save_config
from tinygptv_ds.weights.merge_lora import merge_lora
from tinygptv_ds.weights.model_folder import write_model
from tinygptv_ds.weights.provenance import hashed, shareable, write_provenance
from tinygptv_ds.weights.resolve import Resolved
from tinygptv_ds.weights.safetensors_writer import convert_tensor, stored_dtype, write_weights
from tinygptv_ds.weights.source import Source, check_weights

_PHI_README = """# {name}

The language model of a TinyGPT-V, LoRA merged, weights in the {layout} layout ({keys}).

It is no plain Phi: queries and keys pass a LayerNorm (`qk_layernorm` of transformers' Phi does it too), and every
attention output passes an RMSNorm of eps 1e-6 before it is added (`post_layernorm`), which transformers' Phi does not
know. Loaded there, it warns of unexpected `post_layernorm` weights and **gives nonsense**. What can load it:

- tinygptv_ds, as `model.phi` of a recipe, norms included;
{original}"""
_FOR_ORIGINAL = "- the original TinyGPT-V with its own Phi module, as `llama_model`.\n"


def export_adapter(resolved: Resolved, out: Path, *, dtype: torch.dtype | None) -> None:
    """Write what was trained as a run's `model/` folder has it, with the hashes of the base that it goes on.

    Args:
        resolved: the model.
        out: the folder; its provenance.json says where the base lies.
        dtype: of the weights; None keeps each one's own.
    """
    with whole_folder(out) as partial:
        write_model(partial, resolved.trained.weights, resolved.config, hashed(resolved), dtype=dtype)


def export_phi(resolved: Resolved, out: Path, *, layout: str, dtype: torch.dtype) -> None:
    """Write the language model as a Phi folder, LoRA merged and the added norms with it.

    Args:
        resolved: the model.
        out: the folder.
        layout: "fused" or "split".
        dtype: of the weights.
    """
    weights, config = resolved.weights(), resolved.config
    merged = merge_lora(weights, config) if config.lora_r else weights
    text = config.text_config
    with whole_folder(out) as partial:
        write_weights(partial, to_layout(merged, text.num_attention_heads, layout), dtype=dtype)
        save_config(text, partial, dtype)
        resolved.tokenizer().save_pretrained(partial)
        write_provenance(partial, shareable(resolved))
        keys = "`query_key_value`" if layout == "fused" else "`q_proj`, `k_proj`, `v_proj`"
        original = _FOR_ORIGINAL if layout == "fused" else ""
        readme = _PHI_README.format(name=out.name, layout=layout, keys=keys, original=original)
        (partial / "README.md").write_text(readme, encoding="utf-8")


def export_original(opened: Opened, trained: Source, out: Path, *, dtype: torch.dtype | None) -> None:
    """Write a `.pth` as the original's code saves it: the same names, and under "model".

    Args:
        opened: where the weights lie; what a file of the original's holds besides (optimizer, epoch, ...) goes along.
        trained: the weights.
        out: the file.
        dtype: of the weights; None keeps each one's own.

    Raises:
        WeightsError: the weights are not complete.
    """
    expected = expected_shapes("trained", trained)
    check_weights(expected, trained, "Only complete trained weights are of use to the original's code")
    with_lora = any(map(lora, trained.weights))
    state = {
        original_name(name, lora=with_lora): _read(name, trained.weights[name], dtype)
        for name in in_order(trained.weights, expected)
    }
    state[BUFFER] = torch.arange(BUFFER_LENGTH)[None]
    content = {"model": dict(sorted(state.items(), key=_place)), **_materialised(_of_the_original(opened))}
    with whole_file(out) as partial:
        torch.save(content, partial)


# The order of the parts in the original's model: its own parameters first, then its modules as it makes them.
_PARTS = ("query_tokens", "llama_model.", "visual_encoder.", "ln_vision.", BUFFER, "Qformer.", "llama_proj")


def _place(item: tuple[str, Tensor]) -> int:
    return next(number for number, part in enumerate(_PARTS) if item[0].startswith(part))


def _of_the_original(opened: Opened) -> Mapping[str, Any]:
    """What lies next to "model" in one of the original's files."""
    return opened.notes if opened.path.is_file() else {}


def _materialised(content: Any) -> Any:
    """The same content with every stored tensor read."""
    if isinstance(content, Stored):
        return content.read()
    if isinstance(content, Mapping):
        return {key: _materialised(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(_materialised, content))
    return content


def _read(name: str, stored: Stored, dtype: torch.dtype | None) -> Tensor:
    return convert_tensor(name, stored.read(), stored_dtype(stored, dtype)).contiguous()
