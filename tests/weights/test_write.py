"""What is written tensor by tensor is what safetensors itself reads, for any shapes, dtypes and sizes of shards."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.files import whole_file, whole_folder
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.io import in_memory
from tinygptv_ds.weights.safetensors_writer import write_file, write_weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=5), st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1
)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Laid out column by column where that is possible, as a transposed weight is."""
    return torch.randint(0, 2, shape[::-1]).to(dtype).permute(tuple(reversed(range(len(shape)))))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


@settings(deadline=None, max_examples=60)
@given(made=TENSORS, shard_bytes=st.integers(1, 200))
def test_any_tensors(tmp_path_factory, made: dict, shard_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("weights")
    state = {name: values(*each) for name, each in made.items()}
    write_weights(folder, {name: in_memory(t) for name, t in state.items()}, shard_bytes=shard_bytes)
    assert_same({n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}, state)
    assert_same({name: stored.read() for name, stored in open_weights(folder).items()}, state)


@settings(deadline=None, max_examples=30)
@given(made=TENSORS)
def test_every_tensor_lies_at_a_multiple_of_its_size(tmp_path_factory, made: dict) -> None:
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    write_file(path, {name: in_memory(values(*each)) for name, each in made.items()})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % made[name][1].itemsize == 0


@settings(deadline=None, max_examples=60)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_parts_of_a_tensor_in_a_pytorch_file(tmp_path_factory, shape, dtype, transposed: bool, cut: tuple) -> None:
    """Also of one that shares its storage, and of one whose values are not in order."""
    path = tmp_path_factory.mktemp("weights") / "x.pth"
    whole = torch.randint(0, 2, (3, *shape)).to(dtype)
    tensor = whole[1].T if transposed and len(shape) == 2 else whole[1]
    torch.save({"whole": whole, "part": tensor}, path)
    stored = open_weights(path)["part"]
    assert torch.equal(stored.read(), tensor)
    begin, end = sorted(round(c * tensor.numel()) for c in cut)
    assert torch.equal(stored.flat(begin, end), tensor.flatten()[begin:end])


def test_a_file_cut_short_behind_its_back(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.pth")
    stored = open_weights(tmp_path / "x.pth")["a"]
    with (tmp_path / "x.pth").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(WeightsError, match="cut short"):
        stored.read()


def test_whole_or_nothing(tmp_path: Path) -> None:
    for make, name in ((whole_folder, "folder"), (whole_file, "file")):
        with pytest.raises(RuntimeError), make(tmp_path / name) as partial:
            (partial / "x" if partial.is_dir() else partial).write_text("half")
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "x").write_text("one")
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "y").write_text("two")
        assert (tmp_path / "folder/x").read_text() == "one"  # there until the new one is whole
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "y"]
