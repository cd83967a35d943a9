"""The vision tower's weights: `eva_vit_g.pth` and files with its names, which are also those of timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.configuration import EvaViTConfig
from tinygptv_ds.models.eva_vit import interpolate_pos_embed
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.io import Stored, listing
from tinygptv_ds.weights.kinds import Unwrapped
from tinygptv_ds.weights.layouts.exported import part_of_exported
from tinygptv_ds.weights.layouts.layers import layer_numbers
from tinygptv_ds.weights.opening import model_weights
from tinygptv_ds.weights.source import Source, rename_all

PREFIX = "visual_encoder."
_POSITIONS = PREFIX + "pos_embed"
_BLOCK = r"blocks\.(\d+)\."


def eva_config(path: Path, *, image_size: int, depth: int, heads: int) -> EvaViTConfig:
    """Return the ViT's sizes: width, MLP and patch from the file's shapes, the rest as given.

    Args:
        path: the weights, which may be those of an exported model.
        image_size: side of the model's input images in pixels.
        depth: blocks to use; the published file has one more than BLIP-2 uses.
        heads: attention heads.

    Raises:
        WeightsError: the file is not an EVA ViT, has too few blocks, or its sizes do not fit.
    """
    stored, _ = _open(path)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in stored]
    if missing:
        raise WeightsError(
            f"{path}: not an EVA ViT: {listing(missing)} missing among {listing(stored)}; name eva_vit_g.pth, or a "
            "file with its names"
        )
    width, patch = stored["cls_token"].shape[-1], stored["patch_embed.proj.weight"].shape[-1]
    blocks = 1 + max(layer_numbers(stored, _BLOCK, path))
    if blocks < depth:
        raise WeightsError(f"{path}: {blocks} blocks, but {depth} are to be used; set model.eva_vit_depth to {blocks}")
    if width % heads:
        raise WeightsError(f"{path}: a width of {width} does not divide into {heads} heads; set model.eva_vit_heads")
    if image_size % patch:
        raise WeightsError(f"{path}: patches of {patch} pixels do not tile {image_size}; set model.image_size")
    return EvaViTConfig(
        image_size=image_size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=stored["blocks.0.mlp.fc1.weight"].shape[0],
    )


def canonical_name(name: str) -> str | None:
    """Return the canonical name of a tensor; None for the final norm and the head, which BLIP-2 leaves out."""
    return None if name.startswith(("norm.", "fc_norm.", "head.")) else PREFIX + name


def eva_source(path: Path, config: EvaViTConfig) -> Source:
    """Return the file's weights under canonical names, with position embeddings for `config.image_size`.

    Blocks beyond those used, the final norm and the head are ignored by name.
    """

    def rename(name: str) -> str | None:
        block = re.match(_BLOCK, name)
        unused = block is not None and int(block[1]) >= config.num_hidden_layers
        return None if unused else canonical_name(name)

    source = rename_all(*_open(path), rename, path)
    return Source(path, resized(source.weights, config.image_size, path), source.ignored)


def _open(path: Path) -> Unwrapped:
    return model_weights(part_of_exported(open_weights(path), PREFIX), path, "eva_vit")


def resized(weights: Mapping[str, Stored], image_size: int, path: Path) -> dict[str, Stored]:
    """Return the same weights, with position embeddings interpolated to an image size when they are read.

    Args:
        weights: by canonical name.
        image_size: side of the images in pixels.
        path: the file, for errors.

    Raises:
        WeightsError: patches do not tile that size.
    """
    positions, patch = weights.get(_POSITIONS), weights.get(PREFIX + "patch_embed.proj.weight")
    if positions is None or patch is None:
        return dict(weights)
    if image_size % patch.shape[-1]:
        raise WeightsError(f"{path}: patches of {patch.shape[-1]} pixels do not tile an image of {image_size}")
    patches = (image_size // patch.shape[-1]) ** 2
    shape = (1, 1 + patches, positions.shape[-1])
    return {**weights, _POSITIONS: Stored(shape, positions.dtype, partial(_resized, positions, patches))}


def _resized(positions: Stored, patches: int) -> Tensor:
    return interpolate_pos_embed(positions.read(), patches)
