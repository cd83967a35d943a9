"""Linear layers with 8-bit or 4-bit weights for inference, by bitsandbytes.

8 bit is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): inputs are rounded to 8 bit, too, except for columns with
outliers in any row of the batch. 4 bit is NF4 (Dettmers et al. 2023, arXiv 2305.14314) with unquantized inputs.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.lora import LoRALinear

_BLOCK = 64  # NF4 weights that share a scale; on a CPU its layers take only whole blocks
_OUTLIER = 6.0  # inputs of LLM.int8() of at least this size stay in 16 bit, as published


def quantized_linear(
    weight: Tensor, bias: Tensor | None, bits: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Return a linear layer with an 8-bit or 4-bit weight.

    Args:
        weight: `[out, in]`, any floating dtype; not kept.
        bias: `[out]` in `dtype` on `device`, or None.
        bits: 8 or 4.
        dtype: dtype of inputs and outputs.
        device: device of the layer.

    Raises:
        ConfigError: the layer is too narrow for 4 bit.
    """
    # bitsandbytes warns about every cast to fp16, which is how it works, and about a kernel on a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    width_out, width_in = weight.shape
    if bits == 8:
        int8 = bnb.nn.Linear8bitLt(width_in, width_out, has_fp16_weights=False, threshold=_OUTLIER, device="meta")
        int8.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
        del weight
        layer: nn.Linear = int8
    else:
        if width_in % _BLOCK:
            raise ConfigError(
                f"4 bits need layers whose inputs are a multiple of {_BLOCK} wide; here one has {width_in}. Use 8 bits"
            )
        nf4 = bnb.nn.Linear4bit(width_in, width_out, compute_dtype=dtype, quant_type="nf4", device="meta")
        nf4.weight = bnb.nn.Params4bit(
            weight.float(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=nf4
        )
        del weight
        layer = nf4
    layer.weight = layer.weight.to(device)  # this quantizes it
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    layer.eval()  # in training mode it would quantize its weight again at each call
    if device.type == "cpu":
        with torch.no_grad():  # on a CPU the first call reorders the weight: do it layer by layer, to save memory
            layer(torch.zeros(1, width_in, dtype=dtype))
    return layer


class AdaptedLinear(nn.Module):
    """A quantized layer with the LoRA of the layer that it replaces, in 16 or 32 bit; computes as `LoRALinear`.

    Args:
        base: the quantized layer.
        adapted: the layer whose LoRA is kept.
    """

    def __init__(self, base: nn.Module, adapted: LoRALinear) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B, self.scaling = adapted.lora_A, adapted.lora_B, adapted.scaling

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling
