"""The embedded datasets: scenes of real handwritten digits, whose contents are known exactly.

A scene is an 84 x 84 image with a 3 x 3 grid of cells. One to four handwritten digits (the 8 x 8 scans that
scikit-learn ships) are in different cells, no digit value and no colour twice, so that every question has one true
answer. Training and test scenes are drawn with different scans.
"""

import io
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tinygptv_ds.data.sets.common import PreparedSample
from tinygptv_ds.errors import DataError

CELL = 28  # pixels: two ViT patches of 14
GRID = 3
SIZE = GRID * CELL
SPLITS = ("train", "test")
VALUES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (225, 45, 45),
    "green": (50, 190, 60),
    "blue": (70, 105, 250),
    "yellow": (235, 215, 50),
    "purple": (190, 70, 215),
    "white": (240, 240, 240),
}
CELLS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
MAX_DIGITS = 4
GLYPH_SIZES = (22, 24, 26)  # pixels
JITTER = 2  # pixels


@dataclass(frozen=True)
class Digit:
    """One digit of a scene; `box` is the tight (x1, y1, x2, y2) of its drawn pixels, ends exclusive."""

    value: str
    color: str
    cell: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image (uint8 [84, 84, 3]) and its digits in reading order."""

    pixels: np.ndarray
    digits: tuple[Digit, ...]


# ---- drawing ---------------------------------------------------------------------------------------------------------


@cache
def glyphs(split: str) -> dict[str, list[np.ndarray]]:
    """Return every scan of `split` at each of GLYPH_SIZES, by value: float32 [height, width] opacities, cut to the ink.

    Every fifth scan is a test scan; no scan is in both splits.
    """
    if split not in SPLITS:
        raise DataError(f"digit scenes have no split {split!r}: choose one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_digits  # takes a second to import

    scans = load_digits()
    found = defaultdict(list)
    for index, (scan, target) in enumerate(zip(scans.images, scans.target, strict=True)):
        if (index % 5 == 4) == (split == "test"):
            image = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
            for size in GLYPH_SIZES:
                opacity = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
                opacity[opacity < 0.25] = 0
                rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
                found[VALUES[target]].append(opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return dict(found)


@cache
def _texture() -> np.ndarray:
    return np.random.default_rng(0).integers(-10, 11, (256, 256, 1)).astype(np.float32)


def draw(rng: random.Random, split: str, contents: Sequence[tuple[int, str, str]]) -> Scene:
    """Draw a scene with the given (cell index, value, color), on a dark, lightly textured background."""
    top, left = rng.randrange(256 - SIZE), rng.randrange(256 - SIZE)
    pixels = _texture()[top : top + SIZE, left : left + SIZE] + np.array(
        [rng.randint(20, 60) for _ in range(3)], np.float32
    )
    digits = []
    for cell, value, color in sorted(contents):
        glyph = rng.choice(glyphs(split)[value])
        height, width = glyph.shape
        y1 = cell // GRID * CELL + _jittered(rng, height)
        x1 = cell % GRID * CELL + _jittered(rng, width)
        ink = np.array([min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLORS[color]], np.float32)
        area = pixels[y1 : y1 + height, x1 : x1 + width]
        area += glyph[:, :, None] * (ink - area)
        digits.append(Digit(value, color, CELLS[cell], (x1, y1, x1 + width, y1 + height)))
    return Scene(pixels.round().astype(np.uint8), tuple(digits))


def _jittered(rng: random.Random, extent: int) -> int:
    """Return the start of `extent` pixels about the middle of a cell and inside it."""
    free = CELL - extent
    return min(free, max(0, free // 2 + rng.randint(-JITTER, JITTER)))


def random_scene(rng: random.Random, split: str) -> Scene:
    """Draw one to four digits, all of different values, colours and cells."""
    count = rng.randint(1, MAX_DIGITS)
    cells = rng.sample(range(GRID * GRID), count)
    values, colors = rng.sample(VALUES, count), rng.sample(tuple(COLORS), count)
    return draw(rng, split, list(zip(cells, values, colors, strict=True)))


# ---- words -----------------------------------------------------------------------------------------------------------


def box_string(box: tuple[int, int, int, int]) -> str:
    """Format a pixel box as MiniGPT-v2's box text: `{<x1><y1><x2><y2>}` in whole per cent, cut off, not rounded."""
    return "{" + "".join(f"<{int(edge / SIZE * 100)}>" for edge in box) + "}"


