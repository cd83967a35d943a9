"""A small Phi that can talk about digit scenes, and its tokenizer.

It never sees an image. Where a text has one, it reads a list of what is in each cell, and learns to look things up
there, in the formats of the four stages.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CodeGenTokenizer

from stages.tiny.pretrain import Training, optimize
from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.data.sets import digits
from tinygptv_ds.models.attention import make_layout
from tinygptv_ds.models.loss import token_losses
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, TokenRow, build_sequence
from tinygptv_ds.processing.text import load_prompts, render

CELLS = len(digits.CELLS)
PHI: dict[str, Any] = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
PHI |= {"num_attention_heads": 4, "resid_pdrop": 0.0, "initializer_range": 0.08, "max_position_embeddings": 512}
PHI |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
END = "<|endoftext|>"
BPE_VOCAB = 560  # below PHI's vocabulary: its last rows stay unused, as in Phi-2
TRAINING = Training(steps=800, batch=16, lr=3e-3, first=0.2)

CAPTION = TextSection(end_sym="\n", max_txt_len=160)
ALIGN = TextSection(prompts="stage3", prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=160)
CHAT = TextSection(prompt_template="[INST] {} [/INST]", end_sym="###", max_txt_len=160)
# lesson: (share, format). Conversations hold most questions per text.
LESSONS = {
    "facts": (0.08, CAPTION),
    "digits_caption": (0.08, CAPTION),
    "digits_align": (0.08, ALIGN),
    "digits_conversation": (0.42, CHAT),
    "digits_vqa": (0.1, CHAT),
    "digits_refer": (0.08, CHAT),
    "digits_identify": (0.04, CHAT),
    "digits_grounding": (0.04, CHAT),
    "digits_detection": (0.04, CHAT),
    "digits_text": (0.04, CHAT),
}
QUESTIONS_PER_CONVERSATION = 6
FACTS_PER_TEXT = 10
BOX_SHARE = 0.1  # of the facts


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> CodeGenTokenizer:
    """A byte-level BPE of Phi-2's kind over the words of prompts and scenes, with `<|endoftext|>` as its last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=BPE_VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_tokenizer_corpus(random.Random(f"tokenizer {seed}")), trainer)
    tokenizer_model = json.loads(tokenizer.to_str())["model"]
    vocab = tokenizer_model["vocab"] | {END: len(tokenizer_model["vocab"])}
    merges = [tuple(pair) for pair in tokenizer_model["merges"]]
    # The stub of `merges` wants strings, while the tokenizer takes pairs.
    return CodeGenTokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]
        pad_token=END,
        model_max_length=PHI["max_position_embeddings"],
    )


def _tokenizer_corpus(rng: random.Random) -> Iterator[str]:
    """Strings of few tokens, above all `###` and the numbers of boxes, which are one token each in Phi-2 too."""
    names = ("empty", "yes", "no", *digits.VALUES, *digits.COLORS, *digits.CELLS)
    for _ in range(100):
        yield from ("###", "###Human: ", " ###Assistant: ", "[INST] ", " [/INST]", "<Img>", "</Img>", "\n")
        yield from (space + name for name in names for space in ("", " "))
    for _ in range(20):
        yield from (f"<{number}>" for number in range(101))
    for _ in range(5):
        yield from (entry for pool in load_prompts().pools.values() for entry in pool)
    for _ in range(200):
        scene = digits.random_scene(rng, "train")
        yield from (digits.caption(rng, scene), digits.description(scene), *digits.ask(rng, scene)[1:])
        yield digits.DIGIT_SETS["digits_grounding"](rng, scene)["answer"]


# ---- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One text: its row, and the words at each image position, as a bag of token ids."""

    sequence: TokenRow
    cells: list[list[int]]


@dataclass(frozen=True)
class Teacher:
    """Makes texts about random scenes."""

    rng: random.Random
    tokenizer: CodeGenTokenizer
    image: ImageTokens

    @cached_property
    def _words(self) -> dict[str, list[int]]:
        words = ("empty", *digits.VALUES, *digits.COLORS, *digits.CELLS)
        return {word: self.tokenizer.encode(word) for word in words}

    def texts(self, count: int) -> list[Text]:
        """Make texts of all LESSONS, by their shares."""
        names = self.rng.choices(list(LESSONS), [share for share, _ in LESSONS.values()], k=count)
        return [self.text(name) for name in names]

    def text(self, name: str) -> Text:
        """Make a text of one of the LESSONS."""
        rng = self.rng
        scene = digits.random_scene(rng, "train")
        if name == "facts":
            record: dict[str, Any] = {"caption": facts(rng, scene)}
        elif name == "digits_conversation":
            kinds = rng.choices(list(digits.QUESTIONS), k=QUESTIONS_PER_CONVERSATION)
            record = {"conversation": [list(digits.QUESTIONS[kind][0](rng, scene)) for kind in kinds]}
        else:
            record = digits.DIGIT_SETS[name](rng, scene)
        images = int(name != digits.TEXT_ONLY)
        rendered = render(record, images, rng.randrange, clean=False)
        row = build_sequence(rendered, images, self.tokenizer, LESSONS[name][1], self.image, rng.randrange)
        return Text(row, self.cells(scene) if images else [])

    def cells(self, scene: digits.Scene) -> list[list[int]]:
        """The words "red", "seven" and "top-left", or "empty" and "top-left", for each cell."""
        contents = {digit.cell: (digit.color, digit.value) for digit in scene.digits}
        words = [(*contents.get(cell, ("empty",)), cell) for cell in digits.CELLS]
        return [[token for word in cell for token in self._words[word]] for cell in words]


