"""The sample panel in the run directory: `samples/step-N.json`, and each image once in `samples/images/`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tinygptv_ds.files import write_atomically
from tinygptv_ds.log import LOGGER

FOLDER = "samples"  # in the run directory


@dataclass(frozen=True)
class AnsweredSample:
    """One row of the panel.

    Attributes:
        prompt: as the model was asked.
        truth: the true answer.
        answer: the generated one.
        pixels: uint8 `[n, 3, S, S]`; empty where the model had features.
    """

    prompt: str
    truth: str
    answer: str
    pixels: np.ndarray


def write_panel(run_dir: Path, step: int, samples: Sequence[AnsweredSample]) -> None:
    """Write the panel after `step` steps; a disk that refuses costs the panel and not the run."""
    folder = run_dir / FOLDER
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "prompt": each.prompt,
                "truth": each.truth,
                "answer": each.answer,
                "images": [_image_file(folder, pixels) for pixels in each.pixels],
            }
            for each in samples
        ]
        text = json.dumps({"step": step, "samples": rows}, indent=1)  # ASCII: an answer may hold half a character
        write_atomically(folder / f"step-{step:08d}.json", f"{text}\n".encode())
    except OSError as error:
        LOGGER.warning("%s cannot be written (%s); training continues without it", folder, error.strerror)


def _image_file(folder: Path, pixels: np.ndarray) -> str:
    """Write an image, unless an earlier panel has; return its name within the folder.

    Args:
        folder: of the panels.
        pixels: uint8 `[3, S, S]`.
    """
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]
    file = folder / "images" / f"{digest}.png"
    if not file.exists():
        encoded = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(encoded, "PNG")
        write_atomically(file, encoded.getvalue())
    return f"images/{file.name}"
