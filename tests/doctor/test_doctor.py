"""`doctor`: its results, what it reports as missing, and that it works where almost nothing is installed."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from packaging.requirements import Requirement
from test_user_errors import python

from tinygptv_ds.doctor import local as doctor
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models.attention import available_backends


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests run here, so training is possible here, also where the environment is not activated.

    The launcher next to this Python is found without its folder on PATH.
    """
    monkeypatch.setenv("PATH", str(tmp_path))
    call(doctor)
    report = capsys.readouterr().out
    assert report.endswith("Training is possible here.\n")
    assert "MISSING" not in report
    lines = {line.split()[1]: line for line in report.splitlines() if line[:1] not in (" ", "")}
    for name in ("torch", "deepspeed", "transformers"):
        assert metadata.version(name) in lines[name]
    assert {"computer", "disk", "launcher", "accelerator", "imports", "bf16", "fp16", "fp32"} <= lines.keys()
    assert "attention by sdpa" in lines["fp32"]
    assert "gloo" in lines["communication"]
    scripts = Path(sys.executable).parent
    assert f"note     launcher         {scripts / 'deepspeed'}, not on PATH\n" in report
    assert f"-> source {scripts / 'activate'}\n" in report


def test_without_any_package() -> None:
    """Before requirements.txt is installed it runs, and its report names the command that installs it."""
    done = python(
        "sys.modules.update(dict.fromkeys(('packaging', 'packaging.requirements', 'yaml', 'numpy', 'PIL', 'tqdm'))); "
        "runpy.run_module('tinygptv_ds', run_name='__main__', alter_sys=True)",
        "doctor",
    )
    assert done.returncode == 2, done.stderr
    assert "MISSING  packages" in done.stdout
    assert "-> source launch/setup.sh requirements.txt" in done.stdout
    assert "training is not possible here yet: see packages" in done.stderr
    assert "Traceback" not in done.stderr


def test_versions_against_their_ranges() -> None:
    installed = metadata.version("torch")
    wanted = [Requirement(text) for text in ("torch>=2.0", "torch<2.0", "no-such-package>=1")]
    good, wrong, missing = doctor.package_versions(wanted)
    assert not good.blocks and good.remedy is None and installed in good.text
    assert wrong.blocks and wrong.remedy == "pip install 'torch<2.0'" and installed in wrong.text
    assert missing.blocks and missing.text == "not installed"


def test_every_requirement_is_checked() -> None:
    lines = (Path(__file__).parents[2] / "requirements.txt").read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert len(doctor.requirements("requirements.txt")) == len(named) > 10
    assert [r.name for r in doctor.requirements("requirements-gpu.txt")] == ["flash-attn"]


def test_missing_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert doctor.launcher().blocks
    assert "setup.sh" in doctor.launcher().remedy
    assert not doctor.compiler().blocks
    assert "no c++ and no ninja" in doctor.compiler().text
    assert doctor.python_version((3, 10)).blocks
    assert not doctor.python_version((3, 12)).blocks
    assert doctor.communication("no-such-backend").blocks
    assert doctor.no_gpu(driver=True).remedy and not doctor.no_gpu(driver=False).remedy


def test_the_attention_named_is_the_one_used() -> None:
    found = {result.name: result.text for result in doctor.precisions("cpu")}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert found[name].startswith(f"attention by {available_backends('cpu', dtype)[0]}")


@pytest.mark.parametrize("look", [doctor.python_version, doctor.communication])
def test_what_blocks_is_exit_code_2(look: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    result = look((3, 9)) if look is doctor.python_version else look("none")
    monkeypatch.setattr(doctor, "check_machine", lambda: iter([result]))
    with pytest.raises(ConfigError, match=f"see {result.name} above"):
        call(doctor)
