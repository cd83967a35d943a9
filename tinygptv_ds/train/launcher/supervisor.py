"""One start of a stage under DeepSpeed's launcher: signals on their way to the ranks, and an exit code to rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tinygptv_ds.console import print_to_stderr
from tinygptv_ds.processes import EXIT_CODE_FILE, children_of, group_members, has_word, is_suspended
from tinygptv_ds.train.liveness.launchers import AS_SIGTERM, LOST, PER_NODE

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PATIENCE = 600.0  # seconds that ranks get to save after their launcher has ended
_SECONDS_TO_SUSPEND = 5.0  # for ranks; one in a long call of a library hears of a signal only after it
_POLL = 0.2


@dataclass(frozen=True)
class RemoteRanks:
    """Ranks that pdsh has started, found on every host by this job's own port and script.

    Attributes:
        hosts: their names.
        port: the master's port.
        script: the end of the stage script's path.
        ssh_port: of their sshd; None: the usual one.
        env: of the launch.
    """

    hosts: Sequence[str]
    port: int
    script: str
    ssh_port: str | None
    env: Mapping[str, str]

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to the ranks of every host; returns whether any of them got it."""
        launch = f"^[^ ]*python[^ ]* -u -m {PER_NODE} .*--master_port={self.port} .*{self.script}"
        name = number.name.removeprefix("SIG")
        remote = f"pkill -{name} -P \"$(pgrep -d, -f '{launch}')\" && echo passed"
        more = f" -oBatchMode=yes{f' -p {self.ssh_port}' if self.ssh_port else ''}"
        env = {**self.env, "PDSH_RCMD_TYPE": "ssh"}
        env["PDSH_SSH_ARGS_APPEND"] = env.get("PDSH_SSH_ARGS_APPEND", "") + more
        try:
            done = subprocess.run(
                ["pdsh", "-w", ",".join(self.hosts), remote], env=env, capture_output=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return b"passed" in done.stdout


class Supervisor:
    """Runs a command whose descendants are the ranks of a stage, in a process group of its own.

    Ctrl-C thus reaches this process alone, which passes it on to the ranks: they save and end. A second one ends all of
    them at once.

    Args:
        command: DeepSpeed's launcher with its options.
        env: its environment.
        folder: its working directory.
        remote: ranks on other hosts; None: there are none.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], folder: str, remote: RemoteRanks | None = None
    ) -> None:
        self._command, self._env, self._folder, self._remote = command, env, folder, remote
        self._process: subprocess.Popen[bytes]
        self._wanted: list[signal.Signals] = []
        self.stopped_by: signal.Signals | None = None

    def run(self) -> int:
        """Return the exit code of the ranks, in the terms of docs/train/resume.md."""
        noted = _empty_file()
        before = {number: signal.getsignal(number) for number in (*_STOPS, *AS_SIGTERM, signal.SIGTSTP)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # e.g. by nohup, or in the background of a script
                signal.signal(number, self._record)
        # Else a terminal with "stty tostop" would stop the ranks, which are not in its foreground, as they print.
        before[signal.SIGTTOU] = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            env = {**self._env, **({} if noted is None else {EXIT_CODE_FILE: str(noted)})}
            self._process = subprocess.Popen(
                self._command, env=env, cwd=self._folder, process_group=0, stdin=subprocess.DEVNULL
            )
            while self._process.poll() is None:
                self._pass_on()
                time.sleep(_POLL)
            code = self._end_all(self._process.returncode)
            return self._in_our_terms(_noted_code(noted) if code == 1 else code)
        finally:
            if noted is not None:
                noted.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._wanted.append(signal.Signals(number))

    def _pass_on(self) -> None:
        while self._wanted:
            number = self._wanted.pop(0)
            if number == signal.SIGTSTP:
                self._suspend()
            elif self.stopped_by == number == signal.SIGINT:
                self._kill()
            elif number in (*_STOPS, *AS_SIGTERM):
                number = signal.SIGTERM if number in AS_SIGTERM else number
                if number == signal.SIGINT:
                    print_to_stderr(
                        "Ctrl-C: the ranks finish their step, save and end; again to end them at once, unsaved"
                    )
                self.stopped_by = number
                if not self._signal_ranks(number):  # none yet: there is nothing to save
                    self._signal_group(signal.SIGTERM)

    def _signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to the ranks, wherever they are; return whether any of them got it."""
        started = children_of(self._process.pid)
        if self._remote is not None and any(has_word(child, "pdsh") for child in started):
            return self._remote.signal(number)
        return sum(_send(rank, number) for rank in self._ranks_here()) > 0

    def _ranks_here(self) -> list[int]:
        per_node = [child for child in children_of(self._process.pid) if has_word(child, PER_NODE)]
        return [rank for child in per_node for rank in children_of(child)]

    def _suspend(self) -> None:
        """Suspend all of the run, ranks first: they disarm what would take the time as one without a sign of life."""
        ranks = self._ranks_here()
        for rank in ranks:
            _send(rank, signal.SIGTSTP)
        until = time.monotonic() + _SECONDS_TO_SUSPEND
        while not all(map(is_suspended, ranks)) and time.monotonic() < until:
            time.sleep(_POLL)
        self._signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_group(signal.SIGCONT)

    def _kill(self) -> None:
        if self._remote is not None:
            self._remote.signal(signal.SIGKILL)
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _end_all(self, code: int) -> int:
        """Return the launcher's code once nothing of the run is left on this host."""
        if group_members(self._process.pid):
            if code < 0 and self.stopped_by is None:
                print_to_stderr(
                    f"DeepSpeed's launcher was ended by {signal.Signals(-code).name}; waiting for the ranks to save"
                )
            if self._remote is None or not self._remote.signal(signal.SIGTERM):
                self._signal_group(signal.SIGTERM)
            until = time.monotonic() + _PATIENCE
            while group_members(self._process.pid) and time.monotonic() < until:
                self._pass_on()
                time.sleep(_POLL)
            self._kill()
        return code

    def _in_our_terms(self, code: int) -> int:
        number = _signal_of(code)
        if self.stopped_by is not None and code != 0:
            known = (2, *(128 + each for each in _STOPS))
            return code if code in known else 128 + self.stopped_by
        if number is None:
            return LOST if code == 255 else code  # ssh's own code: a host was lost
        if number in _STOPS and code > 0:  # a rank was stopped before it could save
            return 128 + number
        who = "a rank" if code > 0 else "DeepSpeed's launcher"
        print_to_stderr(f"error: {who} was ended by {number.name}{_OOM if number == signal.SIGKILL else ''}")
        return LOST


_OOM = "; if it was the OOM killer, the kernel log (dmesg) says so"


def _empty_file() -> Path | None:
    """Return a new file for the exit code of rank 0; None where there is no folder for it."""
    try:
        handle, name = tempfile.mkstemp(prefix="exit-code-")
    except OSError:
        return None
    os.close(handle)
    return Path(name)


def _noted_code(file: Path | None) -> int:
    """Return the code that rank 0 has left where its launcher exits with 1; 1 where it has left none."""
    try:
        return int(file.read_text()) if file is not None else 1
    except (OSError, ValueError):
        return 1


def _signal_of(code: int) -> signal.Signals | None:
    """Return the signal that ended a process: -N as Python has it, or 256 - N as DeepSpeed's launcher exits with it."""
    number = -code if code < 0 else 256 - code
    try:
        return signal.Signals(number) if code < 0 or 192 <= code < 255 else None
    except ValueError:
        return None


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
