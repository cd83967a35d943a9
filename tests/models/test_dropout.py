"""Dropout from a hash: the rate and scaling of `nn.Dropout`, masks that share nothing, the same when compiled."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tinygptv_ds.data.loader.batch import collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.models.dropout import DropoutKeys, TokenDropout, kernel, make_keys
from tinygptv_ds.processing.sequence import TokenRow

SAMPLES, TOKENS, SITES, WIDTH, STEP = 12, 40, 6, 640, 4  # a step has four samples


def batch_keys(seed: int, places: list[int], tokens: int = TOKENS) -> Tensor:
    """Return the keys of the samples at some places of the stream, `[samples * tokens]`."""
    none = np.zeros(0, dtype=np.int64)
    row = TokenRow(np.full(tokens, 5), np.full(tokens, -100), np.arange(tokens), none, none)
    pixels = np.zeros((0, 3, 1, 1), dtype=np.uint8)
    made = [Sample(SampleRef(place, "a", 0, 0, place), row, pixels) for place in places]
    return collate(made, ["a"], queries=1, image_size=1, bos=0, seed=seed).dropout_keys


def dropped(keys: DropoutKeys, p: float, site: int, width: int = WIDTH) -> Tensor:
    return TokenDropout(p, site)(torch.ones(*keys.first.shape[1:], width), keys) == 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_rate_and_independence(p: float) -> None:
    """Of 3.7 million elements, and of pairs of them that differ in one coordinate; within five standard deviations."""
    drawn = [make_keys(batch_keys(seed, list(range(SAMPLES))), SITES, WIDTH) for seed in (7, 8)]
    masks = torch.stack([torch.stack([dropped(keys, p, site) for site in range(SITES)]) for keys in drawn])
    masks = masks.unflatten(2, (SAMPLES, TOKENS))  # seed, site, sample, token, feature
    count = masks.numel()
    assert abs(masks.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / count)
    standard = (masks.double() - p) / math.sqrt(p * (1 - p))
    shifts = {"seed": 1, "site": 1, "sample": 1, "step": STEP, "token": 1, "feature": 1, "far feature": 32}
    axes = {"seed": 0, "site": 1, "sample": 2, "step": 2, "token": 3, "feature": 4, "far feature": 4}
    for name, shift in shifts.items():
        axis, length = axes[name], masks.shape[axes[name]] - shift
        products = standard.narrow(axis, 0, length) * standard.narrow(axis, shift, length)
        assert abs(products.sum().item()) < 5 * math.sqrt(products.numel()), name
    for kept in (4, 3):  # how often a feature, and a token at a place, is dropped varies as for independent draws
        rates = standard.transpose(kept, 4).flatten(0, 3).mean(0) if kept == 4 else standard.mean(-1).flatten()
        mean_of = count / len(rates)
        assert abs(rates.square().mean().item() * mean_of - 1) < 5 * math.sqrt(2 / len(rates))


def test_scaling_and_gradient() -> None:
    """Kept elements are divided by the share that is kept, forward and backward; in evaluation all stay."""
    keys = make_keys(batch_keys(1, [3]), 2, WIDTH)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = TokenDropout(0.25, 1)
    y = layer(x, keys)
    mask = dropped(keys, 0.25, 1)
    torch.testing.assert_close(y, torch.where(mask, 0.0, x / 0.75))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.where(mask, 0.0, torch.full_like(x, 1 / 0.75)))
    assert layer(x.bfloat16(), keys).dtype == torch.bfloat16
    assert layer.eval()(x, keys) is x


def test_a_mask_is_the_samples_own() -> None:
    """Whatever else is in the batch, and at any position in it; other seeds, steps and places differ."""
    packed = make_keys(batch_keys(1, [0, 5, 2]), SITES, WIDTH)
    alone = make_keys(batch_keys(1, [5]), SITES, WIDTH)
    here = slice(TOKENS, 2 * TOKENS)
    assert torch.equal(dropped(packed, 0.1, 3)[here], dropped(alone, 0.1, 3))
    padded = make_keys(batch_keys(1, [5], TOKENS + 9).view(1, -1), SITES, 2 * WIDTH)
    assert torch.equal(dropped(padded, 0.1, 3)[0, :TOKENS], dropped(alone, 0.1, 3))
    others = (make_keys(batch_keys(seed, [place]), SITES, WIDTH) for seed, place in ((1, 6), (1, 5 + STEP), (2, 5)))
    masks = [dropped(alone, 0.1, 3), dropped(alone, 0.1, 4), *(dropped(keys, 0.1, 3) for keys in others)]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)


def test_without_keys_torch_draws() -> None:
    torch.manual_seed(0)
    first, second = (TokenDropout(0.5)(torch.ones(50, 50), None) for _ in range(2))
    assert {0.0, 2.0} == set(first.unique().tolist()) and not torch.equal(first, second)


def test_compiled_as_one_graph() -> None:
    """For any number of tokens; integers wrap around alike."""
    compiled = torch.compile(kernel(0.1, "cpu"), backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 40):
        keys = make_keys(batch_keys(1, [2], tokens), 2, WIDTH)
        x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        given = keys.first[1], keys.second[1], keys.features
        ours, plain = compiled(x, *given), kernel(0.1, "cpu")(x, *given)
        assert torch.equal(ours, plain)
        assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])
