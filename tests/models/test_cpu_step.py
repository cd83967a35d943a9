"""What a CPU computes in its own way: attention without padding, and the loss's gradient in place."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinygptv_ds.models.attention import PackedLayout, make_layout, varlen_attention
from tinygptv_ds.models.loss import token_losses


def layout_of(lengths: Sequence[int]) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return make_layout(cu_seqlens, max(lengths), sum(lengths), "sdpa")


def attended(layout: PackedLayout, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return output and gradient for random queries, keys and values that are views of one tensor, as in the model."""
    torch.manual_seed(0)
    tokens = int(layout.cu_seqlens[-1])
    qkv = torch.randn(tokens, 2, 3, 16, dtype=dtype, requires_grad=True)
    out = varlen_attention(*qkv.unbind(-2), layout)
    out.backward(torch.randn(tokens, 2, 16, dtype=dtype))
    assert qkv.grad is not None
    return out.detach(), qkv.grad


@pytest.mark.parametrize("lengths", [[100, 7, 70, 70, 65, 1], [65], [200, 200], [3, 300]])
def test_samples_that_attend_alone_give_what_padded_ones_give(lengths: list[int]) -> None:
    layout = layout_of(lengths)
    assert layout.lengths == tuple(lengths)
    (out, gradient), (padded, of_padded) = attended(layout), attended(replace(layout, lengths=None))
    torch.testing.assert_close(out, padded, rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient, of_padded, rtol=0, atol=5e-6)


def test_short_samples_are_padded_as_before() -> None:
    assert layout_of([64, 3, 50]).lengths is None


def test_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for each run of samples of one length, on exactly their tokens."""
    shapes: list[tuple[int, ...]] = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest, **how: shapes.append(q.shape) or attend(q, *rest, **how)
    )
    attended(layout_of([70, 70, 9, 70]))
    assert shapes == [(2, 2, 70, 16), (1, 2, 9, 16), (1, 2, 70, 16)]


def test_compiled_attention_is_padded() -> None:
    """One graph for any lengths."""
    graphs = []
    compiled = torch.compile(
        varlen_attention, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for lengths in ([100, 7], [80, 66]):
        layout = layout_of(lengths)
        qkv = torch.randn(sum(lengths), 2, 3, 16).unbind(-2)
        torch.testing.assert_close(compiled(*qkv, layout), varlen_attention(*qkv, layout), rtol=0, atol=2e-6)
    assert len(graphs) <= 2


@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_loss_is_cross_entropy(count: int) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(count, 300)).requires_grad_()
    again = logits.detach().clone().requires_grad_()
    targets, upstream = torch.randint(0, 300, (count,)), torch.rand(count)
    losses, expected = token_losses(logits, targets), F.cross_entropy(again, targets, reduction="none")
    assert torch.equal(losses, expected)
    losses.backward(upstream)
    expected.backward(upstream)
    assert logits.grad is not None and again.grad is not None
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_not_finite_stays_so() -> None:
    logits = torch.full((2, 5), torch.inf, requires_grad=True)
    losses = token_losses(logits, torch.tensor([1, 2]))
    losses.sum().backward()
    assert losses.isnan().all() and logits.grad is not None and logits.grad.isnan().all()


def test_a_second_backward_pass_is_an_error() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = token_losses(logits, torch.tensor([1, 2, 0])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="kept"):
        loss.backward()
