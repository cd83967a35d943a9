"""What quantized frozen weights need, and what they do not go with; checked before torch is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from tinygptv_ds.config.recipe import ModelSection
from tinygptv_ds.errors import ConfigError


def check_bitsandbytes(bits: int) -> None:
    """Check that bitsandbytes is installed.

    Args:
        bits: what it is needed for, for the message.

    Raises:
        ConfigError: it is missing; the message says how to install it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{bits} bits need bitsandbytes: pip install -r requirements-quant.txt, "
            "or pip install 'bitsandbytes>=0.50,<1'"
        )


def check_frozen_bits(model: ModelSection, deepspeed: dict[str, Any], source: str) -> None:
    """Check that a model whose frozen weights are quantized can be trained here with this DeepSpeed JSON.

    Raises:
        ConfigError: the JSON divides parameters among ranks, or bitsandbytes is missing.
    """
    fields = [name for name in ("frozen_bits", "fp8") if getattr(model, name) is not None]
    if fields and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        field = f"model.{fields[0]}"
        raise ConfigError(
            f"{source}: ZeRO-3 does not go with {field}. It divides parameters among the ranks, and "
            "quantized weights are none: every rank would hold all of them, and gather the rest as well. Take "
            f"ds_configs/zero2_bf16.json, or set {field} to null"
        )
    if model.frozen_bits is not None:
        check_bitsandbytes(model.frozen_bits)
