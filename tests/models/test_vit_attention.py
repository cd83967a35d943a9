"""The ViT's attention has what the flash kernel asks for, and on a GPU no other than a fused kernel runs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.overrides import TorchFunctionMode
from transformers import Blip2QFormerConfig

from tinygptv_ds.models import tinygptv
from tinygptv_ds.models.attention import fused_sdpa
from tinygptv_ds.models.configuration import PHI_2, EvaViTConfig, TinyGPTVConfig

GPU = torch.device("cuda")


class Calls(TorchFunctionMode):
    """Notes the arguments of SDPA, and which of its calls were made inside `entered`."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = False
        self.seen: list[tuple[bool, tuple[Tensor, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append((self.entered, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def enter(self, device: torch.device, head_dim: int) -> Iterator[None]:
        """Stand in for `fused_sdpa`."""
        assert (device.type, head_dim) == ("cpu", 88)
        self.entered = True
        yield
        self.entered = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_vit_asks_for_flash(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the published head dimension, 88: a multiple of 8 below 256, 16 bits, no mask, no dropout, dense rows."""
    published = TinyGPTVConfig().vision_config
    assert published.hidden_size // published.num_attention_heads == 88
    phi = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = TinyGPTVConfig(
        vision_config=EvaViTConfig(28, 14, 176, 3, 2, 64),
        qformer_config=Blip2QFormerConfig(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, encoder_hidden_size=176
        ),
        text_config=PHI_2 | phi | {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    model = tinygptv.TinyGPTVForConditionalGeneration(config).requires_grad_(False).to(dtype).train()
    pixels = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    calls = Calls()
    monkeypatch.setattr(tinygptv, "fused_sdpa", calls.enter)
    with calls, torch.autocast("cpu", dtype):
        model.encode_vision(pixels)
    of_vit = [call for call in calls.seen if call[1][0].shape[-1] == 88]
    assert len(of_vit) == 3  # one for each block
    for entered, tensors, options in of_vit:
        assert entered
        assert not options.get("dropout_p") and options.get("attn_mask") is None and not options.get("is_causal")
        assert all(tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor in tensors)
        assert all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1])  # rows of 16 bytes
        assert not any(tensor.requires_grad for tensor in tensors)


def test_only_fused_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with fused_sdpa(GPU, 88):
        assert cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled() and not cuda.math_sdp_enabled()
    assert cuda.math_sdp_enabled()
    for device, head_dim in ((GPU, 12), (torch.device("cpu"), 88)):
        with fused_sdpa(device, head_dim):
            assert cuda.math_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with fused_sdpa(GPU, 88):
        assert cuda.math_sdp_enabled()
