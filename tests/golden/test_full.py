"""The whole model on every reference case, in packed layout: image embeddings, loss, gradients, greedy tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.golden_model import (
    HIDDEN,
    LOSS,
    assert_gradients,
    full_config,
    full_model,
    pack_layout,
    read,
    tensors,
)
from torch import Tensor
from transformers import AutoTokenizer

from tinygptv_ds.evaluation.answer_scores import as_decoded
from tinygptv_ds.generate.candidates import CandidateLosses, Choice, candidate_losses
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import lora, norms, projections, train_only, weight_decay_groups
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.detokenize import clean_up, decode
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.text import wrap
from tinygptv_ds.weights.layouts.tinygptv import canonical_name, original_name

PARTS = {
    "visual_encoder": "visual_encoder",
    "ln_vision": "ln_vision",
    "qformer": "qformer",
    "query_tokens": "query_tokens",
    "language_model": "llama_model",
}


def folder_of(golden: Path, name: str) -> Path:
    return golden / "full" / name


def pixels(expected: dict[str, Tensor]) -> Tensor | None:
    """Return the images as `[N, 3, S, S]`; several images per sample are stored as `[B, N, 3, S, S]`."""
    image = expected.get("image")
    return None if image is None else image.flatten(0, -4)


def train_as_published(model: TinyGPTVForConditionalGeneration) -> list[str]:
    parts = [projections, norms, lora] if model.config.lora_r else [projections, norms]
    return train_only(model, *parts)


def test_case(training_case: Path) -> None:
    case, expected = read(training_case), tensors(training_case.with_suffix(".safetensors"))
    model = full_model(training_case.parents[1])
    train_as_published(model)
    packed = pack_layout(case, expected["attention_mask"], expected["targets"], model.config.image_token_id)
    images = pixels(expected)
    if "image_embeds" in expected:
        torch.testing.assert_close(model.project(model.encode_vision(images)), expected["image_embeds"], **HIDDEN)
    out = model(pixel_values=images, **packed.inputs)
    loss = out.token_losses.mean() + out.anchor
    torch.testing.assert_close(loss, expected["loss"], **LOSS)
    assert loss.item() == pytest.approx(case["loss"], rel=LOSS["rtol"])
    gradients = training_case.with_name(f"{training_case.stem}_grads.safetensors")
    if gradients.is_file():
        loss.backward()
        assert_gradients(model, tensors(gradients))


def test_greedy(greedy_prompts: Path) -> None:
    case, expected = read(greedy_prompts), tensors(greedy_prompts.with_suffix(".safetensors"))
    folder = greedy_prompts.parents[1]
    model = full_model(folder)
    pad = model.config.pad_token_id
    ids = [
        [model.config.image_token_id if isinstance(item, dict) else pad if item == "pad" else item for item in row]
        for row in case["layout"]
    ]
    out = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=expected["attention_mask"],
        pixel_values=pixels(expected),
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
    )
    assert out[:, len(ids[0]) :].tolist() == expected["new_tokens"].tolist() == case["new_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder / read(folder / "config.json")["tokenizer"])
    decoded = [as_decoded(clean_up(decode(tokenizer, row))) for row in case["new_tokens"]]
    assert decoded == case["answers"] and len(decoded) == len(case["texts"])
    with torch.no_grad():
        embedded = model.embed(torch.tensor(ids), pixels(expected))
    for embeds in (expected["inputs_embeds"], embedded):  # the latter is how tinygptv_ds/generate generates
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=expected["attention_mask"],
            max_new_tokens=case["max_new_tokens"],
            do_sample=False,
        )
        assert out.tolist() == case["new_tokens"]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_candidates(candidates_case: Path, batch_size: int) -> None:
    """Each candidate answer has its own loss, independent of the batch, and the lowest wins."""
    case, folder = read(candidates_case), candidates_case.parents[1]
    for b, found in enumerate(losses_of(case, folder, candidates_case, batch_size)):
        assert found.means.tolist() == pytest.approx(case["per_sample_losses"][b], rel=LOSS["rtol"])
        assert rank(found.means, case["num_cand"][b]) == case["per_sample_ranks"][b]


def test_candidates_as_the_original_ranks_them(candidates_case: Path) -> None:
    """The original takes one mean per batch, so all questions of a batch get the same answer."""
    case, folder = read(candidates_case), candidates_case.parents[1]
    means, tokens = zip(
        *((each.means, each.tokens) for each in losses_of(case, folder, candidates_case, 8)), strict=True
    )
    means, tokens = torch.stack(means), torch.stack(tokens)
    means = (means * tokens).sum(0) / tokens.sum(0)
    assert means.tolist() == pytest.approx(case["original_batch_mean_losses"], rel=LOSS["rtol"])
    assert [rank(means, case["num_cand"][0])] == case["original_batch_ranks"]


def losses_of(case: dict, folder: Path, path: Path, batch_size: int) -> Iterator[CandidateLosses]:
    config = read(folder / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder / config["tokenizer"])
    template = config.get("prompt_template") if config.get("chat_template") else None
    model = full_model(folder)
    processor = TinyGPTVProcessor.for_model(model.config, tokenizer)
    images = pixels(tensors(path.with_suffix(".safetensors")))
    candidates = zip(*case["candidates_by_index"], strict=True)
    choices = [
        Choice(Prompt((wrap(template, question),), (image.numpy(),)), c)
        for question, image, c in zip(case["texts"], images, candidates, strict=True)
    ]
    return candidate_losses(
        model,
        processor,
        choices,
        end_sym=config["end_sym"],
        max_prompt_tokens=config["max_context_len"],
        max_answer_tokens=config["max_txt_len"],
        batch_size=batch_size,
    )


def rank(means: torch.Tensor, offered: int) -> list[int]:
    """Return the candidates' numbers, the likeliest first; those from number `offered` on come last."""
    allowed = means.clone()
    allowed[offered:] = torch.inf
    return allowed.argsort(stable=True).tolist()