def _name(digit: Digit) -> str:
    return f"{digit.color} {digit.value}"


def _place(digit: Digit) -> str:
    return f"in the {digit.cell}"


def _is_are(count: int) -> str:
    return "is one digit" if count == 1 else f"are {VALUES[count]} digits"


def caption(rng: random.Random, scene: Scene) -> str:
    """Return a caption of one short line, half of the time with the places."""
    with_place = rng.random() < 0.5
    return " and ".join(f"a {_name(digit)}" + (f" {_place(digit)}" if with_place else "") for digit in scene.digits)


def description(scene: Scene) -> str:
    """Return a description with one sentence for every digit."""
    sentences = [f"There {_is_are(len(scene.digits))} in this image."]
    return " ".join(sentences + [f"The {digit.value} {_place(digit)} is {digit.color}." for digit in scene.digits])


# ---- questions: (question, answer) about a scene, every answer one word ----------------------------------------------


def _ask_digit(rng: random.Random, scene: Scene) -> tuple[str, str]:
    digit = rng.choice(scene.digits)
    forms = (
        f"what digit is {digit.color}?",
        f"what is the {digit.color} digit?",
        f"which digit is {_place(digit)}?",
        f"what digit is {_place(digit)}?",
    )
    return rng.choice(forms), digit.value


def _ask_color(rng: random.Random, scene: Scene) -> tuple[str, str]:
    digit = rng.choice(scene.digits)
    forms = (
        f"what color is the {digit.value}?",
        f"what is the color of the {digit.value}?",
        f"what color is the digit {_place(digit)}?",
        f"what is the color of the digit {_place(digit)}?",
    )
    return rng.choice(forms), digit.color


def _ask_place(rng: random.Random, scene: Scene) -> tuple[str, str]:
    digit = rng.choice(scene.digits)
    thing = rng.choice((digit.value, f"{digit.color} digit", _name(digit)))
    return rng.choice((f"where is the {thing}?", f"in which place is the {thing}?")), digit.cell


def _ask_count(rng: random.Random, scene: Scene) -> tuple[str, str]:
    return rng.choice(("how many digits are there?", "how many digits do you see?")), VALUES[len(scene.digits)]


