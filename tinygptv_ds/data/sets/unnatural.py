"""Unnatural Instructions: text without an image."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import Built, Entry, Samples, load_entries, turn


def unnatural_instruction(root: Path) -> Iterator[Entry]:
    """Yield the first instance of each entry of `unnatural_instruction/filtered_unnatural_instruction.json`."""

    def build(entry: dict) -> Built:
        instance = entry["instances"][0]
        text = instance["instruction_with_input"]
        if instance.get("constraints") is not None:
            text += " " + instance["constraints"]
        return turn(None, text, instance["output"], clean=["text", "answer"]), []

    return Samples(load_entries(root / "unnatural_instruction/filtered_unnatural_instruction.json"), build)
