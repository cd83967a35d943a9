"""The export of the whole model as a self-contained folder that transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import GenerationConfig

from tinygptv_ds.files import whole_folder
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.weights.export.model_card import LICENSE, model_card
from tinygptv_ds.weights.export.scores import read_scores, scores_of_run
from tinygptv_ds.weights.merge_lora import merge_lora, without_lora
from tinygptv_ds.weights.provenance import write_provenance
from tinygptv_ds.weights.resolve import Resolved
from tinygptv_ds.weights.safetensors_writer import write_weights

LoRAForm = Literal["merged", "kept", "dropped"]


def export_hf(
    resolved: Resolved,
    out: Path,
    *,
    dtype: torch.dtype,
    lora: LoRAForm = "merged",
    scores: Sequence[Path] = (),
    license_id: str = LICENSE,
) -> None:
    """Write weights, configuration, processor, generation settings and model card, completely or not at all.

    Args:
        resolved: the model.
        out: the folder.
        dtype: of all weights.
        lora: "merged" into the weights that it adapts, "kept" apart, or "dropped": the base of `export_adapter`.
        scores: files of evaluation results for the model card; without any, those of the run's last step.
        license_id: of the weights, as the Hub names it.

    Raises:
        WeightsError: weights are missing or do not fit, or a value does not fit into `dtype`.
    """
    results = read_scores(scores or scores_of_run(resolved.opened.path, resolved.recipe))
    weights, config = resolved.weights(), copy.deepcopy(resolved.config)
    if config.lora_r and lora != "kept":
        weights = merge_lora(weights, config) if lora == "merged" else without_lora(weights)
        config.lora_r = 0
    config.dtype = dtype
    config.architectures = ["TinyGPTVForConditionalGeneration"]
    processor = TinyGPTVProcessor.for_model(config, resolved.tokenizer())
    with whole_folder(out) as partial:
        write_weights(partial, weights, dtype=dtype)
        config.save_pretrained(partial)  # with the code of the model, as the processor is with its own
        generation_config(config, processor).save_pretrained(partial)
        processor.save_pretrained(partial)
        notes = {**resolved.shareable_provenance(), "lora": lora if resolved.config.lora_r else "none"}
        write_provenance(partial, notes)
        recipe = yaml.safe_dump(notes["recipe"], sort_keys=False, allow_unicode=True)
        (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
        card = model_card(out.name, resolved.recipe, config, notes, results, license_id)
        (partial / "README.md").write_text(card, encoding="utf-8")


def generation_config(config: TinyGPTVConfig, processor: TinyGPTVProcessor) -> GenerationConfig:
    """Return greedy settings that stop where answers end in training; the original stops at leftover ids of LLaMA."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=processor.stop_ids(),
        pad_token_id=config.pad_token_id,
        do_sample=False,
        max_new_tokens=300,
    )
