"""Linear layers whose frozen weight is kept in fp8 and whose product is computed in fp8, for GPUs since Ada and Hopper.

Weights and inputs are e4m3 values (four significant bits, up to 448) with a scale in fp32 for each row: an output of
the weight, a token of the input. A token's output so depends on no other token, and thus neither on the batch nor on
the packing. The gradient passes to the input as if that had not been rounded, through the restored weight and in the
dtype of the computation; the weight has none (Micikevicius et al. 2022, arXiv 2209.05433).

On a CPU, and where a layer's width is no multiple of 16, the same rounded values are multiplied in the dtype of the
computation instead: the same numbers but for the order of sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.frozen_linear import FrozenLinear, keep_vit_weights_inside, linear_layers
from tinygptv_ds.models.lora import LoRALinear

_OLDEST = (8, 9)  # compute capability that fp8 products need: Ada; Hopper is 9.0
_MULTIPLE = 16  # of both widths of a layer, for the kernels of `torch._scaled_mm`
_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST_SCALE = 1e-12  # of a row of zeros, which would otherwise be divided by zero


def check_fp8_device(device: torch.device) -> None:
    """Check that a GPU computes products in fp8; a CPU simulates them.

    Raises:
        ConfigError: it is too old.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise ConfigError(
            f"model.fp8 needs a GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or higher (Ada, Hopper or newer), "
            f"and {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; set model.fp8 to null"
        )


def use_fp8(model: nn.Module, *, phi: bool) -> dict[str, Fp8Linear]:
    """Let the linear layers of the ViT's blocks, and with `phi` of Phi's, keep their weights and compute in fp8.

    To be called on a model on the meta device. The layers are changed in place and keep their biases and LoRA; each
    weight disappears from the parameters, and `FrozenLinear.store` supplies it.

    Args:
        model: the whole model or its vision path.
        phi: whether Phi's layers are included.

    Returns:
        The layers, by the canonical name of the weight.
    """
    made = {}
    for name, layer in linear_layers(model, vision=True, phi=phi):
        layer.__class__ = Fp8LoRALinear if isinstance(layer, LoRALinear) else Fp8Linear
        assert isinstance(layer, Fp8Linear)
        layer.forget_weight()
        made[name] = layer
    keep_vit_weights_inside(model, vision=True)
    return made


class Fp8Linear(FrozenLinear):
    """`x W^T + b` with a frozen W in e4m3 and a product in fp8; made by `use_fp8`."""

    codes: Tensor
    scales: Tensor

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each buffer."""
        return {"codes": self.out_features * self.in_features, "scales": 4 * self.out_features}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the values of the buffers for a weight `[out, in]` in fp32 on the CPU."""
        codes, scales = to_e4m3(weight)
        return {"codes": codes, "scales": scales}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]` in a floating dtype."""
        codes, scales = self.operand()
        return _restored(codes, scales, dtype)

    def operand(self) -> tuple[Tensor, Tensor]:
        """Return the weight as it is stored: e4m3 `[out, in]`, and the scales of its rows, fp32 `[out, 1]`."""
        codes = self.codes.view(_E4M3).view(self.out_features, self.in_features)
        return codes, self.scales.view(torch.float32)[:, None]

    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` for `[..., in]` in the dtype of the computation, without a gradient."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight, of_weight = self.operand()
        codes, of_tokens = to_e4m3(x.reshape(-1, self.in_features))
        if x.device.type == "cuda" and self.in_features % _MULTIPLE == self.out_features % _MULTIPLE == 0:
            out = _scaled_product(codes, of_tokens, weight, of_weight).to(x.dtype)
            out = out if bias is None else out + bias
        else:
            out = F.linear(_restored(codes, of_tokens, x.dtype), _restored(weight, of_weight, x.dtype), bias)
        return out.view(*x.shape[:-1], self.out_features)


class Fp8LoRALinear(LoRALinear, Fp8Linear):
    """A `LoRALinear` whose base is in fp8: its LoRA reads the input unrounded, and is trained in its own precision."""


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `[rows, width]` of any floating dtype to e4m3; return the values, and the scale of each row `[rows, 1]`.

    The largest value of a row becomes the largest of e4m3. A row with NaN or Inf has NaN, and hides nothing.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (wide / scales).clamp(-_LARGEST, _LARGEST).to(_E4M3), scales


def _restored(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values that e4m3 codes and the scales of their rows mean."""
    return (codes.float() * scales).to(dtype)


def _scaled_product(x: Tensor, of_x: Tensor, weight: Tensor, of_weight: Tensor) -> Tensor:
    """Multiply e4m3 `[tokens, in]` by the transpose of `[out, in]` on a GPU, with the scales of both; bf16 comes out.

    The kernel takes its second operand by columns, which the transpose of a weight stored by rows is without a copy.
    bf16 is the output that every kernel for scales of rows has. Sums are kept in full fp32, as on a CPU: the faster
    accumulation of Hopper's tensor cores drops bits of long ones.
    """
    return torch._scaled_mm(x, weight.t(), scale_a=of_x, scale_b=of_weight.t(), out_dtype=torch.bfloat16)
