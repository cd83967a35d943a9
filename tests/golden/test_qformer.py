"""The Q-Former gives the original's hidden states, layer by layer."""

from pathlib import Path

import torch
from helpers.golden_model import HIDDEN, fill, qformer_config, read, tensors
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tinygptv_ds.weights.layouts import blip2


class QFormer(nn.Module):
    """The two parts that BLIP-2's file supplies, under their canonical names."""

    def __init__(self, config: Blip2QFormerConfig, queries: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, queries, config.hidden_size))
        self.qformer = Blip2QFormerModel(config)


def test_sizes_from_shapes(golden: Path) -> None:
    config = read(golden / "qformer/config.json")
    source = blip2.blip2_source(golden / "qformer/weights.safetensors")
    found = blip2.qformer_config(source, config["num_attention_heads"])
    sizes = qformer_config(config, config["encoder_width"])
    sizes.pop("cross_attention_frequency")  # what it means is compared below: with one such layer several are alike
    for name, size in sizes.items():
        assert getattr(found, name) == size, name
    assert [i for i in range(found.num_hidden_layers) if i % found.cross_attention_frequency == 0] == config[
        "cross_attention_layers"
    ]


def test_forward(golden: Path) -> None:
    config, expected = read(golden / "qformer/config.json"), tensors(golden / "qformer/forward.safetensors")
    source = blip2.blip2_source(golden / "qformer/weights.safetensors")
    model = QFormer(blip2.qformer_config(source, config["num_attention_heads"]), config["num_query_tokens"]).eval()
    fill(model, source)
    images = expected["encoder_hidden_states"]
    with torch.no_grad():
        out = model.qformer(
            query_embeds=model.query_tokens.expand(len(images), -1, -1),
            encoder_hidden_states=images,
            output_hidden_states=True,
        )
    torch.testing.assert_close(out.last_hidden_state, expected["last_hidden_state"], **HIDDEN)
    assert len(out.hidden_states) == config["num_hidden_layers"] + 1
    for i, hidden in enumerate(out.hidden_states):
        torch.testing.assert_close(hidden, expected[f"hidden_state_{i}"], **HIDDEN)
