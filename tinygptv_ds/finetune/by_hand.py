"""`stages/finetune.yaml`: the recipe that `finetune` would write for a thousand samples, for those who start the verbs
themselves. `python -m tinygptv_ds.finetune.by_hand` writes it.
"""

from __future__ import annotations

import dataclasses

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.files import write_atomically
from tinygptv_ds.finetune.devices import Devices
from tinygptv_ds.finetune.recipe import Data, compose
from tinygptv_ds.resources import project_root

_DATA = Data("data/mine/train", "data/mine/held_out", 900, 100)
_CARD = Devices(1, 24.0, "GPU of 24 GB")
_PHI_2_WIDTH = 2560


def text() -> str:
    """Return the file's content. Imports torch, to count what fits into memory."""
    published = load_recipe(project_root() / "stages/stage4.yaml")
    return compose(
        stage=4,
        model=dataclasses.replace(published.model, init_from="weights/TinyGPT-V_for_Stage4.pth"),
        text=published.text,
        width=_PHI_2_WIDTH,
        data=_DATA,
        devices=_CARD,
        title="Fine-tuning of the released stage 4 on 900 samples of your own, on one GPU of 24 GB.",
    ).text


def main() -> None:
    """Write the file."""
    path = project_root() / "stages/finetune.yaml"
    write_atomically(path, text().encode())
    print(f"{path}: written")


if __name__ == "__main__":
    main()
