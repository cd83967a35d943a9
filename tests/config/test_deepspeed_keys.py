"""Every supported key exists in the installed DeepSpeed, level by level; refused ones come with a reason."""

import inspect
import re
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling import constants as profiling
from deepspeed.runtime import config as runtime
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor import constants as swapping
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from tinygptv_ds.config.deepspeed_keys import KNOWN, REFUSED, ZERO
from tinygptv_ds.config.deepspeed_rules import check_combinations, check_machine, check_section
from tinygptv_ds.errors import ConfigError

MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}


def section(where: str) -> dict[str, Any]:
    node: Any = KNOWN
    for key in where.split("."):
        node = node[key]
    return node


@pytest.mark.parametrize("where", MODELS)
def test_every_supported_key_of_a_section_is_one_of_deepspeed(where: str) -> None:
    fields = {info.alias or name for name, info in MODELS[where].model_fields.items()}
    refused = {key.removeprefix(f"{where}.") for key in REFUSED if key.startswith(f"{where}.")}
    known = set(section(where))
    assert known
    assert not known & refused
    assert known <= fields


@pytest.mark.parametrize("where", MODELS)
def test_the_types_are_those_of_the_fields(where: str) -> None:
    """DeepSpeed accepts the types that the table accepts, and refuses others."""
    examples = {int: 1, float: 0.5, bool: True, str: "x", list: []}
    for key, kind in section(where).items():
        if isinstance(kind, dict):
            continue
        value = kind[0] if isinstance(kind, tuple) else examples[kind]
        extra = {"stage": 3} if where == "zero_optimization" else {}
        MODELS[where](**{**extra, key: value})


def test_sections_that_deepspeed_reads_by_hand() -> None:
    def names(module: Any, prefix: str) -> set[str]:
        return {
            value
            for name, value in vars(module).items()
            if name.startswith(prefix) and isinstance(value, str) and not name.endswith(("DEFAULT", "FORMAT"))
        } - {prefix.rstrip("_").lower()}

    assert set(KNOWN["aio"]) <= names(swapping, "AIO_")
    assert set(KNOWN["flops_profiler"]) <= names(profiling, "FLOPS_PROFILER_")
    assert set(KNOWN["torch_autocast"]) == names(constants, "TORCH_AUTOCAST_")


def test_every_supported_top_level_key_is_read_by_deepspeed() -> None:
    """DeepSpeed's reading functions name the keys by constants or as literals."""
    source = inspect.getsource(runtime)
    words = set(re.findall(r"""param_dict(?:\.get\(|\[)\s*['"](\w+)['"]""", source))
    by_name = set(
        re.findall(r"(?:get_scalar_param\(\s*param_dict,\s*|param_dict\.get\(|param_dict\[)([A-Z_]+)", source)
    )
    words |= {value for name in by_name if isinstance(value := getattr(constants, name, None), str)}
    words |= set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert len(words) > 30
    words |= {value for value in vars(constants).values() if isinstance(value, str)}
    scalars = {key for key, kind in KNOWN.items() if not isinstance(kind, dict)}  # sections: see above
    assert scalars - words == {"comment"}


def test_removed_keys_of_zero() -> None:
    assert all(f"zero_optimization.{key}" in REFUSED for key in runtime._REMOVED_ZERO_CONFIG_KEYS)
    assert not {key for key in ZERO if f"zero_optimization.{key}" in REFUSED}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "'zero_optimization.overlap_com'; did you mean overlap",
        ),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage must be a whole number, not "2"'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be a whole number, not true"),
        ({"zero_optimization": 2}, "zero_optimization must be a section in braces, not 2"),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping must be a number, not "1.0"'),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; it must be finite and not negative"),
        ({"torch_autocast": {"enabled": "yes"}}, 'torch_autocast.enabled must be true or false, not "yes"'),
        ({"communication_data_type": "bfloat16"}, "communication_data_type is 'bfloat16'; use fp32 or fp16 or bf16"),
        ({"compile": {"deepcompile": True}}, "leave out 'compile'; model.compile has the model's blocks compiled"),
        ({"activation_checkpointing": {}}, "model.gradient_checkpointing"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "leave out 'zero_optimization.cpu_offload'; write"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "offload_param.devise'; did you mean device"),
    ],
)
def test_keys_and_types(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.json: ") as caught:
        check_section(change, KNOWN, "my.json")
    assert message in str(caught.value)


NVME = {"device": "nvme"}
AUTOCAST = {"torch_autocast": {"enabled": True}}


@pytest.mark.parametrize(
    ("zero", "rest", "message"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, "offload_param on cpu needs stage 3, not 2"),
        ({"stage": 3, "offload_param": NVME}, {}, "offload_param on nvme has no nvme_path"),
        ({"stage": 2, "offload_optimizer": NVME | {"nvme_path": "d"}}, {}, "offload_optimizer on nvme needs stage 3"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}, '"zero_force_ds_cpu_optimizer": false'),
        ({"stage": 2, "offload_optimizer": {"ratio": 0.5}}, {}, "offload_optimizer.ratio needs stage 3, not 2"),
        (
            {"stage": 2, "zero_quantized_gradients": True},
            {},
            "zero_quantized_gradients is part of ZeRO++ and needs stage 3",
        ),
        ({"stage": 1, "zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size is part of ZeRO++ and needs stage 3"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, {}, "is 3, into which 4 rank(s) do not divide"),
        ({"stage": 3, "zero_quantized_weights": True}, AUTOCAST, "does not go with fp32 weights"),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "does not go with fp32 weights"),
    ],
)
def test_what_does_not_work_together(zero: dict[str, Any], rest: dict[str, Any], message: str) -> None:
    config = {"zero_optimization": zero, **rest}
    check_section(config, KNOWN, "my.json")
    with pytest.raises(ConfigError, match=r"my\.json: ") as caught:
        check_combinations(config, "my.json", world_size=4)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": True}},
        {"zero_optimization": {"zero_quantized_weights": True}},
        {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
        {"zero_optimization": {"offload_param": NVME}},
    ],
)
def test_what_needs_a_gpu(config: dict[str, Any]) -> None:
    check_machine(config, has_gpu=True, source="my.json")
    with pytest.raises(ConfigError, match=r"my.json: .* needs a GPU, and this machine shows none: .*cpu\.json"):
        check_machine(config, has_gpu=False, source="my.json")
