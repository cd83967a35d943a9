"""bf16 on a CPU: it trains, and the log warns where the CPU emulates it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.forked import ROOT, ended

from tinygptv_ds.train.setup.machine import computes_in_bf16


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : amx_bf16 amx_tile\n", True),
        ("Features : fp asimd bf16\n", True),
        ("flags : fpu avx2 avx512f\nflags : fpu avx2 avx512f\n", False),
        ("processor : 0\n", True),
    ],
)
def test_instructions(text: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert computes_in_bf16(tmp_path / "cpuinfo") is has


def test_a_cpu_of_which_nothing_is_known(tmp_path: Path) -> None:
    assert computes_in_bf16(tmp_path / "absent")


def test_a_run(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    run = ended(recipe_file(), tmp_path / "run", "--deepspeed_config", str(ROOT / "ds_configs/cpu_bf16.json"))
    assert len(run.metrics) == 6 and "cpu, ZeRO-2, bf16" in run.output
    assert ("has no instructions for bf16" in run.output) is not computes_in_bf16()
