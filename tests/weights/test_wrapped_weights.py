"""Weights with something around them load like the plain ones; what cannot be read is named as what it is."""

import itertools
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from helpers.weight_layouts import PHI, blip2_state, eva_state, phi_state, save_phi
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.paths import local_path
from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights import convert as convert_verb
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.detect import open_any
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.inspect import inspect

State = dict[str, Tensor]
SEGMENTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PREFIXES = [
    *(f"{segment}." for segment in (*SEGMENTS, "visual", "model", "backbone")),
    *(f"{first}.{second}." for first, second in itertools.permutations(("module", "visual", "model"), 2)),
    "module._orig_mod._fsdp_wrapped_module.model.visual.",
]
NESTS = [
    ("model",),
    ("module",),
    ("state_dict",),
    ("model_state_dict",),
    ("state_dict", "model"),
    ("model", "module", "state_dict"),
    ("net",),
]
KINDS = ["phi", "eva_vit", "blip2", "trained"]


def state_of(kind: str, values: State, trained: State) -> State:
    if kind == "phi":
        return phi_state(values, "split")
    return {"eva_vit": eva_state, "blip2": blip2_state}[kind](values) if kind != "trained" else trained


def opened_state(path: Path) -> State:
    return {name: stored.read() for name, stored in open_any(path).stored.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes(kind: str, values: State, trained: State, tmp_path: Path) -> None:
    state = state_of(kind, values, trained)
    file = tmp_path / "wrapped.pth"
    for prefix in PREFIXES:
        torch.save({prefix + name: tensor for name, tensor in state.items()}, file)
        assert_same(opened_state(file), state)
    # FSDP and torch.compile wrap single blocks, too, and what lies next to the model is left out by name.
    inner = {name.replace("layers.1.", "layers.1._fsdp_wrapped_module."): tensor for name, tensor in state.items()}
    inner = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in inner.items()}
    torch.save({f"model.{name}": tensor for name, tensor in inner.items()} | {"logit_scale": torch.ones(1)}, file)
    assert_same(opened_state(file), state)
    assert "logit_scale" in open_any(file).ignored


@pytest.mark.parametrize("kind", KINDS)
def test_nesting(kind: str, values: State, trained: State, tmp_path: Path) -> None:
    state = state_of(kind, values, trained)
    file = tmp_path / "nested.pth"
    for keys in NESTS:
        content: dict = OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
        for key in reversed(keys):
            content = {"epoch": torch.tensor(3), key: content} if key in ("model", "state_dict") else {key: content}
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
        torch.save(content, file)
        assert_same(opened_state(file), state)
        assert "optimizer" in open_any(file).notes


def test_the_model_is_built_from_wrapped_files(base: Callable[..., ModelSection], tmp_path: Path) -> None:
    def wrapped(state: State) -> State:
        return {f"module.model.visual.{name}": tensor for name, tensor in state.items()}

    plain = base()
    expected = build_model(plain, TextSection(), frozen_dtype=torch.float32).state_dict()
    shutil.rmtree(Path(plain.phi).parent)
    found = build_model(base(phi=wrapped, eva=wrapped, qformer=wrapped), TextSection(), frozen_dtype=torch.float32)
    same = {name for name, tensor in found.state_dict().items() if torch.equal(tensor, expected[name])}
    assert expected.keys() - same <= {name for name in expected if name.startswith("llama_proj")}  # random


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.blocks.0.x": torch.ones(1), "b.blocks.0.x": torch.ones(1)}, r"2 models of this kind .* under a\., b\."),
        ({"blocks.0.x": torch.ones(1), "module.blocks.0.x": torch.ones(1)}, "two tensors are blocks.0.x"),
        ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "shards of FSDP, .*FULL_STATE_DICT"),
        ({"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, "2 state dicts, under student, teacher"),
        ({"unknown": torch.ones(1)}, "holds unknown: neither Phi, nor EVA ViT"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, "no state dict .*; it holds optimizer"),
    ],
)
def test_what_is_not_clear_is_refused(state: dict, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        open_any(tmp_path / "x.pth")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 5000\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "a Git LFS pointer to a file of 5,000 bytes, .* `git lfs pull` .* `hf download"),
        (b"", "cut short: empty"),
        (b"\0" * 4096, "zeros alone"),
        (b"<!DOCTYPE html><html><body>Sign in", "a web page.* `hf download"),
        (b"\x1f\x8b\x08" + b"x" * 90, "a gzip archive: unpack it"),
        (b"GGUF" + b"\3" * 99, "quantized for llama.cpp"),
        (b"Invalid username or password." + b" " * 60, "text that begins 'Invalid username or password.'"),
        (b"PK\3\4" + b"x" * 99, "cut short: an archive of torch.save without its end"),
    ],
)
def test_other_files_are_named(content: bytes, message: str, tmp_path: Path, values: State) -> None:
    """Alone, and as the weights or the configuration of a folder; no message asks to download what is intact."""
    file = tmp_path / "eva_vit_g.pth"
    file.write_bytes(content)
    folder = save_phi(tmp_path / "phi", phi_state(values, "split"))
    (folder / "model.safetensors").write_bytes(content)
    for path in (file, folder):
        with pytest.raises(WeightsError, match=message):
            open_any(path)