def facts(rng: random.Random, scene: digits.Scene) -> str:
    """Things to look up, as tersely as possible: "color seven red, box red {<4><5><24><30>}, ..."."""
    statements = []
    for _ in range(FACTS_PER_TEXT):
        digit = rng.choice(scene.digits)
        of = {"digit": digit.value, "color": digit.color, "place": digit.cell}
        key, asked = rng.sample(list(of), 2)
        if rng.random() < BOX_SHARE:
            statements.append(f"box {of[key]} {digits.box_string(digit.box)}")
        else:
            statements.append(f"{asked} {of[key]} {of[asked]}")
    return ", ".join(statements)


def text_loss(model: TinyGPTVForConditionalGeneration, texts: list[Text]) -> Tensor:
    """Mean cross entropy of the answers, the texts laid end to end; a cell is the mean of its words' embeddings."""
    rows = [text.sequence for text in texts]
    lengths = [len(row) for row in rows]
    input_ids, position_ids, labels = (
        torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
        for name in ("input_ids", "position_ids", "labels")
    )
    embed = model.get_input_embeddings()
    words = torch.tensor([token for text in texts for bag in text.cells for token in bag], dtype=torch.long)
    counts = torch.tensor([len(bag) for text in texts for bag in text.cells], dtype=torch.long)
    cells = F.embedding_bag(words, embed.weight, counts.cumsum(0) - counts, mode="mean")
    place = (input_ids == model.config.image_token_id).nonzero().flatten()
    x = embed(input_ids).index_copy(0, place, cells)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = make_layout(cu_seqlens, max(lengths), len(input_ids), "sdpa")
    hidden = model.language_model.model(x, position_ids, layout=layout)
    targets = (labels != IGNORE).nonzero().flatten()
    return token_losses(model.language_model.lm_head(hidden[targets - 1]), labels[targets]).mean()


# ---- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: TinyGPTVForConditionalGeneration, tokenizer: CodeGenTokenizer) -> None:
    """Start as trained models end up: words are alike with and without their space, are read and written alike, and
    attention passes on what it sees."""
    embeddings, vocab = model.get_input_embeddings().weight, tokenizer.get_vocab()
    nn.init.normal_(embeddings)
    for token, index in vocab.items():
        spaced = vocab.get("\u0120" + token)
        if spaced is not None and len(token) > 1:
            embeddings[spaced] = 0.9 * embeddings[index] + 0.44 * embeddings[spaced]
    model.get_output_embeddings().weight.copy_(0.1 * embeddings)
    for layer in model.language_model.model.layers:
        attention: Any = layer.self_attn  # torch types modules in lists as Module
        basis = nn.init.orthogonal_(torch.empty_like(attention.dense.weight))
        values = attention.query_key_value.weight.unflatten(0, (attention.heads, 3, -1))[:, 2]
        values.copy_(basis.unflatten(0, (attention.heads, -1)))
        attention.dense.weight.copy_(basis.T)


def train_text(
    model: TinyGPTVForConditionalGeneration, tokenizer: CodeGenTokenizer, training: Training, seed: int
) -> float:
    """Train Phi of `model` in place; return the loss on new texts.

    The norms that TinyGPT-V adds to Phi are present and stay at their initial values: no Phi file holds them, so
    stage 1 needs a Phi that works with newly initialized ones.
    """
    teacher = Teacher(random.Random(f"text {seed}"), tokenizer, ImageTokens(model.config.image_token_id, CELLS))
    added = ("q_layernorm", "k_layernorm", "post_layernorm")
    parameters = [p for name, p in model.language_model.named_parameters() if not any(part in name for part in added)]
    initialise(model, tokenizer)

    def losses() -> Iterator[Tensor]:
        for step in itertools.count():
            # Looking up comes first: terse facts teach it in a fraction of the time that questions would take.
            easy = step < training.steps * training.first
            texts = [teacher.text("facts") for _ in range(training.batch)] if easy else teacher.texts(training.batch)
            yield text_loss(model, texts)

    optimize("text", parameters, losses(), training)
    with torch.no_grad():
        loss = text_loss(model, teacher.texts(200)).item()
    print(f"text: new texts, loss {loss:.3f}")
    return loss
