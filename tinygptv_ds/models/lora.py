"""LoRA on a linear layer, as peft computes it (Hu et al. 2021, arXiv 2106.09685).

The base weight keeps its own name next to `lora_A.weight` and `lora_B.weight`: these are the names of the released
TinyGPT-V checkpoints (peft 0.2.0). On the fused qkv layer one A is shared by queries, keys and values.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tinygptv_ds.models.dropout import DropoutKeys, TokenDropout


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

    def forward(self, input: Tensor, keys: DropoutKeys | None = None) -> Tensor:
        """Apply the layer: `[..., in_features]` to `[..., out_features]`; `keys` are those of the dropout."""
        base = super().forward(input)
        return base + self.lora_B(self.lora_A(self.dropout(input, keys))) * self.scaling
