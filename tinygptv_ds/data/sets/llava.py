"""LLaVA-Instruct-150K (conversation, detail, reason) and MiniGPT-v2's multi-task conversations, on COCO images.

Roles are ignored, only positions count: the first value is a question, the second its answer, and so on.
"""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import Built, Entry, Samples, coco_image, load_entries, turn


def first_question(value: str) -> str:
    """Remove the image mark and line breaks from a first human turn (deleted, not replaced by spaces, as trained)."""
    return value.replace("<image>", "").replace("\n", "").strip()


def conversation(root: Path, file: str) -> Iterator[Entry]:
    """Yield a conversation with all turns of each entry."""

    def build(entry: dict) -> Built:
        values = [turn["value"] for turn in entry["conversations"]]
        values[0] = first_question(values[0])
        if len(values) % 2:
            values.append(None)  # a last question without an answer
        pairs = [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]
        return {"conversation": pairs, "clean": [], "id": entry["id"]}, [coco_image(root, entry["id"])]

    return Samples(load_entries(root / file), build)


def first_turn(root: Path, file: str) -> Iterator[Entry]:
    """Yield the first question of each entry, cleaned, with its answer unchanged; later turns are left out."""

    def build(entry: dict) -> Built:
        question, answer = (turn["value"] for turn in entry["conversations"][:2])
        record = turn(None, first_question(question), answer, clean=["text"], id=entry["id"])
        return record, [coco_image(root, entry["id"])]

    return Samples(load_entries(root / file), build)
