"""Linear layers whose frozen weight is kept in 4 or 8 bit while what surrounds it is trained, by bitsandbytes.

The weight is dequantized to the dtype of the computation where a forward or backward pass needs it, one layer at a
time, and not kept. The gradient passes through to the input; the weight has none (QLoRA, Dettmers et al. 2023, arXiv
2305.14314).

| bits | stored for each block of weights | bytes per weight | error of normal values (RMS) |
|---|---|---|---|
| 4 | 64: NF4 codes, an 8-bit scale; for each 256 scales one in fp32 | 0.516 | 9.2 % |
| 8 | 256: evenly spaced codes, a scale in fp32 | 1.016 | 0.7 % |

For inference there are faster kernels, with other roundings (generate/quantize.py).
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.frozen_linear import FrozenLinear, keep_vit_weights_inside, linear_layers
from tinygptv_ds.models.lora import LoRALinear

_BLOCK = {4: 64, 8: 256}  # weights that share a scale
_SCALES = 256  # scales of 4 bit that share a scale of their own


def quantize_layers(model: nn.Module, bits: int, *, vision: bool) -> dict[str, QuantizedLinear]:
    """Let the linear layers of Phi's blocks, and with `vision` of the ViT's, keep their weights in 4 or 8 bit.

    To be called on a model on the meta device. The layers are changed in place and keep their biases and LoRA; each
    weight disappears from the parameters, and `QuantizedLinear.store` supplies it.

    Args:
        model: the whole model or its vision path.
        bits: 4 or 8.
        vision: whether the ViT is quantized, too.

    Returns:
        The layers, by the canonical name of the weight.

    Raises:
        ConfigError: a layer is too small.
    """
    found = dict(linear_layers(model, vision=vision))
    for name, layer in found.items():
        if layer.weight.numel() % _BLOCK[bits]:
            raise ConfigError(
                f"model.frozen_bits: {bits} bits need weights in whole blocks of {_BLOCK[bits]}, and {name} has "
                f"{layer.weight.numel()} elements; set it to null"
            )
        layer.__class__ = QuantizedLoRALinear if isinstance(layer, LoRALinear) else QuantizedLinear
        assert isinstance(layer, QuantizedLinear)
        layer.bits = bits
        layer.forget_weight()
    keep_vit_weights_inside(model, vision=vision)
    return {name: layer for name, layer in found.items() if isinstance(layer, QuantizedLinear)}


class QuantizedLinear(FrozenLinear):
    """`x W^T + b` with a frozen W that is stored in 4 or 8 bit; made by `quantize_layers`."""

    bits: int
    codes: Tensor
    scales: Tensor
    scales_of_scales: Tensor
    mean_scale: Tensor
    table: Tensor

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each buffer."""
        count = self.out_features * self.in_features
        blocks = count // _BLOCK[self.bits]
        if self.bits == 8:
            return {"codes": count, "scales": 4 * blocks, "table": 4 * 256}
        groups = -(-blocks // _SCALES)
        of_scales = {"scales_of_scales": 4 * groups, "mean_scale": 4, "table": 4 * 256}
        return {"codes": count // 2, "scales": blocks, **of_scales}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the values of the buffers for a weight `[out, in]` in fp32 on the CPU."""
        return _quantize(weight.flatten(), self.bits)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]` in a floating dtype."""
        shape, table = (self.out_features, self.in_features), self.table.view(torch.float32)
        ops = torch.ops.bitsandbytes
        if self.bits == 8:
            scales = self.scales.view(torch.float32)
            return ops.dequantize_blockwise(self.codes, scales, table, _BLOCK[8], dtype).view(shape)
        scales = ops.dequantize_blockwise(
            self.scales, self.scales_of_scales.view(torch.float32), table, _SCALES, torch.float32
        )
        scales = scales + self.mean_scale.view(torch.float32)
        # As rows of whole blocks, whatever the layer's width: on a CPU the kernel takes no others.
        rows = [self.codes.numel() * 2 // _BLOCK[4], _BLOCK[4]]
        return ops.dequantize_4bit(self.codes, scales, _BLOCK[4], "nf4", rows, dtype).view(shape)

    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` for `[..., in]` in the dtype of the computation, without a gradient."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype), bias)


class QuantizedLoRALinear(LoRALinear, QuantizedLinear):
    """A `LoRALinear` whose base is quantized: its LoRA is trained in its own precision."""


def _quantize(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the values of the buffers of `QuantizedLinear` for a weight, flattened, in fp32."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a kernel on a hub
    from bitsandbytes import functional

    if bits == 8:
        even = functional.create_linear_map(signed=True, total_bits=8)
        codes, state = functional.quantize_blockwise(weight, code=even, blocksize=_BLOCK[8])
        return {"codes": codes, "scales": state.absmax, "table": even}
    codes, state = functional.quantize_4bit(
        weight.view(-1, _BLOCK[4]), blocksize=_BLOCK[4], compress_statistics=True, quant_type="nf4"
    )
    of_scales = state.state2
    return {
        "codes": codes,
        "scales": state.absmax,
        "scales_of_scales": of_scales.absmax,
        "mean_scale": state.offset.reshape(1),
        "table": of_scales.code,
    }
