"""Small stand-ins for the pretrained parts, made in minutes on two CPU cores, in the layouts of the released files.

A real run starts from EVA-CLIP's ViT, BLIP-2's Q-Former and Phi-2. The quick start has no such files, so this script
trains tiny ones of the same structure on the digit scenes, each by itself:

- ViT and Q-Former learn to say what stands in each cell of a scene: query i answers for cell i;
- Phi never sees a picture: it learns to answer from a list of a scene's contents, in the formats of the four stages.

What is left to the stages is what TinyGPT-V's stages do: to carry what the queries say into Phi's embedding space.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CodeGenTokenizer, PhiConfig

from tinygptv_ds.config.schema import TextSection
from tinygptv_ds.data.sets import digits
from tinygptv_ds.models.attention import make_packing
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.loss import token_losses
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, Sequence, build_sequence
from tinygptv_ds.processing.text import load_prompts, render

Log = Callable[[str], None]

GAIN = 3
POSITION_SCALE = 0.5
CELLS = len(digits.CELLS)  # one query each
VALUES, COLORS = list(digits.VALUES), list(digits.COLORS)
VISION = {"image_size": digits.SIZE, "patch_size": 14, "hidden_size": 96, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 4, "intermediate_size": 384}
QFORMER = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
QFORMER |= {"encoder_hidden_size": 96, "cross_attention_frequency": 2, "vocab_size": 1}
QFORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
TEXT |= {"num_attention_heads": 4, "resid_pdrop": 0.0, "initializer_range": 0.08, "max_position_embeddings": 512}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
BPE_VOCAB = 560  # below TEXT's vocabulary: its last rows stay unused, as in Phi-2

# How the stages word things: (dataset, share, format). Conversations carry most questions per picture.
CAPTION = TextSection(end_sym="\n", max_txt_len=160)
ALIGN = TextSection(prompts="stage3", prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=160)
CHAT = TextSection(prompt_template="[INST] {} [/INST]", end_sym="###", max_txt_len=160)
LESSONS = {
    "facts": (0.08, CAPTION),
    "digits_conversation": (0.5, CHAT),
    "digits_vqa": (0.12, CHAT),
    "digits_caption": (0.1, CAPTION),
    "digits_align": (0.1, ALIGN),
    "digits_refer": (0.04, CHAT),
    "digits_identify": (0.04, CHAT),
    "digits_grounding": (0.04, CHAT),
    "digits_detection": (0.04, CHAT),
    "digits_text": (0.04, CHAT),
}
QUESTIONS_PER_CONVERSATION = 6
FACTS_PER_TEXT = 10


@dataclass(frozen=True)
class Training:
    """Length, batch (scenes or texts) and learning rate of one part's training."""

    steps: int
    batch: int
    lr: float
    first: float  # share of the steps spent on the easier half alone: the patches, or the plain facts


VISION_TRAINING = Training(steps=800, batch=32, lr=3e-3, first=0.35)
TEXT_TRAINING = Training(steps=800, batch=16, lr=3e-3, first=0.2)


# ---- training in general ---------------------------------------------------------------------------------------------


def _optimize(parameters: list[nn.Parameter], losses: Iterator[Tensor], training: Training, log: Log) -> None:
    """AdamW with a tenth of warm-up and a cosine; takes one loss of `losses` a step."""
    optimizer = torch.optim.AdamW(parameters, training.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, training.steps // 10)
    began = time.monotonic()
    for step in range(training.steps):
        rate = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / training.steps))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * rate
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == training.steps:
            log(f"  step {step + 1}/{training.steps}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s")


# ---- vision ----------------------------------------------------------------------------------------------------------


def crowded_scene(rng: random.Random, split: str) -> digits.Scene:
    """Zero to nine digits, repeats allowed: more to learn from per picture than in the datasets' scenes."""
    cells = rng.sample(range(CELLS), rng.choice((0, 1, 2, 4, 6, 9, 9, 9)))
    return digits.draw(rng, split, [(cell, rng.choice(VALUES), rng.choice(COLORS)) for cell in cells])