def test_pointers_next_to_the_weights(base: Callable[..., ModelSection]) -> None:
    section = base()
    for name in ("tokenizer.json", "config.json"):
        (Path(section.phi) / name).write_bytes(LFS)
        with pytest.raises(WeightsError, match=rf"{name}: a Git LFS pointer"):
            build_model(section, TextSection(), frozen_dtype=torch.float32)


def test_unfinished_downloads(tmp_path: Path, values: State) -> None:
    folder = save_phi(tmp_path / "phi", phi_state(values, "split"), "many safetensors")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00002-of-00002.safetensors.incomplete")
    with pytest.raises(
        WeightsError, match=r"1 of the 2 shards .*; a download has not finished \(model-00002.*`hf down"
    ):
        open_weights(folder)
    with pytest.raises(WeightsError, match="a download that has not finished"):
        open_any(folder / "model-00002-of-00002.safetensors.incomplete")
    only = tmp_path / "only"
    (only / ".cache/huggingface/download").mkdir(parents=True)
    (only / ".cache/huggingface/download/abc.incomplete").touch()
    with pytest.raises(WeightsError, match=r"no weights there .*; a download has not finished \(abc.incomplete\)"):
        open_any(only)


@pytest.fixture
def cache(tmp_path: Path, values: State) -> Path:
    """A Phi as the Hub cache keeps it."""
    plain = save_phi(tmp_path / "plain", phi_state(values, "split"), "many safetensors")
    folder = tmp_path / "hub/models--microsoft--phi-2"
    snapshot = folder / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123abc\n")
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(folder / f"blobs/{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return folder


def test_the_hub_cache(cache: Path, base: Callable[..., ModelSection], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder of a model, the snapshot, and both written with ~."""
    monkeypatch.setenv("HOME", str(cache.parents[1]))
    expected = base()
    raw = {"stage": 1, "data": {"datasets": [{"name": "x", "shards": "x"}]}, "optimizer": {"lr": 1.0, "min_lr": 1.0}}
    raw["train"] = {"batch_size": 1, "micro_batch_size": 1}
    for path in (cache, cache / "snapshots", cache / "snapshots/0123abc", "~/hub/models--microsoft--phi-2"):
        model = {"phi": str(path), "eva_vit": "~/base/eva_vit_g.pth", "qformer": expected.qformer}
        section = build_recipe({**raw, "model": model}, "x").model
        assert section.phi == str(cache / "snapshots/0123abc")
        assert section.eva_vit == expected.eva_vit
        assert len(open_any(Path(path)).stored) == len(open_any(Path(expected.phi)).stored)
    (cache / "refs/main").unlink()
    assert local_path(cache) == cache / "snapshots/0123abc"
    with pytest.raises(WeightsError, match=r"the blobs of the Hub cache, .* name the folder snapshots"):
        open_any(cache / "blobs")
    (cache / "snapshots/4567def").mkdir()
    with pytest.raises(WeightsError, match=r"several snapshots: name one, e.g. snapshots/4567def"):
        open_any(cache)
    (cache / "snapshots/4567def").rmdir()
    for blob in (cache / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(WeightsError, match=r"links to a file that is missing|shards .* are missing"):
        open_any(cache)
    with pytest.raises(WeightsError, match=r"a link to .*, which does not exist"):
        open_any(cache / "snapshots/0123abc/model-00001-of-00002.safetensors")


def test_a_name_of_the_hub_is_no_path() -> None:
    with pytest.raises(WeightsError, match="`hf download microsoft/phi-2 --local-dir weights/phi-2`"):
        open_any(Path("microsoft/phi-2"))


def quantized(state: State, scheme: str) -> State:
    """Quantize the linear layers of Phi's blocks."""
    found: State = {}
    for name, tensor in state.items():
        if tensor.dim() != 2 or ".layers." not in name:
            found[name] = tensor
            continue
        layer, most = name.removesuffix(".weight"), tensor.abs().amax(1)
        if scheme == "none":
            found[name] = (tensor / most[:, None] * 127).round().to(torch.int8)
        elif scheme == "bitsandbytes":
            found |= {name: (tensor / most[:, None] * 127).round().to(torch.int8), f"{layer}.SCB": most}
            found[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        elif scheme == "fp8":
            found |= {name: (tensor / most.max()).to(torch.float8_e4m3fn), f"{layer}.weight_scale": most.max()}
        elif scheme == "nf4":
            found |= {name: torch.zeros(9, 1, dtype=torch.uint8), f"{layer}.weight.absmax": most}
        else:
            found |= {f"{layer}.qweight": torch.zeros(4, 4, dtype=torch.int32), f"{layer}.scales": most.half()}
    return found


@pytest.mark.parametrize("scheme", ["bitsandbytes", "fp8"])
def test_weights_with_scales_are_restored(
    scheme: str, base: Callable[..., ModelSection], values: State, tmp_path: Path
) -> None:
    folder = save_phi(tmp_path / "q", quantized(phi_state(values, "split"), scheme))
    model = build_model(base(phi_folder=folder), TextSection(), frozen_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("query_key_value.weight", "fc1.weight")):
            assert torch.allclose(
                parameter, values[name], atol=values[name].abs().max() / (100 if scheme != "fp8" else 12)
            )
    assert inspect(folder).incomplete == ""


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("none", r"integers without the scale that they were quantized with: .*\.weight is int8"),
        ("nf4", r"quantized to 4 bits by bitsandbytes .*dequantize\(\)"),
        ("gptq", "quantized by GPTQ or AWQ .* Take the model as it was before"),
    ],
)
def test_other_quantized_weights_are_named(
    scheme: str, message: str, base: Callable[..., ModelSection], values: State, tmp_path: Path
) -> None:
    folder = save_phi(tmp_path / "q", quantized(phi_state(values, "split"), scheme))
    with pytest.raises(WeightsError, match=message):
        build_model(base(phi_folder=folder), TextSection(), frozen_dtype=torch.float32)
    with pytest.raises(WeightsError, match=message):
        call(convert_verb, folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("part", ["phi", "eva", "qformer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_base_weights_is_named(part: str, value: float, base: Callable[..., ModelSection]) -> None:
    name = {"phi": "model.layers.1.self_attn.k_proj.weight", "eva": "blocks.0.norm1.bias", "qformer": "query_tokens"}[
        part
    ]

    def spoil(state: State) -> State:
        state = {other: tensor.clone() for other, tensor in state.items()}
        state[name].view(-1)[1] = value
        return state

    section = base(**{part: spoil})
    with pytest.raises(WeightsError, match=rf"{name} holds 1 values of .* that are NaN or Inf"):
        build_model(section, TextSection(), frozen_dtype=torch.float32)
    path = {"phi": section.phi, "eva": section.eva_vit, "qformer": section.qformer}[part]
    report = inspect(Path(path))
    assert (report.not_finite, report.incomplete) == ([name], f"NaN or Inf in {name}")


def test_sums_that_overflow_are_no_inf(tmp_path: Path) -> None:
    state = {"blocks.0.x": torch.full((4,), 3e38), "blocks.0.y": torch.full((1000,), 65504.0, dtype=torch.float16)}
    save_file(state, tmp_path / "x.safetensors")
    assert_same(opened_state(tmp_path / "x.safetensors"), state)


def test_another_models_configuration(base: Callable[..., ModelSection]) -> None:
    section = base()
    (Path(section.phi) / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(WeightsError, match="no Phi configuration but of 't5': name a folder of Phi-2"):
        build_model(section, TextSection(), frozen_dtype=torch.float32)
    (Path(section.phi) / "config.json").write_text(json.dumps(PHI | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"missing: .* its config.json is of another one") as raised:
        build_model(section, TextSection(), frozen_dtype=torch.float32)
    assert "again" not in str(raised.value)


def test_loaded_as_converted(values: State, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.visual.{n}": t for n, t in eva_state(values).items()}}, tmp_path / "w.pth")
    call(convert_verb, tmp_path / "w.pth", "--out", tmp_path / "out.safetensors")
    expected = {n: t for n, t in eva_state(values).items() if not n.startswith(("norm.", "head."))}
    assert_same(load_file(tmp_path / "out.safetensors"), expected)
