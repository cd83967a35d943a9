"""EVA-CLIP ViT-g, built from timm's Eva, whose parameter names are those of `eva_vit_g.pth`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from tinygptv_ds.models.configuration import EvaViTConfig

KEY_BIAS = ".attn.k_bias"  # how the names of timm's buffers end: biases of keys, constantly zero, in no file


def build_eva_vit(config: EvaViTConfig) -> Eva:
    """Build the ViT: its `forward_features` takes `[images, 3, S, S]` and gives `[images, 1 + patches, width]`.

    The class token comes first and is passed on; there is no final norm and no pooling (BLIP-2, arXiv 2301.12597).
    """
    vit = Eva(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool="",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds the product down
        use_post_transformer_norm=False,
    )
    vit.norm = nn.Identity()
    return vit


def call_replaced_layers(vit: Eva) -> None:
    """Let timm call qkv layers that are no plain linear ones any more, because they are quantized or adapted.

    It would take the weights out of them.
    """
    for block in vit.blocks:
        attention = block.get_submodule("attn")
        if type(attention.get_submodule("qkv")) is not nn.Linear:
            attention.qkv_bias_separate = True  # type: ignore[assignment]  # torch types attributes as Tensor | Module


def interpolate_pos_embed(pos_embed: Tensor, patches: int) -> Tensor:
    """Resize position embeddings to another image size, as the original does when it loads a checkpoint.

    The class position is kept; the grid is resized bicubically, `align_corners` false, no antialias.

    Args:
        pos_embed: `[1, 1 + old patches, width]`.
        patches: number of patches of the new size, a square number.
    """
    if pos_embed.shape[1] == 1 + patches:
        return pos_embed
    cls_position, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old, new = round(grid.shape[1] ** 0.5), round(patches**0.5)
    grid = grid.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_position, grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)
