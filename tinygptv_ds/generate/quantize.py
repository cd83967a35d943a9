"""Linear layers with weights of 8 or 4 bit, for inference, by bitsandbytes.

8 bit is its LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): inputs are rounded to 8 bit, too, but for columns with
outliers in any row of the batch. 4 bit is NF4 (Dettmers et al. 2023, arXiv 2305.14314) with inputs as they are.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.lora import LoRALinear

_BLOCK = 64  # weights of NF4 that share a scale; its layers on a CPU take whole blocks only
_OUTLIER = 6.0  # from this size on inputs of LLM.int8() stay in 16 bit, as published


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
    # It warns of every cast to fp16, which is how it works, and of a kernel that might be fetched from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    width_out, width_in = weight.shape
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(width_in, width_out, has_fp16_weights=False, threshold=_OUTLIER, device="meta")
        weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    else:
        if width_in % _BLOCK:
            raise ConfigError(
                f"4 bits need layers whose inputs are a multiple of {_BLOCK} wide; here one has {width_in}. Take 8"
            )
        layer = bnb.nn.Linear4bit(width_in, width_out, compute_dtype=dtype, quant_type="nf4", device="meta")
        weight = bnb.nn.Params4bit(
            weight.float(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
        )
    layer.weight = weight.to(device)  # is quantised by this
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer.eval()  # in training mode it quantises its weight again each time
    if device.type == "cpu":
        with torch.no_grad():  # on a CPU it puts its weight into another order when first used: better one by one
            layer(torch.zeros(1, width_in, dtype=dtype))
    return layer


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
