"""The optimizer of a single rank, where ZeRO has nothing to partition: one flat tensor for each parameter group.

ZeRO-1 and 2 keep flat copies of the groups, too, but fill them tensor by tensor: two copies, a cast to fp64 and a norm
of each gradient, by a Python hook. For the 261 tensors of the published LoRA that is a thousand launches a step. Here
the weights are views of the flat tensors, some thirty operations on whole groups do the rest, and the host waits for
the device once, to learn whether the gradients are finite. Weights and moments are those of ZeRO, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class FlatOptimizer:
    """An optimizer for DeepSpeed's stage 0 that keeps ZeRO's rule: a gradient that is not finite moves nothing.

    The weights of the model become views of the flat tensors; its gradients are taken over by `add_gradients`.

    Args:
        groups: parameter groups of fp32 parameters, on the device.
        make: returns torch's optimizer of the groups with flat tensors in their place.
        gradient_clipping: the norm that gradients are clipped to; 0: they are not.

    Attributes:
        optimizer: torch's optimizer.
        overflow: whether the last step was skipped; DeepSpeed reads it.
        loss_scale: the factor on the loss that the gradients come with.
        gradients: the flat gradients of the groups; they stay where they are.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], Optimizer],
        gradient_clipping: float,
    ) -> None:
        self._clipping = gradient_clipping
        self._place: dict[Tensor, tuple[Tensor, int]] = {}  # flat tensor and offset of each parameter
        self._flat = [self._flatten(group["params"]) for group in groups]
        self.optimizer = make([{**group, "params": [flat]} for group, flat in zip(groups, self._flat, strict=True)])
        self.gradients: list[Tensor] = [flat.grad for flat in self._flat if flat.grad is not None]
        self._views = {parameter: self._view(flat.grad, parameter) for parameter, (flat, _) in self._place.items()}
        self.overflow = False
        self.loss_scale = 1.0
        self._global_grad_norm = torch.zeros(())  # under the name that DeepSpeed looks for

    @torch.no_grad()
    def _flatten(self, parameters: Sequence[nn.Parameter]) -> nn.Parameter:
        flat = nn.Parameter(torch.cat([parameter.flatten() for parameter in parameters]))
        flat.grad = torch.zeros_like(flat)
        start = 0
        for parameter in parameters:
            self._place[parameter] = flat, start
            parameter.data = self._view(flat, parameter).detach()
            start += parameter.numel()
        return flat

    def _view(self, whole: Tensor | None, parameter: Tensor) -> Tensor:
        """Return the part of a flat tensor that belongs to a parameter, in its shape."""
        assert whole is not None
        start = self._place[parameter][1]
        return whole[start : start + parameter.numel()].view_as(parameter)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of torch's optimizer."""
        return self.optimizer.param_groups

    @property
    def parameters(self) -> list[Tensor]:
        """The model's parameters of all groups."""
        return list(self._views)

    @torch.no_grad()
    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """Add gradients, in the order of `parameters`, to those of the step; None adds nothing."""
        found = [(view, grad) for view, grad in zip(self._views.values(), gradients, strict=True) if grad is not None]
        torch._foreach_add_([view for view, _ in found], [grad for _, grad in found])

    def add_gradients(self) -> None:
        """Add the gradients of a backward pass to those of the step; the parameters then have none of their own."""
        self.add(parameter.grad for parameter in self._views)
        for parameter in self._views:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights, or nothing where the norm of all gradients is not finite, and forget the gradients.

        The host waits for the device here, and nowhere else in a step.
        """
        norm = gradient_norm(torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in self.gradients)
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = torch.full((), math.inf) if self.overflow else norm / self.loss_scale
        if not self.overflow:
            self._unscale(norm)
            self.optimizer.step()
        for gradient in self.gradients:
            gradient.zero_()

    def _unscale(self, norm: Tensor) -> None:
        if not self._clipping and self.loss_scale == 1.0:
            return
        scale = torch.full((), self.loss_scale)  # all of this is on the CPU
        if self._clipping:
            scale = scale * (((norm / self.loss_scale) + 1e-6) / self._clipping).clamp(min=1.0)  # as ZeRO does
        factor = 1.0 / scale
        for gradient in self.gradients:
            gradient.mul_(factor)

    def override_loss_scale(self, loss_scale: float) -> None:
        """Take over a loss scale; ZeRO's optimizers have this method, too."""
        self.loss_scale = loss_scale

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """Return the part of one of the optimizer's moments that belongs to a parameter, in its shape."""
        return self._view(self.optimizer.state[self._place[parameter][0]][name], parameter)


def gradient_norm(squares: Iterable[Tensor], add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    """Return the norm of all gradients as ZeRO computes it, fp32 on the CPU: the host waits for it.

    Args:
        squares: for each parameter group the sum of its squared gradients, fp64 on the device.
        add_up: sums fp32 `[groups]` over the ranks.
    """
    of_groups = add_up(torch.stack([square.float() for square in squares])).sqrt()
    return torch.linalg.vector_norm(of_groups).cpu()
