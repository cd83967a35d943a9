"""The model on fake tensors of a GPU, on a machine without one: its operations, shapes, dtypes and devices are real.

torch's `FakeTensorMode` computes shapes and dtypes alone, by the rules of the device that a tensor claims to be on. Its
tensors hold no data, so that an operation whose result depends on values raises an error, and the published model takes
no memory. What needs a GPU's driver is replaced: the compute capability, flash-attn (stand-ins that check what the
kernels demand), the choice of SDPA's kernel, autocast's own check for a GPU, and the autograd engine, which would ask
the driver for its streams.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import GraphExecGroup

from tinygptv_ds.models import attention
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import empty_model

DEVICE = "cuda"
HOPPER = (9, 0)
_HALF = (torch.float16, torch.bfloat16)
_WIDEST_HEAD = 256  # of the flash-attention kernels


@contextmanager
def fake_gpu(capability: tuple[int, int] = HOPPER) -> Iterator[FakeTensorMode]:
    """Make this machine appear to have a GPU with flash-attn and FlashAttention 3, and yield its tensors' mode."""
    modules = {"flash_attn": _stand_in("flash_attn"), "flash_attn_interface": _stand_in("flash_attn_interface")}
    mode = FakeTensorMode()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, modules))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_, **__: capability))
        stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        # Autocast asks this, and switches itself off.
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        attention._found.cache_clear()
        stack.callback(attention._found.cache_clear)
        stack.enter_context(mode)
        stack.enter_context(_ChooseSdpa())
        yield mode


def fake_model(
    config: TinyGPTVConfig, frozen: torch.dtype, trained: torch.dtype = torch.float32
) -> TinyGPTVForConditionalGeneration:
    """Return the model on the fake GPU with the dtypes and trained parameters that training gives it.

    Args:
        config: the model's configuration; LoRA is trained if the model has it.
        frozen: dtype of the frozen weights.
        trained: dtype of the weights that the stages train.
    """
    with unset_fake_temporarily():
        model = empty_model(config, frozen, device="meta")
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = on_gpu(parameter).to(trained if parameter.dtype == torch.float32 else frozen)
                module._parameters[name] = nn.Parameter(value)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = on_gpu(buffer).to(frozen)
    train_only(model, projections, norms, *([lora] if config.lora_r else []))
    return model.train()


def on_gpu(value: Any) -> Any:
    """Return a fake tensor like the given one on the GPU; other values as they are."""
    return torch.empty(value.shape, dtype=value.dtype, device=DEVICE) if isinstance(value, Tensor) else value


# ---- backward


def backward(loss: Tensor, on_node: Callable[[Node], None] | None = None) -> None:
    """Compute gradients as `loss.backward()` does: nodes in the order of their dependencies, gradients summed.

    As in the engine, a gradient gets the shape and the dtype of what it belongs to.

    Args:
        loss: a scalar with a graph.
        on_node: called before each node.
    """
    root = loss.grad_fn
    assert root is not None
    waiting = _number_of_users(root)
    gradients: dict[Node, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    with torch.no_grad(), GraphExecGroup():  # so that checkpointed blocks are recomputed once
        while ready:
            node = max(ready, key=lambda each: each._sequence_nr())
            ready.remove(node)
            if on_node is not None:
                on_node(node)
            for (user, number), gradient in zip(
                node.next_functions, _call(node, gradients.pop(node, {})), strict=False
            ):
                if user is None:
                    continue
                if gradient is not None:
                    gradient = _as_expected(gradient, user._input_metadata[number])
                    slots = gradients.setdefault(user, {})
                    slots[number] = slots[number] + gradient if number in slots else gradient
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)


def _number_of_users(root: Node) -> Counter[Node]:
    counts: Counter[Node] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                counts[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return counts


def _call(node: Node, gradients: Mapping[int, Tensor]) -> tuple[Tensor | None, ...]:
    parameter = getattr(node, "variable", None)
    if parameter is not None:  # the end of the graph, where gradients accumulate
        if 0 in gradients:
            parameter.grad = gradients[0] if parameter.grad is None else parameter.grad + gradients[0]
        return ()
    inputs = [gradients.get(number) for number in range(len(node._input_metadata))]
    if isinstance(node, BackwardCFunction):
        return _of_tensors(node, node.apply(*inputs))
    found = node(*inputs)  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


def _of_tensors(node: Any, found: Any) -> tuple[Tensor | None, ...]:
    """Return a custom function's gradients in the order of its node's edges, which arguments without a tensor lack."""
    gradients = found if isinstance(found, tuple) else (found,)
    wanted = (gradient for gradient, needed in zip(gradients, node.needs_input_grad, strict=True) if needed)
    return tuple(None if user is None else next(wanted) for user, _ in node.next_functions)


def _as_expected(gradient: Tensor, expected: Any) -> Tensor:
    if gradient.shape != tuple(expected.shape):
        gradient = gradient.sum_to_size(expected.shape)
    return gradient.to(expected.dtype)


# ---- attention


class _ChooseSdpa(TorchFunctionMode):
    """SDPA's choice of a kernel on a GPU, by the conditions of torch's `sdp_utils.cpp`, without asking the driver."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    width = query.shape[-1]
    if attn_mask is None and query.dtype in _HALF and width <= _WIDEST_HEAD and width % 8 == 0:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def _stand_in(name: str) -> ModuleType:
    """Return a module with the varlen function of flash-attn, whose signature is that of version 2.8.3."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **options: Any,
    ) -> Tensor:
        assert options == {"causal": True} and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return _flash_varlen(q, k, v, cu_seqlens_q, max_seqlen_q)

    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module)["flash_attn_varlen_func"] = flash_attn_varlen_func
    return module


@torch.library.custom_op("tinygptv_ds_stand_in::flash_varlen", mutates_args=())
def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    raise NotImplementedError("a stand-in for flash-attn takes fake tensors only")


@_flash_varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    assert q.dtype in _HALF and q.dtype == k.dtype == v.dtype, f"flash-attn takes bf16 or fp16: {q.dtype}, {k.dtype}"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "flash-attn needs contiguous heads"
    assert q.shape[-1] <= _WIDEST_HEAD and q.shape[-1] % 8 == 0, "flash-attn pads heads of other widths"
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.device == q.device and cu_seqlens.is_contiguous()
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("tinygptv_ds_stand_in::flash_varlen_backward", mutates_args=())
def _flash_varlen_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("a stand-in for flash-attn takes fake tensors only")


@_flash_varlen_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert gradient.dtype == q.dtype and gradient.stride(-1) == 1
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _flash_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_flash_varlen_backward(gradient, *ctx.saved_tensors), None, None)


_flash_varlen.register_autograd(_flash_gradients, setup_context=_save_for_backward)
