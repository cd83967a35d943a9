"""Runs a stage through the DeepSpeed launcher, or in one process, and sees that nothing of it stays behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.patience import PATIENCE
from helpers.written import Written
from tinygptv_ds.config.load import load_recipe

ROOT = Path(__file__).parents[2]
CPU = ROOT / "ds_configs/cpu.json"
# Without the threshold, no parameter of a tiny model would be divided.
ZERO_3 = "--set=deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}"
_MARK = "TINYGPTV_TEST_RUN"  # environment variable by which every process of a run is known


@dataclass(frozen=True)
class Run(Written):
    """A run that has ended: exit code, what it printed (stdout and stderr together), and where it wrote."""

    code: int
    output: str
    folder: Path


def deepspeed_form(stage: int, ranks: int = 2) -> list[str]:
    """`deepspeed launch/stageN.sh`, word for word."""
    return ["deepspeed", *_launcher_options(ranks), f"launch/stage{stage}.sh"]


def bash_form(stage: int, ranks: int = 2) -> list[str]:
    """`bash launch/stageN.sh`."""
    return ["bash", f"launch/stage{stage}.sh", *_launcher_options(ranks)]


def one_process(stage: int) -> list[str]:
    """A single rank without any launcher."""
    return [sys.executable, f"stages/stage{stage}.py"]


def run(
    command: Sequence[str],
    recipe: Path,
    folder: Path,
    *options: str,
    json_file: Path = CPU,
    ok: bool = True,
    meanwhile: Callable[[int], None] | None = None,
) -> Run:
    """Run a stage to its end.

    Args:
        command: one of the forms above.
        recipe: its YAML.
        folder: the run directory.
        options: further options of the stage.
        json_file: for `--deepspeed_config`.
        ok: whether it has to succeed.
        meanwhile: called next to it with the process id of the command.
    """
    given = ["--recipe", str(recipe), "--run-dir", str(folder), "--deepspeed_config", str(json_file), *options]
    code, output = _finish([*command, *given], timeout=PATIENCE, meanwhile=meanwhile)
    assert code == 0 or not ok, f"{' '.join(command)} ended with {code}:\n{output}"
    return Run(code, output, folder)


def images_of_each_rank(recipe: Path, ranks: int) -> list[list[int]]:
    """For every micro-batch of every step, how many samples with an image each rank has."""
    from tinygptv_ds.data.stream.plan import Planner, open_stream

    loaded = load_recipe(recipe)
    plans = map(Planner(open_stream(loaded), ranks).plan, range(loaded.train.total_steps))
    return [
        [sum(ref.dataset != "text" for ref in plan.micro_batch(number, rank)) for rank in range(ranks)]
        for plan in plans
        for number in range(plan.packing.micro_batches)
    ]


def _launcher_options(ranks: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--num_gpus", str(ranks), "--master_port", str(free.getsockname()[1])]


def _finish(command: list[str], timeout: float, meanwhile: Callable[[int], None] | None) -> tuple[int, str]:
    mark = uuid.uuid4().hex
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, _MARK: mark, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        if meanwhile is not None:
            threading.Thread(target=meanwhile, args=(process.pid,), daemon=True).start()
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(_alive(mark))
            output, _ = process.communicate()
            raise AssertionError(f"{' '.join(command)} did not end in {timeout:.0f} s:\n{output}") from None
    left = _left_behind(mark)
    _kill(left)
    assert not left, f"{' '.join(command)} left processes behind:\n{output}"
    return process.returncode, output


def _left_behind(mark: str, patience: float = 60.0) -> list[int]:
    """Processes of the run that are still there after a moment."""
    until = time.monotonic() + patience
    while (alive := _alive(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    return alive


def _alive(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile, or another user's
        if marked and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
