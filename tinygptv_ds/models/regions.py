"""Regional torch.compile: the repeated blocks of Phi, ViT and Q-Former, each kind compiled once for all its blocks.

The time to compile does not grow with the depth, and what depends on a batch in more than its sizes runs eagerly:
attention over packed rows, the places of images, generation with its cache. Sizes are dynamic: one graph of Phi's
blocks serves any number of tokens and samples, two of the ViT's and of the Q-Former's serve one image and several.
Compiled functions are attributes of the blocks, which keep their names in a state dict.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import cache_home
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.compiler import compile_obstacle, missing_compiler
from tinygptv_ds.models.phi import after_attention, before_attention
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

# A trained Q-Former has eight graphs: layers with cross-attention and without, training and validation, one image and
# several. torch gives up at the ninth.
_GRAPHS = 16


@dataclass(frozen=True)
class CompileChoice:
    """Whether blocks are compiled.

    Attributes:
        on: whether they are.
        obstacle: why `auto` compiles nothing on this GPU, None otherwise.
    """

    on: bool
    obstacle: str | None = None


def choose_compile(wanted: bool | str, device: str, zero_stage: int, frozen_bits: int | None = None) -> CompileChoice:
    """Return whether `model.compile` has the blocks compiled: auto does so on GPUs, where nothing is in the way.

    Args:
        wanted: true, false or "auto".
        device: type of the device, "cuda" or "cpu".
        zero_stage: DeepSpeed's ZeRO stage.
        frozen_bits: `model.frozen_bits`.

    Raises:
        ConfigError: `wanted` is true, and something is in the way.
    """
    if wanted is False or (wanted == "auto" and device != "cuda"):
        return CompileChoice(on=False)
    obstacle = compile_obstacle(zero_stage, frozen_bits) or missing_compiler(device)
    if obstacle is not None and wanted is True:
        raise ConfigError(f"model.compile is true, but {obstacle}; auto trains without compiled blocks")
    return CompileChoice(obstacle is None, obstacle)


def compile_blocks(model: TinyGPTVForConditionalGeneration, **options: Any) -> None:
    """Have the blocks of a model compiled at their first call, in place; whatever fails to compile runs eagerly.

    Args:
        model: the model; its parameters, their names and its state dict stay as they are.
        options: of torch.compile, e.g., `backend`.
    """
    _keep_compiled_code()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    # Numbers of blocks, e.g., a dropout's probability, are the same in all: as inputs of a graph, it is traced twice.
    torch._dynamo.config.specialize_float = True
    # A backward pass that cannot be compiled fails with its forward pass, where there is still a way back.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    compiler = _Compiler(options)
    regions = compiler.region(before_attention), compiler.region(after_attention)
    for layer in model.language_model.model.layers:
        layer.regions = regions  # type: ignore[assignment]  # torch types modules in lists as Module
    for blocks in (model.visual_encoder.blocks, model.qformer.encoder.layer):
        forward = compiler.region(type(blocks[0]).forward)
        for block in blocks:
            block.forward = partial(forward, block)


class _Compiler:
    """Compiles functions of blocks; from the first that cannot be compiled on, all of them run eagerly."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._failed = False

    def region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs as one compiled graph as long as nothing fails to compile."""
        compiled = torch.compile(function, fullgraph=True, dynamic=True, **self._options)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._failed:
                try:
                    return compiled(*args, **kwargs)
                except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                    self._failed = True
                    LOGGER.warning(
                        "torch.compile failed in %s, and all blocks run eagerly from here on (model.compile: false "
                        "does so from the start): %s",
                        getattr(function, "__qualname__", function),
                        " ".join(str(error).split("\n")[:2]),
                    )
            return function(*args, **kwargs)

        return run


def _keep_compiled_code() -> None:
    """Keep compiled code in the user's cache, for all ranks and the next start, unless the environment names a folder.

    Where torch puts it by itself, in /tmp, it is lost with the machine's next start or the job's end.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return  # torch notes its own choice there, too, as soon as anything is compiled
    folder = cache_home() / "torchinductor"
    with suppress(OSError):  # without a cache that can be written to, torch's own choice will do
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
