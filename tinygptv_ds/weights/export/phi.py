"""The export of the language model alone, as a Phi folder with LoRA merged."""

from __future__ import annotations

from pathlib import Path

import torch

from tinygptv_ds.files import whole_folder
from tinygptv_ds.weights.layouts.phi2 import save_config, to_layout
from tinygptv_ds.weights.merge_lora import merge_lora
from tinygptv_ds.weights.provenance import write_provenance
from tinygptv_ds.weights.resolve import Resolved
from tinygptv_ds.weights.safetensors_writer import write_weights

_PHI_README = """# {name}

The language model of a TinyGPT-V, LoRA merged, weights in the {layout} layout ({keys}).

It is no plain Phi: queries and keys pass a LayerNorm (`qk_layernorm` of transformers' Phi does it too), and every
attention output passes an RMSNorm of eps 1e-6 before it is added (`post_layernorm`), which transformers' Phi does not
know. Loaded there, it warns of unexpected `post_layernorm` weights and **gives nonsense**. What can load it:

- tinygptv_ds, as `model.phi` of a recipe, norms included;
{original}"""
_FOR_ORIGINAL = "- the original TinyGPT-V with its own Phi module, as `llama_model`.\n"


def export_phi(resolved: Resolved, out: Path, *, layout: str, dtype: torch.dtype) -> None:
    """Write the language model as a Phi folder, with LoRA merged and the added norms included.

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
        write_provenance(partial, resolved.shareable_provenance())
        keys = "`query_key_value`" if layout == "fused" else "`q_proj`, `k_proj`, `v_proj`"
        original = _FOR_ORIGINAL if layout == "fused" else ""
        readme = _PHI_README.format(name=out.name, layout=layout, keys=keys, original=original)
        (partial / "README.md").write_text(readme, encoding="utf-8")
