"""Exit codes and signals of one start, with stand-ins for launcher and ranks: each row of the table of exit codes."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.patience import PATIENCE

from tinygptv_ds.distributed import free_port
from tinygptv_ds.train.launcher.supervisor import Supervisor
from tinygptv_ds.train.liveness.launchers import LOST

# The outer process starts the per-node one, known by the word in its command line, and exits with its code.
OUTER = """
import subprocess, sys
node = subprocess.Popen([sys.executable, "-c", sys.argv[1], "deepspeed.launcher.launch", *sys.argv[2:]])
code = node.wait()
sys.exit(code if code > 0 else 0)
"""
# The per-node process starts a rank and exits with its code, a negative one included, as DeepSpeed's does.
NODE = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[2], *sys.argv[3:]])
sys.exit(rank.wait())
"""
# A rank that saves when a signal stops it, or when its parent has gone, and then exits as a stage does.
RANK = """
import os, signal, sys, time
from pathlib import Path
folder, parent, seen = Path(sys.argv[1]), os.getppid(), []
for number in (2, 10, 15):
    signal.signal(number, lambda number, _: seen.append(number))
(folder / "parent").write_text(str(parent))
(folder / "rank").write_text(str(os.getpid()))
while not seen and os.getppid() == parent:
    time.sleep(0.01)
(folder / "saved").touch()
sys.exit(128 + (seen or [15])[0])
"""


def supervisor(folder: Path, code: str = RANK) -> Supervisor:
    return Supervisor([sys.executable, "-c", OUTER, NODE, code, str(folder)], os.environ, str(folder))


def when_ready(folder: Path, act: str, number: int) -> None:
    """Signal this process, the rank or the per-node process once the rank is there."""

    def send() -> None:
        until = time.monotonic() + PATIENCE
        while not (folder / "rank").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(os.getpid() if act == "here" else int((folder / act).read_text()), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_a_signal_reaches_the_ranks_which_save(
    number: int, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    when_ready(tmp_path, "here", number)
    assert supervisor(tmp_path).run() == code
    assert (tmp_path / "saved").exists()
    assert ("Ctrl-C: the ranks finish their step" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    stubborn = RANK.replace("seen.append(number)", "(folder / 'asked').touch()")
    when_ready(tmp_path, "here", signal.SIGINT)

    def again() -> None:
        while not (tmp_path / "asked").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=again, daemon=True).start()
    assert supervisor(tmp_path, stubborn).run() == 130
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("who", ["rank", "parent"])
def test_a_process_is_killed(who: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The per-node launcher's death leaves DeepSpeed's outer one with code 0, and a rank, which saves."""
    when_ready(tmp_path, who, signal.SIGKILL)
    code = supervisor(tmp_path).run()
    if who == "rank":
        assert code == 75 and "error: a rank was ended by SIGKILL; if it was the OOM" in capfd.readouterr().err
    else:
        assert code == 0 and (tmp_path / "saved").exists()  # `Launch` finds no model/ and exits with 75


def test_a_rank_is_killed_under_deepspeeds_launcher(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where `Launch` starts it: it ends the other rank, and its code for the signal is known."""
    script = tmp_path / "rank.py"
    dying = "if os.environ['RANK'] == '1': os.kill(os.getpid(), 9)"
    script.write_text(f"import os, sys\nsys.argv[1:] = [{str(tmp_path)!r}]\n{dying}\n{RANK}")
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}", str(script)]
    assert Supervisor([sys.executable, *launcher], os.environ, str(tmp_path)).run() == 75
    assert (tmp_path / "saved").exists() and "error: a rank was ended by SIGKILL" in capfd.readouterr().err


def test_the_outer_launcher_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody is left when this returns."""
    outer = OUTER.replace("code = node.wait()", "import os; open('outer', 'w').write(str(os.getpid())); node.wait()")
    (tmp_path / "parent").touch()
    made = Supervisor([sys.executable, "-c", outer, NODE, RANK, str(tmp_path)], os.environ, str(tmp_path))
    when_ready(tmp_path, "outer", signal.SIGKILL)
    assert made.run() == 75
    assert (tmp_path / "saved").exists()
    assert "error: DeepSpeed's launcher was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize(("left", "code"), [("143", 143), ("0", 0), ("", 1), ("x", 1)])
def test_the_per_node_launcher_is_signaled(left: str, code: int, tmp_path: Path) -> None:
    """Its handler in DeepSpeed waits for the ranks, and exits with 1 whatever their codes are."""
    rank_0 = f"os.environ['RANK'] = '0'; note_exit_code('{left}')"
    script = f"import os, sys; from tinygptv_ds.processes import note_exit_code; {rank_0}; sys.exit(1)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert Supervisor([sys.executable, "-c", script], env, str(tmp_path)).run() == code


@pytest.mark.parametrize(
    ("leaves", "code"),
    [("sys.exit(0)", 0), ("sys.exit(1)", 1), ("sys.exit(2)", 2), ("sys.exit(75)", 75), ("sys.exit(255)", 75)],
)
def test_codes_of_the_ranks(leaves: str, code: int, tmp_path: Path) -> None:
    made = Supervisor([sys.executable, "-S", "-c", f"import sys; {leaves}"], os.environ, str(tmp_path))
    assert made.run() == code


@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130), (10, 138), (9, 75), (11, 75)])
def test_a_rank_that_a_signal_has_ended(number: int, code: int, tmp_path: Path) -> None:
    """DeepSpeed's launcher exits with 256 - N."""
    made = Supervisor([sys.executable, "-S", "-c", f"import sys; sys.exit({256 - number})"], os.environ, str(tmp_path))
    assert made.run() == code


def test_the_table_of_exit_codes() -> None:
    """The tests above have each code of the table in docs/train/resume.md; 1 and 2 are never followed by a restart."""
    text = (Path(__file__).parents[2] / "docs/train/resume.md").read_text()
    table = text[text.index("| exit code |") :].split("\n\n")[0]
    rows = {int(code): again for code, again in re.findall(r"^\| (\d+) \|.*\| *(\w*) *\|$", table, flags=re.M)}
    ends = ((test_a_signal_reaches_the_ranks_which_save, 1), (test_codes_of_the_ranks, 1))
    tested = {values[place] for test, place in ends for mark in test.pytestmark for values in mark.args[1]}
    assert rows.keys() == tested == {0, 1, 2, 75, 130, 138, 143}
    assert [code for code, again in rows.items() if again == "yes"] == [LOST]
