"""Compiled blocks: one graph for any batch, without a break, and the numbers of eager ones; or eager with a reason."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Blip2QFormerConfig

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.compiler import missing_compiler
from tinygptv_ds.models.configuration import PHI_2, EvaViTConfig, TinyGPTVConfig
from tinygptv_ds.models.parameters import always_fp32, lora, norms, projections, qformer, train_only, vit
from tinygptv_ds.models.phi import after_attention, before_attention
from tinygptv_ds.models.regions import CompileChoice, choose_compile, compile_blocks
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

IMAGE, QUERIES, SIDE = 29, 32, 28
# Lengths of the samples of a batch, and its images: several, one sample with one image, text alone, and so on.
SHAPES = [([70, 9, 40], 3), ([40], 1), ([6, 6], 0), ([99], 2), ([33, 4, 5, 6, 7], 1), ([80, 2], 2), ([2], 0)]


@pytest.fixture(autouse=True)
def fresh_dynamo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph of another test, compiled code in a folder of its own, and no processes for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    dynamo.reset()
    dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    dynamo.reset()


def make_model(dtype: torch.dtype = torch.float32, dropout: float = 0.3) -> TinyGPTVForConditionalGeneration:
    """Build a small model for stage 4, frozen weights in `dtype`; one image takes no padding, as in the published."""
    torch.manual_seed(0)
    phi = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "resid_pdrop": dropout,
    }
    config = TinyGPTVConfig(
        vision_config=EvaViTConfig(SIDE, 4, 16, 3, 2, 24),
        qformer_config=Blip2QFormerConfig(
            hidden_size=12, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, encoder_hidden_size=16
        ),
        text_config=PHI_2 | phi,
        num_query_tokens=QUERIES,
        proj_hidden_size=8,
        lora_r=2,
        lora_dropout=dropout,
    )
    model = TinyGPTVForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            parameter.data = parameter.data.to(torch.float32 if always_fp32(name) else dtype)
    for buffer in model.visual_encoder.buffers():
        buffer.data = buffer.data.to(dtype)
    train_only(model, projections, norms, lora)
    return model.train()


def batch(lengths: list[int], images: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths))
    row = torch.randint(1, 28, (sum(lengths),), generator=generator)
    places = images * QUERIES
    row[:places] = IMAGE
    return {
        "input_ids": row,
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "image_rows": torch.arange(places),
        "target_rows": torch.arange(places, len(row) - 1),
        "targets": row[places + 1 :],
        "pixel_values": torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "dropout_keys": torch.randint(-(2**62), 2**62, (len(row),), generator=generator),
    }


def run(model: TinyGPTVForConditionalGeneration, inputs: dict[str, Any], autocast: torch.dtype | None) -> list[Tensor]:
    """Return the losses and all gradients of one forward and backward pass."""
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(**inputs)
    (output.token_losses.sum() / 50 + output.anchor).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [output.token_losses.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


class Operations(TorchDispatchMode):
    """A counter of operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def graphs() -> int:
    """Return how many graphs have been compiled since the test began; none of them has a break."""
    assert not dynamo.utils.counters["graph_break"]
    return dynamo.utils.counters["stats"]["unique_graphs"]


def test_equal_to_eager_blocks_bit_for_bit() -> None:
    """Over batches of all shapes, with every, every second and no block recomputed, and with dropout; then without.

    LoRA's weights are cast together in the compiled model, and one by one in the eager one.

    There is one graph before and one after Phi's attention, and for one image and for several one of the ViT's blocks
    and one each of the Q-Former's layers with and without cross-attention. Validation adds a graph without gradients
    to Phi's two; generation grows its rows token by token and runs eagerly.
    """
    model = make_model(torch.bfloat16)
    phi = model.language_model.model
    names = list(model.state_dict())
    inputs = [batch(*shape) for shape in SHAPES]
    prompt = {
        "input_ids": torch.tensor([[1, *[IMAGE] * QUERIES, 5, 6]] * 2),
        "pixel_values": torch.cat([inputs[0]["pixel_values"][:1]] * 2),
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": None,
    }
    trained = [run(model, each, torch.bfloat16) for each in inputs]
    validated, answer = without_gradients(model, inputs, prompt)
    phi.cast_lora_together = True
    compile_blocks(model.train(), backend="aot_eager")
    assert list(model.state_dict()) == names
    for phi.gradient_checkpointing in (0, 1, 2):
        for each, eager in zip(inputs, trained, strict=True):
            for ours, theirs in zip(run(model, each, torch.bfloat16), eager, strict=True):
                assert torch.equal(ours, theirs), each["cu_seqlens"]
    assert graphs() == 2 + 2 * (1 + 2)
    for _ in range(2):
        losses, ours = without_gradients(model, inputs, prompt)
        assert all(map(torch.equal, losses, validated)) and torch.equal(ours, answer)
        run(model.train(), inputs[1], torch.bfloat16)
    assert graphs() == 2 * 2 + 2 * (1 + 2)


def without_gradients(
    model: TinyGPTVForConditionalGeneration, inputs: list[dict[str, Any]], prompt: dict[str, Any]
) -> tuple[list[Tensor], Tensor]:
    """Return the losses of validation and an answer, in bf16."""
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return [model(**each).token_losses for each in inputs], model.generate(**prompt)