@dataclass(frozen=True)
class CellTruth:
    """What stands in the cells of N scenes.

    `value` int64 `[N, 9]`, -1 for an empty cell; `color` int64 `[N, 9]`, 0 for an empty cell; `box` float `[N, 9, 4]`,
    the digit's box inside its cell, 0-1.
    """

    value: Tensor
    color: Tensor
    box: Tensor

    def of(self, cell: Tensor) -> CellTruth:
        """The truth of other things than cells, each of which lies in the cell of the index given, int64 `[M]`."""
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
    """Reads value, colour and box of a cell from one vector; thrown away after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, len(VALUES) + 1 + len(COLORS) + 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., width]` to logits of the values, logits of the colours (0: empty), and boxes."""
        return self.read(self.norm(x)).split([len(VALUES), 1 + len(COLORS), 4], dim=-1)

    def loss(self, x: Tensor, truth: CellTruth) -> Tensor:
        """Cross entropies of value and colour and the squared error of the boxes; empty cells have a colour alone."""
        values, colors, boxes = self(x)
        there = truth.value >= 0
        if not there.any():
            return F.cross_entropy(colors.flatten(0, 1), truth.color.flatten())
        return (
            F.cross_entropy(values[there], truth.value[there])
            + F.cross_entropy(colors.flatten(0, 1), truth.color.flatten())
            + 10 * F.mse_loss(boxes[there], truth.box[there])
        )


