"""Frozen linear layers in 4 and 8 bit: their rounding, their gradients, and what they keep."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.quantized_linear import QuantizedLinear, QuantizedLoRALinear, quantize_layers

WIDE = 512  # inputs and outputs


class Holder(nn.Module):
    """Layers under the names of the model's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Module()])})})
        self.language_model["model"]["layers"][0].mlp = nn.ModuleDict({"fc1": layer})


def quantized(layer: nn.Linear, bits: int) -> QuantizedLinear:
    weight = layer.weight.detach().clone()
    (made,) = quantize_layers(Holder(layer), bits, vision=False).values()
    made.store(weight)
    return made


@pytest.fixture(params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(WIDE, WIDE) * 0.02


@pytest.fixture
def layer(bits: int, weight: Tensor) -> QuantizedLinear:
    plain = nn.Linear(WIDE, WIDE)
    plain.weight.data.copy_(weight)
    return quantized(plain.requires_grad_(False), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(layer: QuantizedLinear, weight: Tensor, dtype: torch.dtype) -> None:
    """The errors are those of the table in the module, which normal values have."""
    restored = layer.dequantize(dtype)
    assert restored.dtype == dtype and restored.shape == weight.shape
    error = (restored.float() - weight).pow(2).mean().sqrt() / weight.std()
    assert 0.9 < error / {8: 0.0070, 4: 0.092}[layer.bits] < 1.1


def test_values_are_bitsandbytes_own(weight: Tensor) -> None:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    plain = nn.Linear(WIDE, WIDE)
    plain.weight.data.copy_(weight)
    made = quantized(plain, 4)
    assert torch.equal(made.dequantize(torch.float32), functional.dequantize_4bit(packed, state))


def test_it_takes_what_is_documented(layer: QuantizedLinear, weight: Tensor) -> None:
    """Bytes for each weight, apart from the table of 1 KiB that every layer has."""
    stored = sum(buffer.nbytes for buffer in layer.buffers()) - 1024
    assert stored / weight.numel() == pytest.approx({4: 0.516, 8: 1.016}[layer.bits], abs=0.0005)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_forward_and_backward_are_those_of_the_restored_weight(layer: QuantizedLinear) -> None:
    x = torch.randn(7, WIDE, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    upstream = torch.randn(7, WIDE)
    (layer(x) * upstream).sum().backward()
    (F.linear(again, layer.dequantize(torch.float32), layer.bias) * upstream).sum().backward()
    assert torch.equal(layer(x), F.linear(again, layer.dequantize(torch.float32), layer.bias))
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-6)
    assert layer.bias.grad is None


def test_nothing_is_kept_for_the_backward_pass(layer: QuantizedLinear) -> None:
    """Neither the input nor a restored weight: that is what saves the memory."""
    saved: list[Tensor] = []
    x = torch.randn(7, WIDE, requires_grad=True)
    inner = x * 1.0
    gone = weakref.ref(inner)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(inner)
    del inner
    gc.collect()
    assert saved == [] and gone() is None
    out.sum().backward()
    assert x.grad is not None


def test_autocast(layer: QuantizedLinear) -> None:
    x = torch.randn(7, WIDE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16()))
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_casts_and_state_dicts_pass_it_over(layer: QuantizedLinear) -> None:
    """DeepSpeed casts whole models: a scale in 16 bit would be another weight."""
    before = layer.dequantize(torch.float32)
    layer.bfloat16().float()
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert set(layer.state_dict()) == {"bias"}


def test_lora_trains_next_to_it(bits: int) -> None:
    torch.manual_seed(0)
    plain = LoRALinear(WIDE, WIDE, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    nn.init.normal_(plain.lora_B.weight)
    a, b, scaling = plain.lora_A.weight, plain.lora_B.weight, plain.scaling
    made = quantized(plain, bits)
    assert isinstance(made, QuantizedLoRALinear) and made is plain
    assert {name for name, _ in made.named_parameters()} == {"bias", "lora_A.weight", "lora_B.weight"}
    x = torch.randn(7, WIDE, requires_grad=True)
    out = made(x)
    expected = F.linear(x, made.dequantize(torch.float32), made.bias) + x @ a.T @ b.T * scaling
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert a.grad is not None and a.grad.any() and b.grad is not None and b.grad.any()


def test_a_layer_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"whole blocks of 64, and .*fc1.weight has 35 elements"):
        quantize_layers(Holder(nn.Linear(5, 7)), 4, vision=False)


def test_whole_blocks_are_counted_over_rows(bits: int) -> None:
    """A layer may be narrower than a block."""
    torch.manual_seed(0)
    plain = nn.Linear(16, 96)
    true = plain.weight.detach().clone()
    made = quantized(plain, bits)
    assert (made.dequantize(torch.float32) - true).norm() < (0.01 if bits == 8 else 0.15) * true.norm()


def test_no_graph_breaks(layer: QuantizedLinear) -> None:
    """It can be part of a compiled block, forward and backward."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, WIDE, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    layer(again).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, again.grad)
