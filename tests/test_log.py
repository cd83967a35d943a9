"""Colors on a terminal, none elsewhere; what libraries log and warn of goes to the log file alone."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinygptv_ds.console import GREEN, colored, error_text
from tinygptv_ds.log import LOGGER, QUIET, log_with_head, set_up_logging

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    """A stream that a person watches."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let this process print to a terminal that shows colors; no fixture: pytest sets the streams later."""
    for name, value in (("NO_COLOR", ""), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def log_all(log_file: Path) -> None:
    set_up_logging(0, log_file)
    log_with_head("step 1/2", " | loss 3")
    log_with_head("next:", " chat", GREEN)
    LOGGER.warning("careful")
    LOGGER.info("plain step 1/2")


def test_colors_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The log file has none."""
    terminal = use_terminal(monkeypatch)
    log_all(tmp_path / "log.txt")
    shown = ["\033[36mstep 1/2\033[0m | loss 3", "\033[32mnext:\033[0m chat", "\033[33mcareful\033[0m"]
    assert terminal.getvalue().splitlines() == [*shown, "plain step 1/2"]
    assert error_text("error: no") == f"{colored('error:', '31')} no" and error_text("an error: no") == "an error: no"
    written = [line.split(maxsplit=3)[3] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert written == ["step 1/2 | loss 3", "next: chat", "careful", "plain step 1/2"]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colors(name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    log_all(tmp_path / "log.txt")
    assert "\033" not in terminal.getvalue() + error_text("error: no")


def test_no_colors_in_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log_all(tmp_path / "log.txt")
    assert "\033" not in capsys.readouterr().out + error_text("error: no")


LIBRARIES = """
import logging, sys, warnings
from pathlib import Path
from tinygptv_ds.log import held_prints, hold_library_output, set_up_logging

hold_library_output()
warnings.warn("at its import", FutureWarning)
library = logging.getLogger("DeepSpeed")  # as DeepSpeed sets it up at its import
library.setLevel(logging.WARNING)
library.addHandler(logging.StreamHandler(sys.stdout))
hold_library_output()
library.info("starting\\n  the engine")
set_up_logging(int(sys.argv[1]), Path(sys.argv[2]))
warnings.warn("old name", UserWarning)
with held_prints():
    print("printed")
library.error("lost")
logging.getLogger("transformers.modeling").info("too much")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_output_of_libraries(rank: int, tmp_path: Path) -> None:
    """In its order, what came before there was a file included; $PYTHONWARNINGS of the launcher is undone."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": QUIET}
    command = [sys.executable, "-c", LIBRARIES, str(rank), str(tmp_path / "log.txt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("DeepSpeed: lost\n", "")
    if rank:
        assert not (tmp_path / "log.txt").exists()
        return
    lines = [line.split(maxsplit=2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [
        "WARNING [py.warnings] <string>:7: FutureWarning: at its import",
        "INFO [DeepSpeed] starting the engine",
        "WARNING [py.warnings] <string>:14: UserWarning: old name",
        "INFO [DeepSpeed] printed",
        "ERROR [DeepSpeed] lost",
    ]
