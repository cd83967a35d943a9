"""launch/slurm.sbatch without SLURM: stand-ins for srun and scontrol, two tasks on this machine as two nodes."""

import os
import re
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
from helpers.launcher import CPU, ROOT

SCRIPT = ROOT / "launch/slurm.sbatch"
# Starts the tasks as srun does, and ends as it does: with the highest exit code, 128 + the number for a signal.
SRUN = """
import os, subprocess, sys
from pathlib import Path
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = []
for rank in range(2):
    own = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank, "SLURM_NTASKS": 2}
    tasks.append(subprocess.Popen(command, env={**os.environ, **{key: str(value) for key, value in own.items()}}))
Path(os.environ["TASKS"]).write_text(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost")
elif sys.argv[1] == "requeue" and not os.environ.get("FORBIDDEN"):
    open(os.environ["REQUEUED"], "a").write(sys.argv[2] + chr(10))
else:
    sys.exit("denied")
"""


class Slurm:
    """Runs the script as a batch job, from a copy elsewhere as SLURM does, and remembers what was asked of it."""

    def __init__(self, folder: Path, submitted_in: Path) -> None:
        self.folder, self.submitted_in = folder, submitted_in
        for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!{sys.executable}\n{code}")
            program.chmod(0o755)
        (folder / "spool").mkdir()
        self.script = folder / "spool/slurm_script"
        self.script.write_bytes(SCRIPT.read_bytes())
        self.starts = 0

    @property
    def requeued(self) -> list[str]:
        """The jobs that were put back."""
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []

    def submit(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """`sbatch launch/slurm.sbatch ARGUMENTS`, the job running at once."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        job = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        job |= {"SLURM_SUBMIT_DIR": str(self.submitted_in), "SLURM_RESTART_COUNT": str(self.starts)}
        own = {"PATH": path, "TASKS": str(self.folder / "tasks"), "REQUEUED": str(self.folder / "requeued")}
        self.starts += 1
        (self.folder / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(self.script), *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **job, **own, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def send(self, number: signal.Signals) -> None:
        """To the processes that srun has started and to no other, as without "B:"."""
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)


def end(job: subprocess.Popen[str], timeout: float = 600) -> tuple[int, str]:
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise AssertionError(f"the job did not end:\n{job.communicate()[0]}") from None
    return job.returncode, output


def test_stopped_requeued_and_resumed(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Signaled as the script asks for, a real run saves and is requeued; ranks with its options go on from there."""
    (asked,) = re.findall(r"^#SBATCH --signal=(\S+)@\d+", SCRIPT.read_text(), re.M)
    slurm, number = Slurm(tmp_path, ROOT), signal.Signals[f"SIG{asked}"]
    raw = raw_recipe(train__steps_per_epoch=100_000, train__checkpoint_every=3, data__num_workers=1)
    recipe, run = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run"
    job = slurm.submit("stage4", "--recipe", str(recipe), "--run-dir", str(run), "--deepspeed_config", str(CPU))
    wait_for_step(run, 4, job)
    slurm.send(number)
    ended_with, output = end(job)
    assert ended_with == 138, output
    assert f"stopped: {number.name} at step" in output and "Traceback" not in output, output
    assert "stage 4 on 2 rank(s) of cpu" in output
    (reached,) = (int(step) for step in re.findall(r"stopped: SIG\w+ at step (\d+) of", output))
    assert (run / f"checkpoints/step-{reached:08d}").is_dir() and slurm.requeued == ["4711"]
    with started(recipe, run, ranks=2) as again:
        again.wait_for(run / f"checkpoints/step-{reached + 3 - reached % 3:08d}")
        again.tell(1, signal.SIGTERM)
        assert again.end() == [143, 143]
    log = (run / "log.txt").read_text()
    assert log.count("resuming from") == 1
    steps = [int(step) for step in re.findall(r"step (\d+)/100000 \|", log)]
    assert steps == [*range(1, steps[-1] + 1)]  # the second start left out none and did none again


def wait_for_step(run: Path, step: int, job: subprocess.Popen[str]) -> None:
    """Wait until a step is logged or the job ends: two ranks that start on a busy machine take minutes."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert job.poll() is None, end(job)[1]
        time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """A repository whose stage tells its environment, and ends with a code or signal of its own for each rank."""
    folder = tmp_path / "submitted in"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages/stage2.py").write_text(
        "import os, sys\nrank = int(os.environ['RANK'])\n"
        "received = {k: os.environ.get(k) for k in os.environ['TELL'].split()}\n"
        "os.write(1, f'{received} {sys.argv[1:]}\\n'.encode())\n"
        "step = os.environ.get('STEP')\n"
        "step and os.makedirs(f'my run/checkpoints/step-{step}', exist_ok=True)\n"
        "code = int(os.environ['CODES'].split()[rank])\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n"
    )
    return Slurm(tmp_path, folder)


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0", 0, False),
        ("2 2", 2, False),
        ("1 75", 75, False),
        ("-9 75", 137, False),
        ("138 138", 138, True),
        ("143 143", 143, True),
        ("-15 -15", 143, True),  # signaled before it could listen: there is nothing to save yet
    ],
)
def test_which_ends_are_requeued(codes: str, code: int, requeued: bool, slurm: Slurm) -> None:
    assert end(slurm.submit("stage2", CODES=codes, TELL="RANK"))[0] == code
    assert slurm.requeued == (["4711"] if requeued else [])


def test_lost_ranks_are_requeued_where_there_is_progress(slurm: Slurm) -> None:
    """Not without a new checkpoint, and at most RESTARTS times."""
    arguments = ("stage2", "--run-dir", "my run")
    for starts, (step, requeued) in enumerate([("00000004", 1), ("00000009", 2), ("00000009", 2), ("00000012", 2)]):
        assert slurm.starts == starts
        code, output = end(slurm.submit(*arguments, CODES="-9 75", TELL="RANK", STEP=step, RESTARTS="3"))
        assert code == 137 and len(slurm.requeued) == requeued, output
        assert output.count("} ['--run-dir', 'my run']\n") == 2, output  # the same each time
    assert "not requeued: no new checkpoint, or restarted 3 times" in output


def test_what_the_ranks_are_given(slurm: Slurm) -> None:
    """Arguments as they were given, with spaces; who they are; where they meet; and what `.deepspeed_env` says."""
    (slurm.submitted_in / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=ib0\nMINE=a=b c")
    tell = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME MINE PYTHONPATH"
    code, output = end(slurm.submit("stage2", "--set", "data.only=[gqa, vqa]", CODES="0 0", TELL=tell, PYTHONPATH=""))
    assert code == 0, output
    for rank in range(2):
        values = [str(rank), "0", "2", "1", "localhost", "24711", "ib0", "a=b c", str(slurm.submitted_in)]
        received = dict(zip(tell.split(), values, strict=True))
        assert f"{received} ['--set', 'data.only=[gqa, vqa]']" in output, output


def test_what_cannot_be_started(slurm: Slurm) -> None:
    for arguments in ((), ("stage9",)):
        code, output = end(slurm.submit(*arguments))
        assert code == 2 and "sbatch launch/slurm.sbatch stage1 [options]" in output, output
    code, output = end(slurm.submit("stage2", CODES="138 138", TELL="RANK", FORBIDDEN="1"))
    assert code == 138 and "not requeued; the same sbatch command resumes" in output, output
