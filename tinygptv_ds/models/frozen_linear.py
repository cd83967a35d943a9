"""Linear layers whose frozen weight is stored in fewer than 16 bit; the formats are in quantized_linear and fp8_linear.

A layer on the meta device becomes one by taking its class, as torch's own lazy modules do: it keeps its place, and with
it everything that refers to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tinygptv_ds.models.parameters import quantizable
from tinygptv_ds.models.precision import compute_dtype


class FrozenLinear(nn.Linear):
    """`x W^T + b` with a frozen W that is stored in fewer than 16 bit; subclasses say how.

    Everything stored is in non-persistent buffers of bytes, fp32 values included: so no cast of the model to 16 bit
    changes a scale, and neither checkpoints nor `state_dict` hold frozen weights.
    """

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each buffer."""
        raise NotImplementedError

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the values of the buffers for a weight `[out, in]` in fp32 on the CPU."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]` in a floating dtype."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` for `[..., in]` in the dtype of the computation, without a gradient."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer in autocast's dtype, else in the input's."""
        return _FrozenProduct.apply(input.to(compute_dtype(input)), self)

    def forget_weight(self) -> None:
        """Replace the weight by room for its quantized form, on the same device."""
        device = self.weight.device
        self.weight = None  # type: ignore[assignment]  # who reads it by mistake gets an error at once
        for name, size in self.sizes().items():
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=device), persistent=False)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantize a weight `[out, in]` of any floating dtype; it is not kept.

        This always runs on the CPU, so that every machine has the same values.
        """
        for name, value in self.quantize(weight.detach().to("cpu", torch.float32)).items():
            getattr(self, name).copy_(value.contiguous().view(torch.uint8).flatten())


class _FrozenProduct(torch.autograd.Function):
    """The product of a `FrozenLinear`, which keeps neither x nor W for the backward pass: W is restored there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


def linear_layers(model: nn.Module, *, vision: bool, phi: bool = True) -> Iterator[tuple[str, nn.Linear]]:
    """Yield what may be quantized, by the canonical name of the weight: see `parameters.quantizable`."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and quantizable(f"{name}.weight", vision=vision, phi=phi):
            yield f"{name}.weight", layer


def keep_vit_weights_inside(model: nn.Module, *, vision: bool) -> None:
    """Let timm call its qkv layers, whose weights it would otherwise take out; needed where they are quantized."""
    for block in model.get_submodule("visual_encoder.blocks").children() if vision else ():
        # torch types attributes as Tensor | Module.
        block.get_submodule("attn").qkv_bias_separate = True  # type: ignore[assignment]


def quantized_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return everything that is stored of quantized weights, by canonical name."""
    return {
        f"{name}.{kind}": buffer
        for name, layer in model.named_modules()
        if isinstance(layer, FrozenLinear)
        for kind, buffer in layer.named_buffers(recurse=False)
    }
