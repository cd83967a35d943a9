"""DeepSpeed's JSON, checked and completed by the recipe.

DeepSpeed ignores unknown top-level keys, replaces "auto" silently by defaults, and clips gradients unless told not to.
Here every key must be known, nothing is "auto", clipping is written, and what the recipe decides comes from the recipe.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from tinygptv_ds.config.schema import Recipe
from tinygptv_ds.errors import ConfigError

# Top-level keys of DeepSpeed 0.19 that make sense here. The optimizer and schedule are the recipe's.
KNOWN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "aio",
    "checkpoint",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "dump_state",
    "disable_allgather",
    "compile",
    "disable_python_gc",
    "comment",
)
RECIPE_OWNS = {
    "optimizer": "the recipe's optimizer section",
    "scheduler": "the recipe's optimizer section",
    "tensorboard": "the run directory, which always has TensorBoard logs",
}


def load_deepspeed_json(path: Path | str) -> dict[str, Any]:
    """Read the JSON file.

    Raises:
        ConfigError: it is missing or no JSON object.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no DeepSpeed JSON at {path}; ds_configs/ holds the ready ones") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return raw


def resolve_deepspeed(raw: dict[str, Any], recipe: Recipe, world_size: int, source: str) -> dict[str, Any]:
    """The JSON that DeepSpeed gets: the file, the recipe's `deepspeed` changes, and the recipe's batch sizes.

    Args:
        raw: what the file holds.
        recipe: the recipe.
        world_size: ranks over all nodes.
        source: the file's name, for errors.

    Raises:
        ConfigError: an unknown key, an "auto", two precisions at once, or a value that disagrees with the recipe.
    """
    config = _merge(raw, recipe.deepspeed)
    _check_keys(config, source)
    _check_no_auto(config, source, "")
    _check_precision(config, source)
    accumulation = recipe.train.accumulation(world_size)
    owned = {
        "train_batch_size": (recipe.train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (recipe.train.micro_batch_size or 1, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, f"train.batch_size and {world_size} rank(s)"),
    }
    for key, (value, why) in owned.items():
        if config.setdefault(key, value) != value:
            raise ConfigError(
                f"{source}: {key} is {config[key]}, but the recipe's {why} make it {value}. "
                "Leave the key out of the JSON: the recipe decides it"
            )
    clipping = recipe.optimizer.gradient_clipping
    if clipping is None and "gradient_clipping" not in config:
        raise ConfigError(f"{source}: write gradient_clipping (0.0 for none); left out, DeepSpeed clips at 1.0")
    if clipping is not None and config.setdefault("gradient_clipping", clipping) != clipping:
        raise ConfigError(
            f"{source}: gradient_clipping is {config['gradient_clipping']}, the recipe's optimizer.gradient_clipping "
            f"{clipping}. Change one of them, for instance with --set deepspeed.gradient_clipping={clipping}"
        )
    config.setdefault("steps_per_print", 1_000_000_000)
    config.pop("comment", None)
    return config


def precision(config: dict[str, Any]) -> str:
    """ "bf16", "fp16" or "fp32": what matrix products run in under this JSON."""
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return {"bfloat16": "bf16", "float16": "fp16"}[autocast.get("dtype", "bfloat16")]
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled"):
            return name
    return "fp32"


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of this JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_keys(config: dict[str, Any], source: str) -> None:
    for key in config:
        if key in RECIPE_OWNS:
            raise ConfigError(f"{source}: leave out {key!r}; it comes from {RECIPE_OWNS[key]}")
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{source}: unknown key {key!r}{hint} (DeepSpeed itself would ignore it silently)")


def _check_no_auto(node: Any, source: str, where: str) -> None:
    if node == "auto":
        raise ConfigError(f'{source}: {where} is "auto", which DeepSpeed turns silently into a default; write a value')
    if isinstance(node, dict):
        for key, value in node.items():
            _check_no_auto(value, source, f"{where}.{key}" if where else key)


def _check_precision(config: dict[str, Any], source: str) -> None:
    on = [name for name in ("bf16", "fp16", "torch_autocast") if config.get(name, {}).get("enabled")]
    if len(on) > 1:
        raise ConfigError(f"{source}: {' and '.join(on)} are both enabled; keep one")
    dtype = config.get("torch_autocast", {}).get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "float16"):
        raise ConfigError(f"{source}: torch_autocast.dtype is {dtype!r}; use bfloat16 or float16")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: zero_optimization.stage is {stage!r}; use 1, 2 or 3")
    if stage == 0:
        raise ConfigError(f"{source}: use ZeRO stage 1, 2 or 3; without ZeRO, DeepSpeed does not notice overflows")
