"""The variables of torch's flight recorder: set, unless the user has set one of their names."""

import mmap
import os
from pathlib import Path

import pytest

from tinygptv_ds.train.liveness.flight_recorder import enable_flight_recorder, write_flight_record

NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
OLD_NAMES = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *OLD_NAMES):
        monkeypatch.setenv(name, "x")  # so that it is unset again
        monkeypatch.delenv(name)


def values() -> list[str | None]:
    return [os.environ.get(name) for name in (*NAMES, *OLD_NAMES)]


def test_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    enable_flight_recorder(Path("run"))
    assert values() == ["2000", f"{tmp_path}/run/stacks/collectives_rank_", "1", None, None]


@pytest.mark.parametrize("names", [NAMES, (*OLD_NAMES, NAMES[2])])
def test_what_the_user_has_set_stays(names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        monkeypatch.setenv(name, "0")
    before = values()
    enable_flight_recorder(tmp_path)
    assert values() == before


def test_torch_knows_these_names() -> None:
    """Names that torch does not read would do nothing."""
    import torch

    with (Path(torch.__file__).parent / "lib/libtorch_cpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert [name for name in (*NAMES[:2], *OLD_NAMES) if library.find(name.encode()) < 0] == []


def test_a_record_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tinygptv_ds.log import set_up_logging

    set_up_logging()
    write_flight_record(tmp_path / "no folder" / "collectives_rank_0")
    assert "collectives_rank_0 cannot be written" in capsys.readouterr().out
