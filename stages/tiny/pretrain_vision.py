"""A small ViT and Q-Former that can read the digit scenes.

Query i answers for cell i of the scene: which digit is there, in which colour, and where in the cell.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.tiny.pretrain import Training, optimize
from tinygptv_ds.data.sets import digits
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

CELLS = len(digits.CELLS)  # one query each
VALUES, COLORS = list(digits.VALUES), list(digits.COLORS)
WIDTH, PATCH = 96, 14
EVA_VIT = {"image_size": digits.SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": 3}
EVA_VIT |= {"num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
QFORMER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
}
QFORMER |= {"encoder_hidden_size": WIDTH, "cross_attention_frequency": 2, "vocab_size": 1}
QFORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAINING = Training(steps=800, batch=32, lr=3e-3, first=0.35)
POSITION_SCALE = 0.5  # of the position embeddings, next to patch embeddings of about 1
SHARPNESS = 3.0  # of the queries' first look at the patches
BOX_WEIGHT = 10.0  # squared errors of boxes are small next to cross entropies


def crowded_scene(rng: random.Random) -> digits.Scene:
    """Zero to nine digits, repeats allowed: more to learn from per image than in the datasets' scenes."""
    cells = rng.sample(range(CELLS), rng.choice((0, 1, 2, 4, 6, 9, 9, 9)))
    return digits.draw(rng, "train", [(cell, rng.choice(VALUES), rng.choice(COLORS)) for cell in cells])


@dataclass(frozen=True)
class CellTruth:
    """The contents of the cells of N scenes.

    `value` int64 `[N, 9]`, -1 for an empty cell; `color` int64 `[N, 9]`, 0 for an empty cell; `box` fp32 `[N, 9, 4]`,
    the digit's box inside its cell, 0-1.
    """

    value: Tensor
    color: Tensor
    box: Tensor

    def of(self, cell: Tensor) -> CellTruth:
        """The truth for M other objects, each in a cell given by its index, int64 `[M]`."""
        return CellTruth(self.value[:, cell], self.color[:, cell], self.box[:, cell])


def scene_batch(scenes: list[digits.Scene]) -> tuple[Tensor, CellTruth]:
    """Pixels uint8 `[N, 3, 84, 84]` and what is in them."""
    pixels = np.stack([scene.pixels for scene in scenes]).transpose(0, 3, 1, 2)
    shape = len(scenes), CELLS
    value, color, box = np.full(shape, -1), np.zeros(shape, np.int64), np.zeros((*shape, 4), np.float32)
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            cell = digits.CELLS.index(digit.cell)
            left, top = cell % digits.GRID * digits.CELL, cell // digits.GRID * digits.CELL
            value[row, cell] = VALUES.index(digit.value)
            color[row, cell] = 1 + COLORS.index(digit.color)
            box[row, cell] = np.subtract(digit.box, (left, top, left, top)) / digits.CELL
    return torch.from_numpy(pixels), CellTruth(*(torch.from_numpy(part) for part in (value, color, box)))


class CellHead(nn.Module):
    """Reads digit, colour and box of a cell from one vector; thrown away after the training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.read = nn.Linear(WIDTH, len(VALUES) + 1 + len(COLORS) + 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., width]` to logits of the digits, logits of the colours (0: empty), and boxes."""
        return self.read(self.norm(x)).split([len(VALUES), 1 + len(COLORS), 4], dim=-1)

    def loss(self, x: Tensor, truth: CellTruth) -> Tensor:
        """Cross entropies of digit and colour and the squared error of the boxes; an empty cell has a colour alone."""
        values, colors, boxes = self(x)
        loss = F.cross_entropy(colors.flatten(0, 1), truth.color.flatten())
        there = truth.value >= 0
        if there.any():
            loss = loss + F.cross_entropy(values[there], truth.value[there])
            loss = loss + BOX_WEIGHT * F.mse_loss(boxes[there], truth.box[there])
        return loss


def patch_grid() -> tuple[Tensor, Tensor]:
    """int64 `[36]` each: the cell that contains a patch, and which quarter of the cell it is."""
    patch, per_cell = torch.arange(digits.SIZE // PATCH), digits.CELL // PATCH
    cell = patch[:, None] // per_cell * digits.GRID + patch // per_cell
    quarter = patch[:, None] % per_cell * per_cell + patch % per_cell
    return cell.flatten(), quarter.flatten()


@torch.no_grad()
def initialise(model: TinyGPTVForConditionalGeneration) -> None:
    """Start with patches that know their cell and quarter, and queries that look at their own cell.

    Trained models have found such a correspondence; finding it from scratch would take most of the training.
    """
    cell, quarter = patch_grid()
    cells, quarters = torch.randn(CELLS, WIDTH), torch.randn(1 + int(quarter.max()), WIDTH)
    positions = model.visual_encoder.pos_embed
    assert positions is not None
    positions[0, 1:] = POSITION_SCALE * (cells[cell] + quarters[quarter])
    model.query_tokens.copy_(cells)
    layer: Any = model.qformer.encoder.layer[0]  # torch types the modules of a list as Module
    look = layer.crossattention.attention
    look.query.weight.copy_(SHARPNESS * look.key.weight)


def train_vision(model: TinyGPTVForConditionalGeneration, training: Training, seed: int) -> float:
    """Train ViT, ln_vision and Q-Former of `model` in place; return the share of held-out digits read right."""
    rng = random.Random(f"vision {seed}")
    query_head, patch_head = CellHead(), CellHead()
    parts = (model.visual_encoder, model.ln_vision, model.qformer, query_head, patch_head)
    parameters = [model.query_tokens, *(p for part in parts for p in part.parameters())]
    cell, _quarter = patch_grid()
    initialise(model)

    def losses() -> Iterator[Tensor]:
        for step in itertools.count():
            pixels, truth = scene_batch([crowded_scene(rng) for _ in range(training.batch)])
            patches = model.visual_encoder.forward_features(model.normalize(pixels))
            # The patches are asked too, and alone at first: they learn from the first step, the queries from them.
            loss = patch_head.loss(patches[:, 1:], truth.of(cell))
            if step >= training.steps * training.first:
                queries = model.query_tokens.expand(len(pixels), -1, -1)
                features = model.qformer(query_embeds=queries, encoder_hidden_states=model.ln_vision(patches))
                loss = loss + query_head.loss(features.last_hidden_state, truth)
            yield loss

    optimize("vision", parameters, losses(), training)
    return _held_out(model, query_head)


@torch.no_grad()
def _held_out(model: TinyGPTVForConditionalGeneration, head: CellHead) -> float:
    rng = random.Random("vision test")
    pixels, truth = scene_batch([digits.random_scene(rng, "test") for _ in range(500)])
    values, colors, boxes = head(model.encode_vision(pixels))
    there = truth.value >= 0
    read = (values.argmax(-1) == truth.value)[there].float().mean().item()
    color = (colors.argmax(-1) == truth.color).float().mean().item()
    off = (boxes - truth.box)[there].abs().mean().item() * digits.CELL
    print(f"vision: held out, {read:.1%} of digits, {color:.1%} of cells' colours, box edges off by {off:.1f} px")
    return read
