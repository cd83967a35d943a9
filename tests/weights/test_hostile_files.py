"""Malicious files: each is an error of one line, in bounded time and memory, and none of their code runs."""

import json
import math
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import float32, zeros

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.detect import open_any
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.inspect import inspect
from tinygptv_ds.weights.io import Stored, read_json
from tinygptv_ds.weights.opening import model_weights


def archive(path: Path, pickled: bytes, storage: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> Path:
    """Write what torch.save would, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in (
            ("data.pkl", pickled),
            ("version", b"3\n"),
            ("byteorder", b"little"),
            ("data/0", storage),
        ):
            file.writestr(f"archive/{name}", content)
    return path


def tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Pickle a dictionary with one tensor that claims to be of this size."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu\x8a\x08" + struct.pack("<q", count)
    return (
        b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + b"tQ\x8a\x08" + struct.pack("<q", offset))
        + (numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtRs.")
    )


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor(1 << 40, (1 << 40,), (1,)), r"claims 4,398,046,511,104 bytes .*, but the file has"),
        (tensor(4, (1 << 36,), (0,)), "claims 274,877,906,944 bytes"),
        (tensor(4, (2, 1 << 20), (1, 0)), "claims 8,388,608 bytes"),
        (tensor(4, (4,), (1,), 1 << 40), "claims 16 bytes from position"),
        (tensor(4, (4,), (1,), -100), "damaged, cut short"),
        (tensor(4, (-4,), (1,)), "damaged, cut short"),
        (b"\x80\2" + b"]" * 20000 + b"a" * 19999 + b".", "nested more than 64 deep"),
        (b"\x80\2)" + b"\x85" * 20000 + b".", "nested more than 64 deep"),
        # Each list holds the one before twice: 2^40 values in 500 bytes.
        (
            b"\x80\2]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(40)) + b".",
            "of more than 500,000 values",
        ),
        (b"\x80\2Nr" + struct.pack("<I", 1 << 27) + b".", "no state dict"),
        (b"\x80\2cos\nsystem\n(X\4\0\0\0exittR.", "not opened because unpickling could run code"),
    ],
)
def test_pickles(pickled: bytes, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = archive(tmp_path / "x.pth", pickled)
    with pytest.raises(WeightsError, match=message) as raised:
        for stored in open_weights(path).values():
            stored.read()
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_the_right_archive_opens(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", tensor(4, (2, 2), (2, 1)))
    assert open_weights(path)["w"].read().tolist() == [[0, 0], [0, 0]]


def test_a_compressed_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", tensor(1 << 20, (1 << 20,), (1,)), bytes(1 << 22), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"a compressed archive, which torch.save does not write"):
        open_weights(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(70_000_000))
    with pytest.raises(WeightsError, match="its pickle takes 70,000,000 bytes"):
        open_weights(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}', "damaged or cut short"),
        (b'{"a":' * 50000 + b"1" + b"}" * 50000, "recursion limit"),
        (
            json.dumps(
                {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
            ).encode(),
            "its header would take",
        ),
        (b'{"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', "damaged or cut short"),
    ],
)
def test_headers_of_safetensors(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(WeightsError, match=message):
        open_weights(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + header)
    with pytest.raises(WeightsError, match="its header would take 4,611,686,018,427,387,904 bytes"):
        open_weights(path)


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a valid safetensors file that takes no place on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (1 << 15, "w1 of shape .* takes 4,429,185,024 bytes, more than any weight"),
        (1 << 17, "more than any weight|bytes cannot be mapped"),
    ],
)
def test_sparse_files(side: int, message: str, tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.safetensors", {"w0": (4, 4), "w1": (side, side + 1024)})
    with pytest.raises(WeightsError, match=message) as raised:
        open_weights(path)
    assert "\n" not in str(raised.value)


def test_a_tensor_for_which_there_is_no_memory(tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.safetensors", {"w0": (1 << 14, 1 << 16)})
    script = f"""
import resource
from pathlib import Path
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.inspect import inspect
stored = open_weights(Path({str(path)!r}))["w0"]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
try:
    stored.read()
except WeightsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "there is no memory for 4,294,967,296 bytes of one tensor" in done.stdout


def test_many_empty_tensors_open_at_once(tmp_path: Path) -> None:
    """Reading one does not read the whole header again."""
    save_file({f"w{i}": zeros(0) for i in range(2_000)}, tmp_path / "x.safetensors")
    assert sum(stored.read().numel() for stored in open_weights(tmp_path / "x.safetensors").values()) == 0


@pytest.mark.parametrize(
    "text", ["[" * 50_000 + "]" * 50_000, '{"a":' * 200_000, '{"weight_map": {"w": ' + "9" * 5000 + "}}"]
)
def test_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json: not JSON") as raised:
        read_json(path)
    assert len(str(raised.value)) < 500
    with pytest.raises(WeightsError, match=r"index\.json: not JSON"):
        open_any(tmp_path)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([f"s{i}.safetensors" for i in range(10_001)], "names 10,001 shards"),
        (["a" * 5000], "must be in the same folder"),
        (["a\0b"], "must be in the same folder"),
        ([".."], "are missing"),
        ([["a.safetensors"]], "are missing"),
    ],
)
def test_indexes(shards: list, message: str, tmp_path: Path) -> None:
    index = {"weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message) as raised:
        open_weights(tmp_path)
    assert len(str(raised.value)) < 6000


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    save_file({"../../x\n\x1b[31mRED": zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"holds \.\./\.\./x\\n\\x1b\[31mRED") as raised:
        open_any(tmp_path / "x.safetensors")
    assert "\x1b" not in str(raised.value) and "\n" not in str(raised.value)


def phi_shapes(layers: range | tuple, side: int = 4, **changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a Phi without added norms, with layers of any numbers."""
    square, wide = (side, side), (side,)
    layer = {f"self_attn.{part}": (square, wide) for part in ("q_proj", "k_proj", "v_proj", "dense")}
    layer |= {"mlp.fc1": (square, wide), "mlp.fc2": (square, wide), "input_layernorm": (wide, wide)}
    shapes = {"model.embed_tokens.weight": square, "lm_head.weight": square, "lm_head.bias": wide}
    shapes |= {"model.final_layernorm.weight": wide, "model.final_layernorm.bias": wide} | changes
    for number in layers:
        for name, (weight, bias) in layer.items():
            shapes |= {f"model.layers.{number}.{name}.weight": weight, f"model.layers.{number}.{name}.bias": bias}
    return shapes


PROJECTIONS = {
    f"{name}.{part}": shape
    for name in ("llama_proj", "llama_proj2")
    for part, shape in (("weight", (1, 1)), ("bias", (1,)))
}
BLIP2 = {
    "query_tokens": (1, 4, 4),
    "Qformer.bert.encoder.layer.0.crossattention.self.key.weight": (4, 4),
    "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight": (4, 4),
    "Qformer.bert.encoder.layer.70000.attention.self.key.weight": (4, 4),
}
EVA = {
    "cls_token": (1, 1, 4),
    "pos_embed": (1, 5, 4),
    "patch_embed.proj.weight": (4, 3, 2, 2),
    "blocks.0.mlp.fc1.weight": (4, 4),
    "blocks.80000.mlp.fc1.weight": (4, 4),
}


@pytest.mark.parametrize(
    "shapes",
    [
        phi_shapes((0, 99_999)),
        phi_shapes((0, 10**30)),
        phi_shapes((0, "9" * 5000)),
        phi_shapes(range(501)),
        {f"llama_model.model.layers.{i}.post_layernorm.weight": (1,) for i in range(2_000)}
        | {
            f"llama_proj{n}.{kind}": (1, 1)[: 2 if kind == "weight" else 1]
            for n in ("", "2")
            for kind in ("weight", "bias")
        },
        EVA,
        BLIP2,
    ],
)
def test_layers_that_no_model_has_are_not_built(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    start = time.process_time()
    report = inspect(sparse(tmp_path / "x.safetensors", shapes))
    assert "no model of this kind has so many layers (at most 500)" in report.incomplete
    assert len(report.incomplete) < 1500 and time.process_time() - start < 2


def test_sparse_files_are_refused_by_their_header(tmp_path: Path) -> None:
    """Neither hashed nor read."""
    start = time.process_time()
    shapes = phi_shapes(range(2), side=10_000) | {"surprise": (30_000, 30_000)}
    report = inspect(sparse(tmp_path / "x.safetensors", shapes))
    assert (report.files, report.not_finite, report.incomplete) == ({}, [], "unexpected: language_model.surprise")
    assert time.process_time() - start < 2


def test_more_tensors_than_any_model_has() -> None:
    """Each of them might be of the model."""
    tensors = {f"w{number}": Stored((1 << 30,), float32, lambda: pytest.fail("read")) for number in range(17)}
    with pytest.raises(WeightsError, match=r"its tensors take 73,014,444,032 bytes, more than this model in any dtype"):
        model_weights(tensors, Path("x"))
