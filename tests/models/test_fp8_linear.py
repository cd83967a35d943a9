"""Frozen linear layers in fp8: their rounding, their gradients, and what the GPU's kernel is given."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models import fp8_linear
from tinygptv_ds.models.fp8_linear import Fp8Linear, Fp8LoRALinear, check_fp8_device, to_e4m3
from tinygptv_ds.models.lora import LoRALinear

IN, OUT, TOKENS = 352, 512, 7


def in_fp8(layer: nn.Linear) -> Fp8Linear:
    """Return the layer, changed in place as `use_fp8` does."""
    weight = layer.weight.detach().clone()
    layer.__class__ = Fp8LoRALinear if isinstance(layer, LoRALinear) else Fp8Linear
    assert isinstance(layer, Fp8Linear)
    layer.forget_weight()
    layer.store(weight)
    return layer


@pytest.fixture
def plain() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    layer.weight.mul_(torch.logspace(-3, 3, OUT)[:, None])  # every output has a scale of its own
    return layer


@pytest.fixture
def layer(plain: nn.Linear) -> Fp8Linear:
    return in_fp8(copy.deepcopy(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_close(plain: nn.Linear, layer: Fp8Linear, dtype: torch.dtype) -> None:
    """Four significant bits in weight and input: each output row is within 4 %, though their scales differ by 1e6."""
    layer.bias.zero_()
    x = torch.randn(200, IN)
    found, true = layer(x.to(dtype)).float(), F.linear(x, plain.weight)
    assert found.shape == (200, OUT)
    assert F.cosine_similarity(found.T, true.T).min() > 0.9985
    assert 0.01 < ((found - true).norm() / true.norm()) < 0.045
    restored = layer.dequantize(dtype)
    assert restored.dtype == dtype
    errors = (restored.float() - plain.weight).norm(dim=1) / plain.weight.norm(dim=1)
    assert errors.max() < 0.035 and errors.min() > 0.015


def test_gradient_of_the_input_is_that_of_the_restored_weight(layer: Fp8Linear) -> None:
    x, upstream = torch.randn(2, TOKENS, IN, requires_grad=True), torch.randn(2, TOKENS, OUT)
    (layer(x) * upstream).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, upstream @ layer.dequantize(torch.float32))
    assert layer.bias.grad is None


def test_lora_trains_next_to_it() -> None:
    """Its gradients are those that it has next to the plain layer: it reads the unrounded input."""
    torch.manual_seed(0)
    plain = LoRALinear(IN, OUT, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    plain.weight.requires_grad_(False)
    plain.bias.requires_grad_(False)
    nn.init.normal_(plain.lora_B.weight)
    made = in_fp8(copy.deepcopy(plain))
    x, again = (torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "12")
    upstream = torch.randn(TOKENS, OUT)
    (made(x) * upstream).sum().backward()
    plain.weight.copy_(made.dequantize(torch.float32))
    (plain(again) * upstream).sum().backward()
    for name in ("lora_A.weight", "lora_B.weight"):
        torch.testing.assert_close(made.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-4)


def test_a_token_depends_on_no_other() -> None:
    x = torch.randn(TOKENS, IN) * torch.logspace(-4, 4, TOKENS)[:, None]
    codes, scales = to_e4m3(x)
    for row in range(TOKENS):
        alone, scale = to_e4m3(x[row : row + 1])
        assert torch.equal(alone.view(torch.uint8), codes[row : row + 1].view(torch.uint8))
        assert scale == scales[row] and codes[row].float().abs().max() == 448


def test_zeros_and_what_is_not_finite(layer: Fp8Linear) -> None:
    x = torch.zeros(3, IN)
    x[1, 0], x[2, 0] = torch.nan, torch.inf
    out = layer(x)
    assert torch.equal(out[0], layer.bias) and out[1:].isnan().all()
    assert layer(x[:0]).shape == (0, OUT)


def test_autocast(layer: Fp8Linear) -> None:
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x.bfloat16()))
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_casts_and_state_dicts_pass_it_over(layer: Fp8Linear) -> None:
    before = layer.dequantize(torch.float32)
    layer.bfloat16().float()
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert set(layer.state_dict()) == {"bias"} == {name for name, _ in layer.named_parameters()}
    assert sum(buffer.nbytes for buffer in layer.buffers()) == OUT * IN + 4 * OUT


def test_neither_input_nor_weight_is_kept_for_the_backward_pass(layer: Fp8Linear) -> None:
    saved: list[Tensor] = []
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved == []


def test_no_graph_breaks(layer: Fp8Linear) -> None:
    """It can be part of a compiled block, forward and backward."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(TOKENS, IN, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    layer(again).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, again.grad)


