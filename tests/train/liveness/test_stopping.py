"""What stops a run in addition to its own signals, and a console that is closed before the message is printed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import started
from helpers.patience import PATIENCE

from tinygptv_ds.train.liveness.launchers import Launchers, launchers_of
from tinygptv_ds.train.liveness.stop_signals import SIGNALS, StopSignals

ROOT = Path(__file__).parents[3]
ASLEEP = "import time; print(flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("name", "words", "is_launcher"),
    [
        ("torchrun", ["--nnodes=2", "launch/stage4.sh"], True),
        ("deepspeed", ["launch/stage4.sh"], True),
        ("python.py", ["-m", "torch.distributed.run", "launch/stage4.sh"], True),
        ("python.py", ["-u", "-m", "deepspeed.launcher.launch", "launch/stage4.sh"], True),
        ("run.py", ["--config", "my_deepspeed", "torchrun.yaml"], False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(
    name: str, words: list[str], is_launcher: bool, tmp_path: Path
) -> None:
    """The process is started by this test, which is no launcher itself."""
    (tmp_path / name).write_text(ASLEEP)
    with subprocess.Popen([sys.executable, tmp_path / name, *words], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert launchers_of(process.pid) == ([process.pid] if is_launcher else [])
        process.kill()


STOPPED = """
import sys
from pathlib import Path
from tinygptv_ds.cli import run_command
from tinygptv_ds.errors import Stopped
from tinygptv_ds.log import LOGGER, set_up_logging

def train():
    set_up_logging(0, Path(sys.argv[1]))
    LOGGER.info("step 1")
    LOGGER.info("saving")
    print("and whatever else")
    LOGGER.warning("saved")
    raise Stopped(15, "SIGTERM at step 1 of 2; saved")

run_command(train)
"""


def test_a_console_that_has_gone_stops_nothing(tmp_path: Path) -> None:
    """The launcher may close its ssh connections first and only then signal the ranks to stop."""
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "log.txt")]
    done = subprocess.run(command, stdout=write, stderr=write, env=env, check=False, timeout=PATIENCE)
    os.close(write)
    assert done.returncode == 143
    lines = [line.split(maxsplit=3)[-1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["step 1", "saving", "saved"]


def test_a_console_on_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    """As with `> run.log`: the log file has the lines, and the exit code is that of the run."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for script, code in ((STOPPED, 143), (STOPPED.replace("    raise Stopped", "    return\n    raise Stopped"), 0)):
        with Path(os.devnull).with_name("full").open("w") as full:
            command = [sys.executable, "-c", script, str(tmp_path / f"log-{code}.txt")]
            done = subprocess.run(command, stdout=full, stderr=full, env=env, check=False, timeout=PATIENCE)
        assert done.returncode == code
        assert (tmp_path / f"log-{code}.txt").read_text().endswith("WARNING saved\n")


def test_repeated_stop_signals(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Further signals, even after saving, do not change the exit code of the first."""
    raw = raw_recipe(train__steps_per_epoch=100_000, train__sample_count=0)
    with started(tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run") as run:
        run.wait_for(run.folder / "metrics.jsonl")
        (process,) = run.processes
        while process.is_alive():
            run.tell(0, signal.SIGUSR1)
            time.sleep(0.005)
        assert run.end() == [138], run.output
    assert run.output.count("stopped: SIGUSR1 at step ") == 1


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_signals_that_count_as_sigterm(number: signal.Signals, ignored: bool) -> None:
    """A terminal that is gone, unless nohup has it ignored, and a limit on CPU time."""
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        signals = StopSignals(Launchers())
        os.kill(os.getpid(), number)
        assert signals.seen() == [each == signal.SIGTERM and not ignored for each in SIGNALS]
        signals.restore()
    finally:
        signal.signal(number, before)
