"""LoRA on a linear layer, as peft computes it (Hu et al. 2021, arXiv 2106.09685).

The base weight keeps its own name next to `lora_A.weight` and `lora_B.weight`: these are the names of the released
TinyGPT-V checkpoints (peft 0.2.0). On the fused qkv layer one A is shared by queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinygptv_ds.models.dropout import DropoutKeys, TokenDropout


class LoRAWeights(NamedTuple):
    """A and B of one layer in the dtype that a forward pass computes in."""

    a: Tensor
    b: Tensor


class LoRALinear(nn.Linear):
    """`x W^T + b + (alpha / r) * B(A(dropout(x)))`, of which training freezes W and b.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        lora_r: rank of A `[r, in]` and B `[out, r]`.
        lora_alpha: the update is scaled by `alpha / r`.
        lora_dropout: dropout on the input of A, in training only.
        dropout_site: the number of that dropout's place among those of the keys.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_r: int,
        lora_alpha: float,
        lora_dropout: float,
        dropout_site: int = 0,
    ) -> None:
        super().__init__(in_features, out_features)
        self.lora_A = nn.Linear(in_features, lora_r, bias=False)
        self.lora_B = nn.Linear(lora_r, out_features, bias=False)
        self.dropout = TokenDropout(lora_dropout, dropout_site)
        self.scaling = lora_alpha / lora_r
        self.reset_lora()

    def reset_lora(self) -> None:
        """Fill A with Kaiming-uniform values and B with zeros, so that the layer starts as its base."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, input: Tensor, keys: DropoutKeys | None = None, weights: LoRAWeights | None = None) -> Tensor:
        """Apply the layer: `[..., in_features]` to `[..., out_features]`.

        Args:
            input: the input.
            keys: those of the dropout, in training.
            weights: A and B from `cast_lora`; None: the layers A and B are called, which casts their weights under
                autocast and gathers them under ZeRO-3.
        """
        base, x = super().forward(input), self.dropout(input, keys)
        update = self.lora_B(self.lora_A(x)) if weights is None else F.linear(F.linear(x, weights.a), weights.b)
        return base + update * self.scaling


def cast_lora(blocks: Iterable[Sequence[LoRALinear]], dtype: torch.dtype) -> list[dict[int, LoRAWeights]]:
    """Return the LoRA weights of each block in a dtype, by the site of the layer's dropout, cast by one operation.

    Autocast casts each of them, and its gradient, by a kernel of its own: 256 of the 2,145 kernels of the published
    stage 4. Here the gradients come together too, at the end of the backward pass, with the same bits.

    Args:
        blocks: the layers with LoRA of each block.
        dtype: of the copies.
    """
    layers = [list(block) for block in blocks]
    weights = [part.weight for block in layers for layer in block for part in (layer.lora_A, layer.lora_B)]
    cast = iter(_Cast.apply(dtype, *weights))
    return [{layer.dropout.site: LoRAWeights(next(cast), next(cast)) for layer in block} for block in layers]


class _Cast(torch.autograd.Function):
    """Casts of many tensors, and of the gradients of all of them, as one operation each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _copies(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(gradients, ctx.dtype)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