class Products(TorchDispatchMode):
    """Records operands and results of `torch._scaled_mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_mm.default:
            self.calls.append((args, out))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_kernel_is_given(dtype: torch.dtype) -> None:
    """On a GPU without values: torch's own checks of `_scaled_mm` run, and the operands are what its kernels need."""
    with FakeTensorMode(), torch.device("cuda"), Products() as products:
        layer = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
        layer.__class__ = Fp8Linear
        layer.forget_weight()
        x = torch.empty(2, TOKENS, IN, dtype=dtype)
        out = layer(x)
    assert (out.shape, out.dtype) == ((2, TOKENS, OUT), dtype)
    (((a, b, of_a, of_b, *_), product),) = products.calls
    assert product.dtype == torch.bfloat16
    assert a.dtype == b.dtype == torch.float8_e4m3fn and of_a.dtype == of_b.dtype == torch.float32
    assert (a.shape, b.shape) == ((2 * TOKENS, IN), (IN, OUT))
    assert (a.stride(), b.stride()) == ((IN, 1), (1, IN))  # by rows, and by columns
    assert (of_a.shape, of_b.shape) == ((2 * TOKENS, 1), (1, OUT)) and of_a.is_contiguous() and of_b.is_contiguous()


@pytest.mark.parametrize("sizes", [(IN, 24), (24, OUT)])
def test_other_widths_are_multiplied_in_16_bit(sizes: tuple[int, int]) -> None:
    with FakeTensorMode(), torch.device("cuda"), Products() as products:
        layer = nn.Linear(*sizes, dtype=torch.bfloat16).requires_grad_(False)
        layer.__class__ = Fp8Linear
        layer.forget_weight()
        assert layer(torch.empty(3, sizes[0], dtype=torch.bfloat16)).shape == (3, sizes[1])
    assert products.calls == []


def test_a_kernel_with_these_operands_gives_the_simulated_values(layer: Fp8Linear) -> None:
    """The product by hand in fp64, from what the kernel is given: scales belong to tokens and to outputs."""
    x = torch.randn(TOKENS, IN)
    (codes, of_tokens), (weight, of_weight) = to_e4m3(x), layer.operand()
    by_hand = (codes.double() @ weight.t().double()) * of_tokens.double() * of_weight.t().double() + layer.bias
    torch.testing.assert_close(layer(x).double(), by_hand, rtol=1e-4, atol=1e-4)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8_device(torch.device("cpu"))
    monkeypatch.setattr(fp8_linear.torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, allowed in {(8, 0): False, (8, 6): False, (8, 9): True, (9, 0): True, (12, 0): True}.items():
        monkeypatch.setattr(fp8_linear.torch.cuda, "get_device_capability", lambda device, value=capability: value)
        if allowed:
            check_fp8_device(torch.device("cuda"))
            continue
        words = f"capability 8.9 or higher (Ada, Hopper or newer), and NVIDIA A100 has {capability[0]}.{capability[1]}"
        with pytest.raises(ConfigError, match=re.escape(words)):
            check_fp8_device(torch.device("cuda"))