def test_lora_is_cast_by_one_operation_each_way() -> None:
    """The same bits as cast one by one, with and without recomputed blocks; without autocast, nothing is cast."""
    model = make_model(torch.bfloat16)
    phi = model.language_model.model
    for recomputed in (0, 2):
        phi.gradient_checkpointing = recomputed
        found = []
        for together in (False, True):
            phi.cast_lora_together = together
            with Operations() as operations:
                found.append(run(model, batch(*SHAPES[0]), torch.bfloat16))
            assert operations.names["_foreach_copy_"] == 2 * together
        assert all(map(torch.equal, *found))
    whole = make_model()
    whole.language_model.model.cast_lora_together = True
    with Operations() as operations:
        run(whole, batch(*SHAPES[0]), None)
    assert not operations.names["_foreach_copy_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_equal_in_other_precisions(dtype: torch.dtype) -> None:
    """Text alone, with every block recomputed and with dropout, bit for bit."""
    autocast = None if dtype == torch.float32 else dtype
    model = make_model(dtype)
    shapes = [SHAPES[2], SHAPES[6]]
    expected = [run(model, batch(*shape), autocast) for shape in shapes]
    model.language_model.model.cast_lora_together = True
    compile_blocks(model, backend="aot_eager")
    model.language_model.model.gradient_checkpointing = 1
    for shape, eager in zip(shapes, expected, strict=True):
        for ours, theirs in zip(run(model, batch(*shape), autocast), eager, strict=True):
            assert torch.equal(ours, theirs), shape
    assert graphs() == 2


def test_a_trained_vision_path() -> None:
    """Compiled, recomputed and validated; what gradients are summed from comes in another order.

    Phi's blocks, which do not depend on what is trained before them, run eagerly.
    """
    model = make_model(dropout=0.0)
    for module in model.qformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    train_only(model, projections, norms, qformer, vit)
    model.train()
    with_images = [batch(*shape) for shape in SHAPES if shape[1]]
    expected = [run(model, each, None) for each in with_images]
    compile_blocks(model, backend="aot_eager")
    for layer in model.language_model.model.layers:
        layer.regions = before_attention, after_attention
    for model.recompute_vit in (False, True):
        for each, eager in zip(with_images, expected, strict=True):
            for ours, theirs in zip(run(model, each, None), eager, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    model.eval()
    with torch.no_grad():
        for each in with_images:
            model(**each)
    assert graphs() == 2 * 2 * (1 + 2)  # training and validation, one image and several


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Return what the package logs as warnings."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    yield found
    LOGGER.removeHandler(handler)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_what_cannot_be_compiled_runs_eagerly(pass_: str, warnings: list[str]) -> None:
    """One warning, with the reason, for all blocks and batches, even if only the backward pass cannot be compiled."""
    model = make_model()
    shapes = SHAPES[2:]  # text alone is first: Phi's blocks are those with a backward pass
    expected = [run(model, batch(*shape), None) for shape in shapes]
    compile_blocks(model, backend=broken_backend(pass_))
    for shape, eager in zip(shapes, expected, strict=True):
        for ours, theirs in zip(run(model, batch(*shape), None), eager, strict=True):
            assert torch.equal(ours, theirs)
    (warning,) = warnings
    assert warning.startswith("torch.compile failed in ")
    assert "all blocks run eagerly from here on" in warning
    assert "no such kernel" in warning


def broken_backend(pass_: str) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def fine(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph)

    def broken(graph: torch.fx.GraphModule, _: Any) -> Any:
        raise RuntimeError("no such kernel")

    if pass_ == "forward":
        return aot_autograd(fw_compiler=broken, bw_compiler=fine, inference_compiler=broken)
    return aot_autograd(fw_compiler=fine, bw_compiler=broken, inference_compiler=fine)


def test_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache, for the next start, unless the user names a folder or the cache cannot be written to."""
    compile_blocks(make_model(), backend="eager")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_blocks(make_model(), backend="eager")
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compile_blocks(make_model(), backend="eager")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache/tinygptv_ds/torchinductor")


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto compiles on GPUs alone; what is in the way is a reason for auto, and an error for true."""
    monkeypatch.setattr("tinygptv_ds.models.regions.missing_compiler", lambda device: None)
    assert choose_compile("auto", "cpu", 2) == CompileChoice(on=False)
    assert choose_compile("auto", "cuda", 1) == choose_compile(True, "cpu", 2) == CompileChoice(on=True)
    assert choose_compile(False, "cuda", 2) == choose_compile(False, "cpu", 3) == CompileChoice(on=False)
    choice = choose_compile("auto", "cuda", 3)
    assert not choice.on and choice.obstacle is not None and "ZeRO-3" in choice.obstacle
    choice = choose_compile("auto", "cuda", 2, frozen_bits=4)
    assert not choice.on and choice.obstacle is not None and "model.frozen_bits" in choice.obstacle
    monkeypatch.setattr("tinygptv_ds.models.regions.missing_compiler", lambda device: f"no compiler for {device}")
    assert choose_compile("auto", "cuda", 2) == CompileChoice(on=False, obstacle="no compiler for cuda")
    assert choose_compile("auto", "cpu", 2) == CompileChoice(on=False)
    with pytest.raises(ConfigError, match=r"model\.compile is true, but no compiler for cpu; auto trains without"):
        choose_compile(True, "cpu", 2)


def test_missing_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("tinygptv_ds.models.compiler.find_spec", lambda name: None)
    assert missing_compiler("cuda") == "Triton is not installed (pip install triton)"
    monkeypatch.setattr("tinygptv_ds.models.compiler.find_spec", lambda name: name)
    assert missing_compiler("cuda") == "there is no C compiler (install gcc or clang, or name one in CC)"
    assert missing_compiler("cpu") == "there is no C++ compiler (install g++, or name one in CXX)"
    (tmp_path / "cc9").touch(mode=0o755)
    monkeypatch.setenv("CC", "cc9 -O2")
    (tmp_path / "include").mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    assert str(missing_compiler("cuda")).startswith("Python's headers are missing")
    (tmp_path / "include/Python.h").touch()
    assert missing_compiler("cuda") is None
