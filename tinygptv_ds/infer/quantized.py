"""Linear layers with weights of 8 or 4 bit, for inference.

4 bit is bitsandbytes' NF4 (Dettmers et al. 2023, arXiv 2305.14314), 8 bit on a GPU its LLM.int8() (arXiv 2208.07339).
On a CPU the latter multiplies in a way that takes 40 times as long as bf16, so that 8 bit is done by `Int8Linear` there
(benchmarks/README.md).
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.lora import LoRALinear

_FEW_ROWS = 12  # up to here torch's kernel on 8-bit weights beats widening them first (measured, AVX-512)
_BLOCK = 64  # weights of NF4 that share a scale; torch's kernel on 8-bit weights reads beyond rows of other lengths
_WIDENED = 1024  # rows of the weight that are widened at once: the copy stays in the cache


def quantized_linear(
    weight: Tensor, bias: Tensor | None, bits: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A linear layer that holds its weight in 8 or 4 bit.

    Args:
        weight: `[out, in]`, any floating dtype; not kept.
        bias: `[out]` in `dtype` on `device`, or None.
        bits: 8 or 4.
        dtype: of inputs and outputs.
        device: where the layer lies.

    Raises:
        ConfigError: the layer is too narrow for 4 bit.
    """
    if bits == 4 and weight.shape[1] % _BLOCK:
        raise ConfigError(
            f"4 bits need layers whose inputs are a multiple of {_BLOCK} wide; here one has {weight.shape[1]}. Take 8"
        )
    if bits == 8 and device.type == "cpu":
        return Int8Linear(weight, bias, dtype)
    # It warns that a faster kernel might be fetched from a hub, which is not wanted here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    shape = (weight.shape[1], weight.shape[0])
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*shape, bias=bias is not None, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False).to(
            device
        )
    else:
        layer = bnb.nn.Linear4bit(*shape, bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            weight.float(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
        ).to(device)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.eval()


class Int8Linear(nn.Module):
    """Weights of 8 bit with a scale for each output, inputs as they are; so rows do not depend on one another.

    Args:
        weight: `[out, in]`.
        bias: `[out]` or None.
        dtype: of inputs and outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= _FEW_ROWS and x.dtype == torch.bfloat16 and rows.shape[1] % _BLOCK == 0:
            out = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            out = (
                torch.cat([F.linear(rows, part.to(x.dtype)) for part in self.weight.split(_WIDENED)], dim=1)
                * self.scale
            )
        return (out if self.bias is None else out + self.bias).unflatten(0, x.shape[:-1])


class AdaptedLinear(nn.Module):
    """A quantised layer with the LoRA of the layer that it stands for, in 16 or 32 bit; computes as `LoRALinear`.

    Args:
        base: the quantised layer.
        adapted: whose LoRA is taken over.
    """

    def __init__(self, base: nn.Module, adapted: LoRALinear) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B, self.scaling = adapted.lora_A, adapted.lora_B, adapted.scaling

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling
