"""Parameters that no sample of a step has touched: AdamW leaves them exactly as they are.

Every rank gives every parameter a gradient, for the sake of DeepSpeed's collectives; without an image in the whole step
those of the projections are zero. AdamW would still move them, by momentum and weight decay, and count the step. In the
original they have no gradient at all (`None`), and its AdamW passes over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LeaveUntouched:
    """Hooks on AdamW's `step` that hide the gradients of the parameter groups that the step has not touched.

    Groups with `needs_images` (see `weight_decay_groups`) are touched by a step with images, all others by any step
    with target tokens. Weights, moments and step count of an untouched group stay as they are, bit for bit, under any
    ZeRO stage: DeepSpeed lets the optimizer step on one flat copy of each group after another.

    Args:
        adamw: torch's optimizer, with the groups of `weight_decay_groups`.
        device: where the totals of a step are.
    """

    def __init__(self, adamw: Optimizer, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._totals = torch.ones(2, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._image_copies: set[Tensor] = set()
        adamw.register_step_pre_hook(self._hide)
        adamw.register_step_post_hook(self._restore)

    def begin_step(self, totals: Tensor) -> None:
        """Take the target tokens and images of the whole step, over all ranks and micro-batches, fp32 `[2]`.

        They are copied while the device computes the step; nothing waits for them before the optimizer moves weights.
        """
        self._totals.copy_(totals, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def needs_images(self, parameter: Tensor) -> bool:
        """Return whether a key of AdamW's state, a flat copy of a group or a part of it, is of a group of images."""
        return parameter in self._image_copies

    def _hide(self, adamw: Optimizer, args: Any, kwargs: Any) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # long past: the totals were summed before the forward passes
        targets, images = self._totals.tolist()
        for group in adamw.param_groups:
            touched = targets > 0 and (images > 0 or not group["needs_images"])
            for parameter in group["params"]:
                if group["needs_images"]:
                    self._image_copies.add(parameter)
                if not touched and parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None
                    if not adamw.state[parameter]:
                        adamw.state[parameter] = _fresh_state(parameter, on_device=bool(group["fused"]))

    def _restore(self, adamw: Optimizer, args: Any, kwargs: Any) -> None:
        # ZeRO with offload keeps its gradients in these very tensors.
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()


def _fresh_state(parameter: Tensor, *, on_device: bool) -> dict[str, Tensor]:
    """Return AdamW's state before the first step, which checkpoints need of every parameter."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
