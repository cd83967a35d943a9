"""Checks of DeepSpeed's JSON without importing deepspeed: keys, types, and settings that do not work together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from tinygptv_ds.config.deepspeed_keys import REFUSED
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import ConfigError, shown

_PRECISIONS = ("bf16", "fp16", "torch_autocast")
_QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_OFFLOADS = ("offload_param", "offload_optimizer")
COMPILED_ZERO_3 = "ZeRO-3 gathers each layer's weights in a hook, and a compiled block would take the hooks in"
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}


def check_section(section: dict[str, Any], known: dict[str, Any], source: str, prefix: str = "") -> None:
    """Check that every key is supported and every value has its type, at every level.

    Args:
        section: the JSON, or a section of it.
        known: the supported keys of this section, as in `deepspeed_keys`.
        source: the file's name, for errors.
        prefix: the path of the section, with a dot at its end.

    Raises:
        ConfigError: names the key, and what to write instead.
    """
    for key, value in section.items():
        where = prefix + key
        if where in REFUSED:
            raise ConfigError(f"{source}: leave out {where!r}; {REFUSED[where]}")
        if key not in known:
            raise ConfigError(
                f"{source}: unknown key {shown(where)}{nearest(key, known)} (DeepSpeed ignores unknown keys silently, "
                "so that only supported ones are accepted)"
            )
        if value == "auto":
            raise ConfigError(
                f'{source}: {where} is "auto", which DeepSpeed turns silently into a default; write a value'
            )
        if isinstance(known[key], dict) and isinstance(value, dict):
            check_section(value, known[key], source, f"{where}.")
        else:
            _check_value(value, known[key], source, where)


def check_combinations(config: dict[str, Any], source: str, world_size: int) -> None:
    """Check for settings that DeepSpeed rejects late, crashes on, or accepts and ignores.

    Raises:
        ConfigError: names the settings that do not work together, the reason, and what to write instead.
    """
    on = [name for name in _PRECISIONS if config.get(name, {}).get("enabled")]
    if len(on) > 1:
        raise ConfigError(f"{source}: {' and '.join(on)} are both enabled; keep one")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0:
        raise ConfigError(f"{source}: use ZeRO stage 1, 2 or 3; without ZeRO, DeepSpeed does not notice overflows")
    if stage not in (1, 2, 3):
        raise ConfigError(f"{source}: zero_optimization.stage is {stage}; use 1, 2 or 3")
    _check_zero_plus_plus(zero, on, source, world_size)
    _check_offload(config, zero, source)
    _check_gradients_are_checked(config, source)


def _check_gradients_are_checked(config: dict[str, Any], source: str) -> None:
    """Check that DeepSpeed looks for gradients that are not finite, on which the guard against such steps relies."""
    if config.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(
            f"{source}: leave out bf16.check_grad_overflow; false can switch off DeepSpeed's look at the gradients, "
            "without which a step that is not finite would reach the weights"
        )


def check_machine(config: dict[str, Any], *, has_gpu: bool, source: str) -> None:
    """Check that a machine without a GPU is not asked for settings that need one.

    Raises:
        ConfigError: names the setting, the reason, and files in ds_configs that run without.
    """
    for key, why in () if has_gpu else _settings_for_gpus(config):
        raise ConfigError(
            f"{source}: {key} needs a GPU, and this machine shows none: {why}. Without one, take "
            "ds_configs/cpu.json or ds_configs/zero3_offload.json"
        )


def _settings_for_gpus(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    zero = config.get("zero_optimization", {})
    if config.get("fp16", {}).get("enabled"):
        yield "fp16", "DeepSpeed keeps fp16 weights on GPUs alone"
    for key in _QUANTISED:
        if zero.get(key):
            yield f"zero_optimization.{key}", "its kernels are written in CUDA"
    for name in _OFFLOADS:
        if zero.get(name, {}).get("device") == "nvme":
            yield f"zero_optimization.{name} on nvme", "it moves between the disk and the pinned memory of a GPU"


def _check_value(value: Any, kind: Any, source: str, where: str) -> None:
    if isinstance(kind, tuple):
        if value not in kind:
            raise ConfigError(f"{source}: {where} is {value!r}; use {' or '.join(kind)}")
        return
    wanted = dict if isinstance(kind, dict) else (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        name = "a section in braces" if isinstance(kind, dict) else _NAMES[kind]
        raise ConfigError(f"{source}: {where} must be {name}, not {json.dumps(value)}")
    least = -1 if where == "flops_profiler.module_depth" else 0  # there, -1 means all
    if isinstance(value, int | float) and kind in (int, float) and not (value >= least and math.isfinite(value)):
        raise ConfigError(f"{source}: {where} is {value}; it must be finite and not negative")


def _check_zero_plus_plus(zero: dict[str, Any], precisions: list[str], source: str, world_size: int) -> None:
    stage, size = zero["stage"], zero.get("zero_hpz_partition_size", 1)
    used = [key for key in _QUANTISED if zero.get(key)] + ["zero_hpz_partition_size"] * (size != 1)
    if used and stage != 3:
        raise ConfigError(f"{source}: zero_optimization.{used[0]} is part of ZeRO++ and needs stage 3, not {stage}")
    if zero.get("zero_quantized_weights") and not {"bf16", "fp16"} & set(precisions):
        raise ConfigError(
            f"{source}: zero_optimization.zero_quantized_weights does not go with fp32 weights, which torch_autocast "
            'leaves in place; write "bf16": {"enabled": true} instead, as ds_configs/zeropp.json does'
        )
    if size < 1 or world_size % size:
        raise ConfigError(
            f"{source}: zero_optimization.zero_hpz_partition_size is {size}, into which {world_size} rank(s) do not "
            "divide; set it to the GPUs of one node with --set deepspeed.zero_optimization.zero_hpz_partition_size=N"
        )


def _check_offload(config: dict[str, Any], zero: dict[str, Any], source: str) -> None:
    stage = zero["stage"]
    for name in _OFFLOADS:
        device = zero.get(name, {}).get("device", "none")
        where = f"{source}: zero_optimization.{name} on {device}"
        if device == "nvme" and not zero[name].get("nvme_path"):
            raise ConfigError(f"{where} has no nvme_path; write a folder of a local NVMe disk")
        if stage != 3 and (device == "nvme" or (name == "offload_param" and device == "cpu")):
            raise ConfigError(f"{where} needs stage 3, not {stage}")
    optimizer = zero.get("offload_optimizer", {})
    if stage != 3 and optimizer.get("ratio", 1.0) < 1:
        raise ConfigError(f"{source}: zero_optimization.offload_optimizer.ratio needs stage 3, not {stage}")
    if optimizer.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            f'{source}: next to zero_optimization.offload_optimizer write "zero_force_ds_cpu_optimizer": false: the '
            "optimizer here is torch's AdamW; DeepSpeed's own would be compiled at the first start"
        )
