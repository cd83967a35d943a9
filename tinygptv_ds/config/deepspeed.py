"""DeepSpeed's JSON, checked and completed by the recipe.

DeepSpeed ignores unknown top-level keys, replaces "auto" silently by defaults, and clips gradients by default. Here
every key must be supported, no value is "auto", clipping is explicit, and batch sizes come from the recipe.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tinygptv_ds.config.deepspeed_keys import KNOWN
from tinygptv_ds.config.deepspeed_rules import COMPILED_ZERO_3, check_combinations, check_section
from tinygptv_ds.config.plain_yaml import LONGEST
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import read_text
from tinygptv_ds.resources import find_project_file


def load_deepspeed_json(path: Path | str) -> dict[str, Any]:
    """Read the JSON file.

    Raises:
        ConfigError: it is missing or no JSON object.
    """
    path = find_project_file(Path(path))
    try:
        raw = json.loads(read_text(path, LONGEST).removeprefix("\ufeff"), object_pairs_hook=_once_each)
    except FileNotFoundError:
        raise ConfigError(f"no DeepSpeed JSON at {path}; ds_configs/ holds the ready ones") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a DeepSpeed JSON") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return raw


def resolve_deepspeed(raw: dict[str, Any], recipe: Recipe, world_size: int, source: str) -> dict[str, Any]:
    """Merge the file, the recipe's `deepspeed` changes and the recipe's batch sizes into what DeepSpeed gets.

    Args:
        raw: the content of the file.
        recipe: the recipe.
        world_size: ranks over all nodes.
        source: the file's name, for errors.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, an "auto", settings that do not work together, or a
            value that disagrees with the recipe.
    """
    config = _merge(raw, recipe.deepspeed)
    check_section(config, KNOWN, source)
    check_combinations(config, source, world_size)
    if recipe.model.compile is True and zero_stage(config) == 3:
        raise ConfigError(
            f"{source}: model.compile is true, but {COMPILED_ZERO_3}. Set it to auto or false, or take ZeRO-2"
        )
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
    # On by default in DeepSpeed, for a line that is never printed; the host would wait for the GPU twice a micro-batch.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    config.pop("comment", None)
    return config


def precision(config: dict[str, Any]) -> str:
    """Return the dtype in which matrix products run under this JSON: "bf16", "fp16" or "fp32"."""
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return {"bfloat16": "bf16", "float16": "fp16"}[autocast.get("dtype", "bfloat16")]
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled"):
            return name
    return "fp32"


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of this JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice")
    return dict(pairs)
