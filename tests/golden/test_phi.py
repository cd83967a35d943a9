"""Phi with TinyGPT-V's norms: logits, loss, gradients and greedy tokens of the original, padded and packed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_model import (
    HIDDEN,
    LOSS,
    assert_gradient,
    assert_gradients,
    fill,
    language_config,
    pack,
    read,
    tensors,
)
from torch import Tensor

from tinygptv_ds.models.attention import causal_mask, make_layout
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.source import Source


@pytest.fixture
def model(golden: Path) -> TinyGPTVForConditionalGeneration:
    return load_language_model(golden / "phi")


def load_language_model(folder: Path) -> TinyGPTVForConditionalGeneration:
    from tinygptv_ds.weights.layouts.tinygptv import canonical_name

    config = read(folder / "config.json")
    model = TinyGPTVForConditionalGeneration(language_config(config, folder)).eval()
    path = folder / "weights.safetensors"
    weights: dict[str, Stored] = {}
    for name, stored in open_weights(path).items():  # with and without the prefix of the whole model
        canonical = canonical_name(name if name.startswith("llama_model.") else f"llama_model.{name}")
        weights[canonical.removeprefix("language_model.")] = stored
    fill(model.language_model, Source(path, weights, []))
    return model


def hidden_states(model: TinyGPTVForConditionalGeneration, embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """Return what the reference lists: the input, every block's output but the last's, and the final norm's output."""
    seen = [embeds]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in model.language_model.model.layers
    ]
    positions = torch.arange(embeds.shape[1]).expand(embeds.shape[:2])
    final = model.language_model.model(embeds, positions, mask=causal_mask(mask, embeds.shape[1]))
    for hook in hooks:
        hook.remove()
    return [*seen[:-1], final]


def inputs(model: TinyGPTVForConditionalGeneration, expected: dict) -> tuple[Tensor, Tensor]:
    embeds = expected.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(expected["input_ids"]).detach()
    mask = expected.get("attention_mask")
    return embeds.clone().requires_grad_(), torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask


def labels_of(expected: dict) -> Tensor:
    """Return the labels of a case; if none are stored, every token is a target."""
    return expected["labels"] if "labels" in expected else expected["input_ids"]


def padded_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients_of(folder: Path, case: str, expected: dict) -> dict:
    """Return the gradients, from a file next to the case or from the case's own."""
    adjacent = folder / f"{case}_grads.safetensors"
    return expected | (tensors(adjacent) if adjacent.is_file() else {})


def test_padded(golden: Path, model: TinyGPTVForConditionalGeneration, phi_case: str) -> None:
    expected = tensors(golden / f"phi/{phi_case}.safetensors")
    embeds, mask = inputs(model, expected)
    states = hidden_states(model, embeds, mask)
    logits = model.language_model.lm_head(states[-1])
    loss = padded_loss(logits, labels_of(expected))
    gradients = gradients_of(golden / "phi", phi_case, expected)
    assert_outputs(model, expected, gradients, embeds, (states, logits, loss), mask)


def assert_outputs(model, expected, gradients, embeds, outputs, mask) -> None:
    states, logits, loss = outputs
    real = mask.bool()
    if "logits" in expected:
        torch.testing.assert_close(logits[real], expected["logits"][real], **HIDDEN)
    listed = sorted(key for key in expected if key.startswith("hidden_state_"))
    for key in listed:
        state = states[int(key.rsplit("_", 1)[1])]
        torch.testing.assert_close(state[real], expected[key][real], **HIDDEN)
    assert_loss_and_gradients(model, expected, gradients, embeds, loss)


def assert_loss_and_gradients(model, expected, gradients, embeds, loss) -> None:
    torch.testing.assert_close(loss, expected["loss"], **LOSS)
    loss.backward()
    if any(key.startswith("grad.") for key in gradients):
        assert_gradients(model, gradients, prefix=prefix_of(gradients))
    if "grad_inputs_embeds" in gradients:
        assert_gradient(embeds.grad, gradients["grad_inputs_embeds"], "inputs_embeds")


def prefix_of(gradients: dict) -> str:
    return "" if any(key.startswith("grad.llama_model.") for key in gradients) else "llama_model."


def test_packed(golden: Path, model: TinyGPTVForConditionalGeneration, phi_case: str) -> None:
    expected = tensors(golden / f"phi/{phi_case}.safetensors")
    assert_packed(model, expected, gradients_of(golden / "phi", phi_case, expected))


def assert_packed(model, expected: dict, gradients: dict) -> None:
    """Check that the samples, concatenated without padding, give the same logits, loss and gradients."""
    embeds, mask = inputs(model, expected)
    packed = pack(mask, labels_of(expected))
    given = packed.inputs
    layout = make_layout(given["cu_seqlens"], given["max_seqlen"], sum(packed.counts), "sdpa")
    hidden = model.language_model.model(embeds[packed.keep], given["position_ids"], layout=layout)
    logits = model.language_model.lm_head(hidden)
    if "logits" in expected:
        torch.testing.assert_close(logits, expected["logits"][packed.keep], **HIDDEN)
    loss = F.cross_entropy(logits[given["target_rows"]], given["targets"])
    assert_loss_and_gradients(model, expected, gradients, embeds, loss)


def test_greedy(golden: Path, model: TinyGPTVForConditionalGeneration, greedy_case: str) -> None:
    """A bias makes some rows end early, even with their first token; these are filled with the end token."""
    expected = tensors(golden / f"phi/{greedy_case}.safetensors")
    if "lm_head_bias" in expected:
        model.language_model.lm_head.bias.data.copy_(expected["lm_head_bias"])
    out = model.generate(
        inputs_embeds=expected["inputs_embeds"],
        attention_mask=expected["attention_mask"],
        max_new_tokens=expected["new_tokens"].shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences.tolist() == expected["new_tokens"].tolist()
    if "first_step_scores" in expected:
        torch.testing.assert_close(out.logits[0], expected["first_step_scores"], **HIDDEN)