def test_trainable_names(golden: Path, full_name: str) -> None:
    """The trained, frozen, decayed and saved parameters are exactly the original's, by name."""
    folder = folder_of(golden, full_name)
    expected = read(folder / "trainable.json")
    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(full_config(read(folder / "config.json"), folder))
    trained = train_as_published(model)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert {name: shapes[name] for name in trained} == {
        canonical_name(entry["name"]): entry["shape"] for entry in expected["trainable"]
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["trainable_count"]
    assert shapes.keys() - set(trained) == {canonical_name(name) for name in expected["frozen"]}
    assert_groups(model, expected["optimizer_groups"])


def assert_groups(model: TinyGPTVForConditionalGeneration, expected: list[dict]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = weight_decay_groups(model, max(group["weight_decay"] for group in expected))
    ours: dict[float, set[str]] = {}
    for group in groups:
        ours.setdefault(group["weight_decay"], set()).update(names[p] for p in group["params"])
    theirs = {g["weight_decay"]: [canonical_name(name) for name in g["params"]] for g in expected if g["params"]}
    assert ours == {d: set(group) for d, group in theirs.items()}


def test_names_there_and_back(golden: Path, full_name: str) -> None:
    """Every name that the original saves is recovered from the canonical one."""
    expected = read(folder_of(golden, full_name) / "trainable.json")
    with_lora = any("lora_" in name for name in expected["checkpoint_keys"])
    assert expected["checkpoint_keys"]
    for name in expected["checkpoint_keys"]:
        canonical = canonical_name(name)
        assert canonical is None or original_name(canonical, lora=with_lora) == name


def test_full_size_counts(golden: Path) -> None:
    """Of every stage: trained and frozen values, in all and by part."""
    stages = read(golden / "full/trainable_full_size.json")
    assert stages
    sizes = {(stage["lora_r"], stage["image_size"]) for stage in stages.values()}
    for lora_r, image_size in sizes:
        of_size = [s for s in stages.values() if (s["lora_r"], s["image_size"]) == (lora_r, image_size)]
        assert_counts(lora_r, image_size, of_size)


def assert_counts(lora_r: int, image_size: int, stages: list[dict]) -> None:
    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(
            TinyGPTVConfig(lora_r=lora_r, vision_config={"image_size": image_size})
        )
    train_as_published(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    for stage in stages:
        assert sum(trained.values()) == stage["trainable_total"]
        assert len(trained) == stage["trainable_tensors"]
        assert total - sum(trained.values()) == stage["frozen_total"]
        for part, theirs in PARTS.items():
            ours = sum(p.numel() for n, p in model.named_parameters() if n == part or n.startswith(f"{part}."))
            assert ours == stage["modules"][theirs]
        groups = {"lora": lora, "norm_weights": norms, "llama_proj": is_first, "llama_proj2": is_second}
        counts = {group: sum(n for name, n in trained.items() if part(name)) for group, part in groups.items()}
        assert counts == stage["by_group"]


def is_first(name: str) -> bool:
    return name.startswith("llama_proj.")


def is_second(name: str) -> bool:
    return name.startswith("llama_proj2.")


@pytest.mark.parametrize("lora_r", [0, 64])
def test_full_size_checkpoint_names(golden: Path, lora_r: int) -> None:
    expected = read(golden / "full/checkpoint_keys_full_size.json")
    key = "with_adapters" if lora_r else "stage1_without_adapters"
    with torch.device("meta"):
        model = TinyGPTVForConditionalGeneration(TinyGPTVConfig(lora_r=lora_r))
    trained = train_as_published(model)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    theirs = {canonical_name(entry["name"]): entry["shape"] for entry in expected[key]}
    theirs.pop(None)
    assert {name: shapes[name] for name in trained} == theirs