def _ask_presence(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Ask whether a value or colour is present; half of the answers are yes."""
    there = rng.random() < 0.5
    pool: Iterable[str]
    if rng.random() < 0.5:
        present, pool, ending = {digit.value for digit in scene.digits}, VALUES, ""
    else:
        present, pool, ending = {digit.color for digit in scene.digits}, COLORS, " digit"
    word = rng.choice([word for word in pool if (word in present) == there])
    return rng.choice((f"is there a {word}{ending}?", f"do you see a {word}{ending}?")), "yes" if there else "no"


# By type: how it is asked, and its share. Guessable types are rare, so that guessing scores below 20 %.
QUESTIONS: dict[str, tuple[Callable[[random.Random, Scene], tuple[str, str]], float]] = {
    "digit": (_ask_digit, 0.38),
    "color": (_ask_color, 0.3),
    "place": (_ask_place, 0.2),
    "count": (_ask_count, 0.05),
    "presence": (_ask_presence, 0.07),
}


def ask(rng: random.Random, scene: Scene) -> tuple[str, str, str]:
    """Return a random (type, question, answer) about the scene."""
    kind = rng.choices(list(QUESTIONS), [share for _, share in QUESTIONS.values()])[0]
    return kind, *QUESTIONS[kind][0](rng, scene)


# ---- records of a scene in each dataset ------------------------------------------------------------------------------


def _pooled(pool: str | None, text: str, answer: str, **more: str) -> dict:
    return {"pool": pool, "text": text, "answer": answer, "clean": [], **more}


def _caption(rng: random.Random, scene: Scene) -> dict:
    return {"caption": caption(rng, scene), "clean": []}


def _align(rng: random.Random, scene: Scene) -> dict:
    return {"caption": description(scene), "clean": []}


def _vqa(rng: random.Random, scene: Scene) -> dict:
    kind, question, answer = ask(rng, scene)
    return _pooled("vqa", question, answer, question_type=kind)


def _refer(rng: random.Random, scene: Scene) -> dict:
    digit = rng.choice(scene.digits)
    return _pooled("refer", rng.choice((f"the {digit.value}", f"the {_name(digit)}")), box_string(digit.box))


def _identify(rng: random.Random, scene: Scene) -> dict:
    digit = rng.choice(scene.digits)
    return _pooled("identify", box_string(digit.box), f"a {_name(digit)}")


def _grounding(rng: random.Random, scene: Scene) -> dict:
    return _pooled("grounding", "", " and ".join(f"<p>a {_name(d)}</p> {box_string(d.box)}" for d in scene.digits))


def _detection(rng: random.Random, scene: Scene) -> dict:
    digit = rng.choice(scene.digits)
    return _pooled("detection", digit.value, f"<p>{digit.value}</p> {box_string(digit.box)}")


def _conversation(rng: random.Random, scene: Scene) -> dict:
    return {"conversation": [list(ask(rng, scene)[1:]) for _ in range(rng.randint(2, 3))]}


def _text(rng: random.Random, scene: Scene | None = None) -> dict:
    first, second = rng.sample(range(10), 2)
    larger, smaller = max(first, second), min(first, second)
    forms = [
        (f"which is larger, {VALUES[first]} or {VALUES[second]}?", VALUES[larger]),
        (f"which is smaller, {VALUES[first]} or {VALUES[second]}?", VALUES[smaller]),
        (f"what comes after {VALUES[smaller]}?", VALUES[smaller + 1]),
        (f"what comes before {VALUES[larger]}?", VALUES[larger - 1]),
    ]
    return _pooled(None, *rng.choice(forms))


TEXT_ONLY = "digits_text"
DIGIT_SETS: dict[str, Callable[[random.Random, Scene], dict]] = {
    "digits_caption": _caption,
    "digits_align": _align,
    "digits_vqa": _vqa,
    "digits_refer": _refer,
    "digits_identify": _identify,
    "digits_grounding": _grounding,
    "digits_detection": _detection,
    "digits_conversation": _conversation,
    TEXT_ONLY: _text,
}


def samples(name: str, split: str, size: int, seed: int) -> Iterator[PreparedSample]:
    """Yield the first `size` samples of a dataset, which depend on the arguments alone.

    Records have the keys of the other datasets' and "scene", the digits (see `Digit`) in the image; those of
    digits_vqa also have "question_type", a key of QUESTIONS.

    Raises:
        DataError: an unknown dataset or split.
    """
    if name not in DIGIT_SETS:
        raise DataError(f"no embedded dataset {name!r}: choose one of {', '.join(DIGIT_SETS)}")
    glyphs(split)  # an unknown split fails here
    rng = random.Random(f"{name} {split} {seed}")
    for index in range(size):
        if name == TEXT_ONLY:
            yield PreparedSample(f"{index:06d}", _text(rng), ())
        else:
            scene = random_scene(rng, split)
            record = DIGIT_SETS[name](rng, scene) | {"scene": [vars(digit).copy() for digit in scene.digits]}
            yield PreparedSample(f"{index:06d}", record, (_jpeg(scene.pixels),))


def _jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


# ---- what guessing scores --------------------------------------------------------------------------------------------


def vqa_chance(records: Iterable[Mapping]) -> dict[str, float]:
    """Return the accuracy (0-1) of always giving each question type's most frequent answer, by type and under "all"."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        answers[record["question_type"]][record["answer"]] += 1
    hits = {kind: max(counts.values()) for kind, counts in answers.items()}
    totals = {kind: counts.total() for kind, counts in answers.items()}
    by_type = {kind: hits[kind] / totals[kind] for kind in answers}
    return {"all": sum(hits.values()) / sum(totals.values()), **by_type}


def refer_chance(records: Iterable[Mapping]) -> float:
    """Return the mean IoU (0-1) of answering every referring expression with the mean of all true boxes."""
    boxes = np.array([[int(edge) for edge in record["answer"][2:-2].split("><")] for record in records])
    mean = boxes.mean(0)
    low, high = np.maximum(boxes[:, :2], mean[:2]), np.minimum(boxes[:, 2:], mean[2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (mean[2:] - mean[:2]).prod()
    return float((shared / (areas - shared)).mean())
