"""Dropout whose masks are a function of the sample, the token, the layer and the feature, and of nothing else.

A mask is a hash of counters, not a draw from a generator: an element is dropped or kept alike on any rank, in any
micro-batch, packed or padded, and again where gradient checkpointing recomputes it, so no generator's state has to be
saved or restored. Rate and scaling are those of `nn.Dropout`.

The hash: a key of 64 bits for each token (of seed, step, sample and position; `data/loader/batch.py`) is mixed with the
number of each place of dropout into two words of 32 bits. An element is dropped where a multiplicative hash of these
words and its feature is below the rate. All arithmetic is int32, which wraps around alike on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygptv_ds.models.compiler import missing_compiler


def _int32(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


# Chris Wellons' lowbias32 (github.com/skeeto/hash-prospector); the golden ratio sets successive counters apart.
_FIRST, _SECOND = _int32(0x7FEB352D), _int32(0x846CA68B)
_GOLDEN = _int32(0x9E3779B9)

Drop = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DropoutKeys:
    """The keys of one forward pass, made once and shared by all layers.

    Attributes:
        first: int32 `[sites, *tokens]`, a word for each place of dropout and token.
        second: int32 `[sites, *tokens]`, another one.
        features: int32 `[width]`, a word for each feature of the widest place.
    """

    first: Tensor
    second: Tensor
    features: Tensor

    def at(self, sites: slice) -> DropoutKeys:
        """Return the keys of some of the places, which are then numbered from 0."""
        return DropoutKeys(self.first[sites], self.second[sites], self.features)

    def to(self, device: torch.device) -> DropoutKeys:
        """Return the same on a device."""
        return DropoutKeys(self.first.to(device), self.second.to(device), self.features.to(device))


@torch.no_grad()
def make_keys(token_keys: Tensor, sites: int, width: int) -> DropoutKeys:
    """Return the keys of a forward pass.

    Args:
        token_keys: int64 `[*tokens]`, uniform over all bits.
        sites: number of places of dropout.
        width: features of the widest place.
    """
    words = token_keys.contiguous().view(torch.int32).unflatten(-1, (-1, 2))
    site = _mixed(_counter(sites, words.device)).view(-1, *[1] * token_keys.dim())
    first, second = words.unbind(-1)
    return DropoutKeys(
        _mixed(first ^ site), _mixed(second + site), _mixed(_counter(width, words.device) ^ _int32(0x85EBCA6B))
    )


class TokenDropout(nn.Module):
    """Dropout at one place of the model.

    Args:
        p: the rate.
        site: the number of the place among those of the keys.
    """

    def __init__(self, p: float, site: int = 0) -> None:
        super().__init__()
        self.p, self.site = p, site
        self._drop = _drop_at(p)

    def forward(self, x: Tensor, keys: DropoutKeys | None) -> Tensor:
        """Drop elements of `[*tokens, width]` in training; without keys the masks come from torch's generator."""
        if not self.training or self.p == 0:
            return x
        if keys is None:
            return F.dropout(x, self.p)
        # In a region that is compiled as a whole, its operations are fused with those around them.
        drop = self._drop if torch.compiler.is_compiling() else kernel(self.p, x.device.type)
        return drop(x, keys.first[self.site], keys.second[self.site], keys.features[: x.shape[-1]])

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle keeps: all but the function, which is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_drop"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what pickle has kept."""
        super().__setstate__(state)
        self._drop = _drop_at(self.p)

    def extra_repr(self) -> str:
        """Return the settings, for `print(model)`."""
        return f"p={self.p}, site={self.site}"


@lru_cache
def kernel(p: float, device: str) -> Drop:
    """Return the function that drops at a rate; on a GPU its pointwise operations are compiled into one kernel.

    The function takes x `[*tokens, width]`, the two words `[*tokens]` and those of the features `[width]`.
    """
    drop = _drop_at(p)
    return torch.compile(drop, dynamic=True) if device == "cuda" and missing_compiler(device) is None else drop


def _drop_at(p: float) -> Drop:
    threshold, scale = round(p * 2**32) - 2**31, 1 / (1 - p)

    def drop(x: Tensor, first: Tensor, second: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            word = (first.unsqueeze(-1) ^ features).mul_(_FIRST)
            word ^= (word >> 15).bitwise_and_(0x1FFFF)
            keep = word.add_(second.unsqueeze(-1)).mul_(_SECOND) >= threshold
        return torch.where(keep, x * scale, 0.0)

    return drop


def _counter(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int32, device=device) * _GOLDEN


def _mixed(word: Tensor) -> Tensor:
    """Return a bijection of int32 of which every bit depends on every bit; `>>` carries the sign, so it is masked."""
    word = (word ^ ((word >> 16) & 0xFFFF)) * _FIRST
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _SECOND
    return word ^ ((word >> 16) & 0xFFFF)