def patch_grid() -> tuple[Tensor, Tensor]:
    """int64 `[36]` each: the cell in which a patch lies, and which quarter of the cell it is."""
    patch = torch.arange(digits.SIZE // VISION["patch_size"])
    per_cell = digits.CELL // VISION["patch_size"]
    cell = patch[:, None] // per_cell * digits.GRID + patch // per_cell
    quarter = patch[:, None] % per_cell * per_cell + patch % per_cell
    return cell.flatten(), quarter.flatten()


@torch.no_grad()
def place_vision(model: TinyGPTVForConditionalGeneration) -> None:
    """Start with patches that know their cell and quarter, and queries that look at their own cell.

    Trained models have found such a correspondence; found from scratch it would take most of the training.
    """
    cell, quarter = patch_grid()
    cells = torch.randn(CELLS, VISION["hidden_size"])
    quarters = torch.randn(int(quarter.max()) + 1, VISION["hidden_size"])
    model.visual_encoder.pos_embed[0, 1:] = POSITION_SCALE * (cells[cell] + quarters[quarter])
    model.query_tokens.copy_(cells)
    attention = model.qformer.encoder.layer[0].crossattention.attention
    attention.query.weight.copy_(GAIN * attention.key.weight)


def train_vision(model: TinyGPTVForConditionalGeneration, training: Training, seed: int, log: Log) -> float:
    """Train ViT and Q-Former of `model` in place; returns the share of test digits that are read right."""
    rng = random.Random(f"vision {seed}")
    query_head, patch_head = CellHead(QFORMER["hidden_size"]), CellHead(VISION["hidden_size"])
    parts = (model.visual_encoder, model.ln_vision, model.qformer, query_head, patch_head)
    parameters = [model.query_tokens, *(p for part in parts for p in part.parameters())]
    cell = patch_grid()[0]
    place_vision(model)

    def losses() -> Iterator[Tensor]:
        for step in itertools.count():
            pixels, truth = scene_batch([crowded_scene(rng, "train") for _ in range(training.batch)])
            patches = model.visual_encoder.forward_features(model.normalize(pixels))
            # The patches are asked too, and alone at first: they learn from the first step, the queries from them.
            loss = patch_head.loss(patches[:, 1:], truth.of(cell))
            if step >= training.steps * training.first:
                queries = model.query_tokens.expand(len(pixels), -1, -1)
                features = model.qformer(query_embeds=queries, encoder_hidden_states=model.ln_vision(patches))
                loss = loss + query_head.loss(features.last_hidden_state, truth)
            yield loss

    _optimize(parameters, losses(), training, log)
    with torch.no_grad():
        pixels, truth = scene_batch([digits.random_scene(rng, "test") for _ in range(500)])
        values, colors, boxes = query_head(model.encode_vision(pixels))
    there = truth.value >= 0
    right = (values.argmax(-1) == truth.value)[there].float().mean().item()
    color_right = (colors.argmax(-1) == truth.color).float().mean().item()
    off = (boxes - truth.box)[there].abs().mean().item() * digits.CELL
    log(f"  test scenes: {right:.1%} of digits, {color_right:.1%} of cells' colours, boxes off by {off:.1f} px")
    return right


# ---- text ------------------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> CodeGenTokenizer:
    """A byte-level BPE of Phi-2's kind over the words of prompts and scenes, with `<|endoftext|>` as its last id."""
    rng = random.Random(f"tokenizer {seed}")
    words = [entry for pool in load_prompts().pools.values() for entry in pool] * 5
    words += ["###", "###Human: ", " ###Assistant: ", "[INST] ", " [/INST]", "<Img>", "</Img>", "\n"] * 100
    words += [f"<{number}>" for number in range(101)] * 20
    names = ("empty", "yes", "no", *VALUES, *COLORS, *digits.CELLS)
    words += [space + name for name in names for space in ("", " ")] * 50
    for _ in range(200):
        scene = digits.random_scene(rng, "train")
        words += [digits.caption(rng, scene), digits.description(scene), *digits.ask(rng, scene)[1:]]
        words += [str(record["answer"]) for record in [digits.DIGIT_SETS["digits_grounding"](rng, scene)]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=BPE_VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocab = learnt["vocab"] | {"<|endoftext|>": len(learnt["vocab"])}
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CodeGenTokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>", model_max_length=512)


@dataclass(frozen=True)
class Lesson:
    """One text: its row, and for each image position the tokens that stand there instead (`cells`, a bag each)."""

    sequence: Sequence
    cells: list[list[int]]


def lesson(rng: random.Random, tokenizer: CodeGenTokenizer, image: ImageTokens, name: str) -> Lesson:
    """A random text of one of the LESSONS about a random scene."""
    scene = digits.random_scene(rng, "train")
    if name == "facts":
        record = {"caption": facts(rng, scene)}
    elif name == "digits_conversation":
        kinds = rng.choices(list(digits.QUESTIONS), k=QUESTIONS_PER_CONVERSATION)
        record = {"conversation": [list(digits.QUESTIONS[kind][0](rng, scene)) for kind in kinds]}
    else:
        record = digits.DIGIT_SETS[name](rng, scene)
    images = int(name != digits.TEXT_ONLY)
    rendered = render(record, images, rng.randrange, clean=False)
    sequence = build_sequence(rendered, images, tokenizer, LESSONS[name][1], image, rng.randrange)
    return Lesson(sequence, cell_words(scene, tokenizer) if images else [])


def facts(rng: random.Random, scene: digits.Scene) -> str:
    """What the language model begins with: things to look up, as tersely as possible ("color seven red, ...")."""
    said = []
    for _ in range(FACTS_PER_TEXT):
        digit = rng.choice(scene.digits)
        of = {"digit": digit.value, "color": digit.color, "place": digit.cell}
        key, asked = rng.sample(list(of), 2)
        said.append(f"{asked} {of[key]} {of[asked]}")
    return ", ".join(said)


def cell_words(scene: digits.Scene, tokenizer: CodeGenTokenizer) -> list[list[int]]:
    """The tokens of what is in each cell: the words "red", "seven" and "top-left", or "empty" and "top-left"."""
    contents = {digit.cell: (digit.color, digit.value) for digit in scene.digits}
    words = [(*contents.get(cell, ("empty",)), cell) for cell in digits.CELLS]
    return [[token for word in cell for token in tokenizer.encode(word)] for cell in words]


def lesson_loss(model: TinyGPTVForConditionalGeneration, lessons: list[Lesson]) -> Tensor:
    """Mean cross entropy of the answers, the lessons laid end to end; a cell is the mean of its words' embeddings."""
    rows = [item.sequence for item in lessons]
    lengths = [len(row) for row in rows]
    input_ids, position_ids, labels = (
        torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
        for name in ("input_ids", "position_ids", "labels")
    )
    embed = model.get_input_embeddings()
    bags = [bag for item in lessons for bag in item.cells]
    offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)[:-1]
    cells = F.embedding_bag(torch.tensor([token for bag in bags for token in bag], dtype=torch.long), embed.weight, offsets, mode="mean")
    place = (input_ids == model.config.image_token_id).nonzero().flatten()
    x = embed(input_ids).index_copy(0, place, cells)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packing = make_packing(cu_seqlens, max(lengths), len(input_ids), "sdpa")
    hidden = model.language_model.model(x, position_ids, packing=packing)
    learnt = (labels != IGNORE).nonzero().flatten()
    return token_losses(model.language_model.lm_head(hidden[learnt - 1]), labels[learnt]).mean()


@torch.no_grad()
def relate_words(model: TinyGPTVForConditionalGeneration, tokenizer: CodeGenTokenizer) -> None:
    """Start as trained models end up: a word begins alike with and without its space, is read and written alike, and
    attention passes on what it sees."""
    embeddings, vocab = model.get_input_embeddings().weight, tokenizer.get_vocab()
    nn.init.normal_(embeddings)
    for token, index in vocab.items():
        spaced = vocab.get("\u0120" + token)
        if spaced is not None and len(token) > 1:
            embeddings[spaced] = 0.9 * embeddings[index] + 0.44 * embeddings[spaced]
    model.get_output_embeddings().weight.copy_(0.1 * embeddings)
    for layer in model.language_model.model.layers:
        attention = layer.self_attn
        basis = nn.init.orthogonal_(torch.empty_like(attention.dense.weight))
        attention.query_key_value.weight.unflatten(0, (attention.heads, 3, -1))[:, 2] = basis.unflatten(
            0, (attention.heads, -1)
        )
        attention.dense.weight.copy_(basis.T)


def train_text(
    model: TinyGPTVForConditionalGeneration, tokenizer: CodeGenTokenizer, training: Training, seed: int, log: Log
) -> float:
    """Train Phi of `model` in place on texts alone; returns the mean loss on unseen texts.

    The norms that TinyGPT-V adds are there and stay as they are made, since no Phi file holds them.
    """
    rng = random.Random(f"text {seed}")
    image = ImageTokens(model.config.image_token_id, CELLS)
    added = ("q_layernorm", "k_layernorm", "post_layernorm")
    parameters = [p for name, p in model.language_model.named_parameters() if not any(part in name for part in added)]
    relate_words(model, tokenizer)

    def texts(count: int) -> list[Lesson]:
        names = rng.choices(list(LESSONS), [share for share, _ in LESSONS.values()], k=count)
        return [lesson(rng, tokenizer, image, name) for name in names]

    def losses() -> Iterator[Tensor]:
        for step in itertools.count():
            if step < training.steps * training.first:
                yield lesson_loss(model, [lesson(rng, tokenizer, image, "facts") for _ in range(training.batch)])
            else:
                yield lesson_loss(model, texts(training.batch))

    _optimize(parameters, losses(), training, log)
    with torch.no_grad():
        loss = lesson_loss(model, texts(300)).item()
    log(f"  unseen texts: loss {loss:.3f}")
    return loss
