"""The original TinyGPT-V's own names, as in its `checkpoint_N.pth` and in the released files of stages 1 to 4.

Such a file holds what was trained, and a buffer, under "model". With LoRA, peft puts `base_model.model.` into the
names; from 0.3 on it adds the adapter's name (`lora_A.default.weight`), later also `base_layer`. All are read, and so
are the names of an adapter that peft has on the whole model (`base_model.model.language_model. ...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.kinds import without_wrappers
from tinygptv_ds.weights.layouts import blip2
from tinygptv_ds.weights.source import Source, rename_all

# The one buffer that the original saves: positions of BERT's text, which nothing computes with. int64 [1, 512].
BUFFER = "Qformer.bert.embeddings.position_ids"
BUFFER_LENGTH = 512

_WHOLE_IN_PEFT = (
    r"base_model\.model\.(?=(?:language_model|llama_proj2?|qformer|visual_encoder|ln_vision)\.|query_tokens$)"
)
_PEFT_LAYER = re.compile(r"\.base_layer\.(?=(weight|bias)$)")
_LLM = re.compile(r"^(llama_model\.(base_model\.model\.)?|base_model\.model\.|language_model\.)")
_ADAPTER_NAME = re.compile(r"\.lora_([AB])\.(?!weight$)[^.]+\.weight$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.[^.]+)*$")
_COPIED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")


def canonical_name(name: str) -> str | None:
    """Return the canonical name of one of the original's tensors, or None for one that nothing needs."""
    name = re.sub(rf"^{_WHOLE_IN_PEFT}", "", without_wrappers(name))
    if name.startswith("Qformer."):
        return blip2.canonical_name(name)
    if ".original_module." in name:  # peft's copy of a module from before the training
        return None
    name = _LLM.sub("language_model.", _PEFT_LAYER.sub(".", _COPIED_MODULE.sub(".", name)))
    return _MAGNITUDE.sub(".lora_magnitude_vector", _ADAPTER_NAME.sub(r".lora_\1.weight", name))


def original_name(name: str, *, lora: bool) -> str:
    """Return the original's name of a canonical one, with peft's prefix if the model has LoRA."""
    if name.startswith("qformer."):
        return blip2.original_name(name)
    return re.sub(r"^language_model\.", "llama_model.base_model.model." if lora else "llama_model.", name)


def original_source(stored: Mapping[str, Stored], path: Path, outside: Sequence[str] = ()) -> Source:
    """Return the tensors of one of the original's files under canonical names."""
    return rename_all(stored, outside, canonical_name, path)


def spelling(names: Iterable[str]) -> str:
    """Describe how the names of trained weights are spelled."""
    names = list(names)
    if any(name.startswith("language_model.") for name in names):
        return "canonical names"
    if any(re.match(_WHOLE_IN_PEFT, name) for name in names):
        return "peft's names of an adapter on the whole model"
    if any(".base_layer." in name or re.search(r"\.lora_A\.[^.]+\.weight$", name) for name in names):
        return "the original's names, LoRA as peft spells it from 0.3 on"
    if any(".lora_A." in name for name in names):
        wrapped = any(".base_model." in name or name.startswith("base_model.") for name in names)
        return f"the original's names, LoRA as peft 0.2 spells it{'' if wrapped else ', without its wrapper'}"
    return "the original's names, without LoRA"
