"""The language-model loss, over target tokens only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutputWithPast


class PackedOutput(NamedTuple):
    """The output of a packed forward pass, a tuple: to attach its backward hooks, ZeRO-3 looks into nothing else.

    Attributes:
        token_losses: fp32 `[K]`, cross entropy of each target token, in the order of the batch's `target_rows`.
        anchor: a zero that depends on the projections, to be added to the loss: so every rank has a gradient for every
            trained parameter, and all ranks' backward passes begin alike, whether a micro-batch has images or not.
    """

    token_losses: Tensor
    anchor: Tensor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each target token, in fp32.

    Args:
        logits: `[K, vocabulary]`, any float dtype.
        targets: int64 `[K]`; -100, as padding has it, gives a loss of zero without a gradient.

    Returns:
        fp32 `[K]`, not reduced: the caller divides by the target tokens of the whole optimizer step.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _CrossEntropy.apply(logits, targets)
    return F.cross_entropy(logits.float(), targets, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy whose gradient takes the place of the log-probabilities.

    On a CPU a step spends as much time on fresh memory of the size of the logits as on their exponentials: torch's own
    backward pass takes three times that size, this one nothing.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_probabilities = F.log_softmax(logits, dim=-1)
        ignored, index = targets < 0, targets.clamp(min=0)[:, None]
        ctx.kept = log_probabilities, index, ignored
        return -log_probabilities.gather(1, index).squeeze(1).masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        log_probabilities, index, ignored = ctx.kept
        del ctx.kept  # the values are gone: a second backward pass is an error
        upstream = upstream.masked_fill(ignored, 0.0)[:, None]
        gradient = log_probabilities.exp_().mul_(upstream)
        return gradient.scatter_add_(1, index, -upstream), None


def with_loss(
    output: CausalLMOutputWithPast, labels: Tensor, count: Tensor | int | None = None
) -> CausalLMOutputWithPast:
    """Return an output with its loss as models of transformers define it: the mean cross entropy of following tokens.

    Args:
        output: with logits `[B, L, vocabulary]`.
        labels: int64 `[B, L]`, the tokens of the same positions; -100 for those without a loss.
        count: what the sum is divided by; None: the number of labels that count.

    Raises:
        ValueError: the shapes do not belong together.
    """
    logits = output.logits
    assert logits is not None
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}, the logits {list(logits.shape[:2])}; both must be of all tokens"
        )
    targets = labels[:, 1:].reshape(-1).to(logits.device)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
    loss = total / ((targets != -100).sum().clamp(min=1) if count is None else count)
    return CausalLMOutputWithPast(loss, **output)
