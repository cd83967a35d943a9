"""A launcher killed with -9 while its rank starts up: nobody is left, and nothing trains to the end.

The rank is a real one; its launcher, the outer and the per-node process, are stand-ins with the same words in their
command lines.
"""

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
from helpers.launcher import CPU, ROOT
from helpers.patience import PATIENCE

from tinygptv_ds.distributed import free_port
from tinygptv_ds.processes import children_of, is_alive
from tinygptv_ds.train.setup.machine import port_is_taken

# Starts the words after its own name, and waits for them.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[2:]))"
OUTER = [sys.executable, "-S", "-c", LAUNCHER, "deepspeed.launcher.runner"]
PER_NODE = [sys.executable, "-S", "-c", LAUNCHER, "deepspeed.launcher.launch"]
STEPS = 100_000


class Started:
    """A rank of `ranks` and its launchers, each the child of the one before."""

    def __init__(self, recipe: Path, folder: Path, ranks: int) -> None:
        self.folder, self.port = folder, free_port()
        names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": self.port}
        env = os.environ | {key: str(value) for key, value in names.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "CROSS_RANK": "0", "PYTHONPATH": str(ROOT)}
        given = ["--recipe", str(recipe), "--run-dir", str(folder), "--deepspeed_config", str(CPU)]
        stage = [sys.executable, "-u", "stages/stage4.py", "--local_rank=0", *given]
        self._output = folder.with_suffix(".txt")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*OUTER, *PER_NODE, *stage], cwd=ROOT, env=env, stdout=output, stderr=output
            )
        self.outer = self.process.pid
        self.per_node = self._child_of(self.outer)
        self.rank = self._child_of(self.per_node)

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_for(self, what: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < until, self.output
            time.sleep(0.01)

    def has_torch(self) -> bool:
        return "libtorch" in Path(f"/proc/{self.rank}/maps").read_text()

    def _child_of(self, pid: int) -> int:
        self.wait_for(lambda: bool(children_of(pid)))
        return children_of(pid)[0]


MOMENTS: dict[str, Callable[[Started], bool]] = {
    "Python starts": lambda started: not started.has_torch(),
    "imports torch": lambda started: started.has_torch(),
    "waits for the other ranks": lambda started: port_is_taken(started.port),
    "loads": lambda started: (started.folder / "log.txt").exists(),
}


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        ("outer", "Python starts"),
        ("per_node", "Python starts"),
        ("outer", "imports torch"),
        ("per_node", "waits for the other ranks"),
        ("outer", "loads"),
        ("per_node", "loads"),
    ],
)
def test_nobody_is_left(victim: str, moment: str, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = raw_recipe(train__steps_per_epoch=STEPS, train__sample_count=0)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    started = Started(recipe, tmp_path / "run", 2 if "other ranks" in moment else 1)
    try:
        started.wait_for(lambda: MOMENTS[moment](started))
        os.kill(getattr(started, victim), signal.SIGKILL)
        started.wait_for(lambda: not is_alive(started.rank))
        started.process.wait(PATIENCE)
        started.wait_for(lambda: not is_alive(started.per_node))
    finally:
        for pid in (started.outer, started.per_node, started.rank):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    assert not (started.folder / "model").exists() and "Traceback" not in started.output
    ended = "error: the launcher has ended while the run was starting up; nothing has been trained" in started.output
    # A model this small may have begun its first step within the second in which the thread looks again.
    saved = "stopped: SIGTERM at step " in started.output and f"of {STEPS}; saved" in started.output
    assert ended != saved, started.output
    assert ended or moment == "loads"
    assert (started.folder / "log.txt").exists() == (moment == "loads")
