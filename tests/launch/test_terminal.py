"""The console of a tiny run on a terminal: two ranks under the launcher, in a pseudo-terminal."""

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import tiny
from helpers.launcher import CPU, ROOT, bash_form

ROWS, COLUMNS = 40, 120


def on_a_terminal(command: Sequence[str]) -> tuple[int, str]:
    """Return the exit code of a command and what it has written to its terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "DS_ACCELERATOR")}
    env |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    written = b""
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        try:
            while block := os.read(ours, 65536):
                written += block
        except OSError as error:
            assert error.errno == errno.EIO  # the last process with the terminal has ended
    os.close(ours)
    return process.returncode, written.decode()


def seen(written: str) -> list[str]:
    """Return the lines that remain on the screen: after a carriage return a line is written over."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in written.split("\n")]
    return [line for line in lines if line.strip() and not line.startswith("\033[0m\033")]


def test_console(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = raw_recipe(train__sample_every=3, train__checkpoint_every=3)
    recipe, folder = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run"
    given = ["--recipe", str(recipe), "--run-dir", str(folder), "--deepspeed_config", str(CPU)]
    code, written = on_a_terminal([*bash_form(4), *given])
    assert code == 0, written
    lines = seen(written)
    assert lines[0].startswith("stage 4 on 2 rank(s) of cpu, ZeRO-2, fp32, run directory"), lines[:5]
    # Every step has a line above the bar, the bar reaches its end, and an answer is shown each time, by turns.
    steps = [line for line in lines if line.startswith("\033[36mstep ")]
    assert [re.match(r"\033\[36mstep (\d+)/6\033\[0m \| loss \d", line)[1] for line in steps] == list("123456")
    assert re.search(r"stage 4: 100%\|█+\| 6/6 \[", written)
    answers = [re.match(r"\033\[35msample (\d) at step (\d):\033\[0m ", line) for line in lines]
    assert [found.groups() for found in answers if found] == [("0", "3"), ("1", "6")]
    # Nothing of libraries, which the log file has, without colors.
    assert not re.search("Warning|DeepSpeed|deepspeed|WARNING|INFO|Writing model|accelerator", written)
    log = (folder / "log.txt").read_text()
    assert "INFO [DeepSpeed] " in log and "FutureWarning" in log and "\033" not in log
    assert len([line for line in log.splitlines() if " INFO sample " in line]) == 4
    ending = [re.sub(r"\033\[\d+m", "", line) for line in lines[-6:]]
    assert re.fullmatch(r"finished: 6 steps, \d:\d\d:\d\d; train/loss \d\.\d{4}", ending[0])
    assert ending[1:3] == [f"model: {folder}/model", "next:"]
    assert [line.split()[1] for line in ending[3:]] == ["chat", "eval", "export"]
