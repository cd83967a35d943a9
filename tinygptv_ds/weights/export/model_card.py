"""The README.md of an exported model: what it is, its use, its training and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tinygptv_ds import __version__
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.models.configuration import PHI_2, TinyGPTVConfig
from tinygptv_ds.weights.export.scores import measures

LICENSE = "bsd-3-clause"  # of the published TinyGPT-V

_USAGE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)

image = {"type": "image", "path": "image.jpg"}  # or "image": a PIL image, or "url"
messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is in the image?"}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
new_tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.answers(new_tokens)[0])
```

It needs torch, transformers and timm; the code is in this folder. A process that has imported
`tinygptv_ds.models.tinygptv` uses the classes of that package instead; the results are the same."""


def model_card(
    folder: str,
    recipe: Recipe,
    config: TinyGPTVConfig,
    notes: Mapping[str, Any],
    scores: Mapping[str, dict],
    license_id: str = LICENSE,
) -> str:
    """Return the Markdown text with the header that model hubs read.

    Args:
        folder: the model's name.
        recipe: of the stage that trained it.
        config: the model's.
        notes: its provenance, with the hashes.
        scores: evaluation results by name.
        license_id: of the weights, as the Hub names it.
    """
    header = yaml.safe_dump(_metadata(folder, recipe, config, scores, license_id), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{header}---",
        f"# {folder}",
        f"TinyGPT-V ([arXiv 2312.16862](https://arxiv.org/abs/2312.16862)) after stage {recipe.stage} of its training, "
        f"exported by tinygptv_ds {__version__}. {_build(config, notes)}",
        "## Use",
        _USAGE.replace("{folder}", folder),
        "## Training",
        _training(recipe),
        "The whole recipe is in `recipe.yaml`, hashes of all that went in are in `provenance.json`:",
        _table(("weights", "file", "SHA-256"), _hash_rows(notes)),
        "## Scores",
        _scores(scores),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(
    folder: str, recipe: Recipe, config: TinyGPTVConfig, scores: Mapping[str, dict], license_id: str
) -> dict[str, Any]:
    """Return the header of the card in the terms of the Hub."""
    metadata: dict[str, Any] = {
        "license": license_id,
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["tinygptv", "vision-language-model", "custom_code"],
        "base_model": _base_models(config),
        "datasets": list(dict.fromkeys(dataset.name for dataset in recipe.data.used)),
    }
    results = [_result(name, result) for name, result in scores.items() if measures(result)]
    if results:
        metadata["metrics"] = sorted({metric["type"] for result in results for metric in result["metrics"]})
        metadata["model-index"] = [{"name": folder, "results": results}]
    return {key: value for key, value in metadata.items() if value}


def _base_models(config: TinyGPTVConfig) -> list[str]:
    """Return the Hub's names of the published base models, by the sizes that they alone have here."""
    text, vision = config.text_config, config.vision_config
    phi = all(getattr(text, name) == PHI_2[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    eva = (vision.hidden_size, vision.num_hidden_layers) == (1408, 39)
    return ["microsoft/phi-2"] * phi + ["Salesforce/blip2-flan-t5-xxl"] * eva


def _result(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    benchmark = str(result.get("benchmark", name))
    task = "image-text-to-text" if benchmark.startswith("ref") else "visual-question-answering"
    return {
        "task": {"type": task},
        "dataset": {"name": name, "type": benchmark},
        "metrics": [{"type": measure, "value": value} for measure, value in measures(result).items()],
    }


def _build(config: TinyGPTVConfig, notes: Mapping[str, Any]) -> str:
    vision, text = config.vision_config, config.text_config
    adapted = {
        "merged": "LoRA is merged into it",
        "kept": f"LoRA of rank {config.lora_r} is next to it",
        "dropped": "its LoRA is left out: it is the base for the adapter of peft from the same weights",
        "none": "it has no LoRA",
    }[notes["lora"]]
    return (
        f"EVA ViT of {vision.num_hidden_layers} blocks at {vision.image_size} pixels, Q-Former with "
        f"{config.num_query_tokens} queries, Phi of {text.num_hidden_layers} layers; {adapted}. "
        f"Questions are asked in the template {_code(config.prompt_template or '{}')}, answers end with "
        f"{_code(config.end_sym)}."
    )


def _training(recipe: Recipe) -> str:
    train, optimizer = recipe.train, recipe.optimizer
    datasets = ", ".join(f"{d.name} ({d.weight:g})" for d in recipe.data.used)
    rows = [
        ("optimizer steps", f"{train.total_steps:,} of {train.batch_size} samples"),
        (
            "learning rate",
            f"{optimizer.warmup_lr:g} to {optimizer.lr:g} in {optimizer.warmup_steps} steps, then towards "
            f"{optimizer.min_lr:g}",
        ),
        ("LoRA", f"rank {recipe.model.lora_r}, alpha {recipe.model.lora_alpha:g}" if recipe.model.lora_r else "none"),
        ("seed", str(recipe.seed)),
        ("datasets (shares)", datasets),
    ]
    return _table(("", ""), rows)


def _hash_rows(notes: Mapping[str, Any]) -> list[tuple[str, ...]]:
    parts = {**{part: base["files"] for part, base in notes["base"].items()}, "trained": notes["trained"]}
    return [(part, name, f"`{digest}`") for part, files in parts.items() for name, digest in files.items()]


def _scores(scores: Mapping[str, dict]) -> str:
    rows = [
        (name, measure, f"{value:.4g}")
        for name, result in scores.items()
        for measure, value in measures(result).items()
    ]
    return _table(("result", "measure", "value"), rows) if rows else "None were given."


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines: list[tuple[str, ...]] = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{text!r}`" if "\n" in text else f"`{text}`"
