"""Weight files are opened without executing anything, and damaged ones are reported."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.folders import open_weights

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def assert_state(path: Path) -> None:
    stored = open_weights(path)
    assert {name: s.shape for name, s in stored.items()} == {"a": (2, 3), "b": (4,)}
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in STATE.items())


def test_every_kind_of_file(tmp_path: Path) -> None:
    """The kind shows in the content; the ending does not matter."""
    save_file(STATE, tmp_path / "safetensors.pth")
    torch.save(STATE, tmp_path / "zip.bin")
    torch.save(STATE, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": STATE, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "nested.pth")
    for name in ("safetensors.pth", "zip.bin", "legacy.pth", "nested.pth"):
        assert_state(tmp_path / name)


class Malicious:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("how", ["torch", "torch legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused(tmp_path: Path, how: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    content = {"model": STATE, "config": Malicious(canary)}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"config": Malicious(canary)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(WeightsError, match="not opened because unpickling could run code"):
        open_weights(path)
    assert not canary.exists()
    if how != "torch legacy":  # the canary does sing where nothing holds it back
        torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
        assert canary.exists()


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / f"weights.{kind}"
    (save_file if kind == "safetensors" else torch.save)({"a": torch.randn(100, 100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(WeightsError, match=f"weights.{kind}: .*(damaged|cut short)"):
        open_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"epoch": 3}}, STATE["a"]])
def test_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        open_weights(tmp_path / "x.pth")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file or folder"):
        open_weights(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="no weights there"):
        open_weights(tmp_path)


def test_an_index_cannot_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file(STATE, tmp_path / "other.safetensors")
    index = tmp_path / "folder/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(WeightsError, match=r"shards must be in the same folder, not at \.\./other"):
        open_weights(tmp_path / "folder")


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    save_file(STATE, tmp_path / "consolidated.safetensors")
    with pytest.raises(WeightsError, match="a, b in more than one file"):
        open_weights(tmp_path)
