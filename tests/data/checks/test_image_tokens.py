"""The number of tokens of an image is that of the weights, whatever their file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinygptv_ds.data.checks.image_tokens import image_tokens

STATE = {"query_tokens": torch.zeros(1, 7, 4), "other": torch.zeros(3)}


@pytest.mark.parametrize("content", [{"model": STATE}, STATE])
def test_of_torchs_files(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "blip2.pth")
    assert image_tokens(str(tmp_path / "blip2.pth")) == 7


def test_of_safetensors_and_exported_folders(tmp_path: Path) -> None:
    save_file({f"a.{name}": tensor for name, tensor in STATE.items()}, tmp_path / "blip2.safetensors")
    assert image_tokens(str(tmp_path / "blip2.safetensors")) == 7
    (tmp_path / "config.json").write_text(json.dumps({"num_query_tokens": 9}))
    assert image_tokens(str(tmp_path)) == 9


@pytest.mark.parametrize("data", [None, b"", b"no weights", b"\xff" * 20])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_unknown(name: str, data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert image_tokens(str(tmp_path / name)) is None
