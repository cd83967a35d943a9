"""A line to a host: `facts.py` started there over ssh, and asked."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinygptv_ds.doctor.host_probe import MARK, ROOT

CONNECT_SECONDS = 10
_ANSWER_SECONDS = 90.0  # a network file system that has to be woken takes its time
_MISSING = "there is no "


class HostFailed(Exception):
    """What went wrong with a host.

    Attributes:
        remedy: what to do about it.
    """

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


class Host:
    """A host that answers.

    Attributes:
        name: of the hostfile.
        slots: of the hostfile.
        addresses: its own, as `hostname -I` gives them; the launcher takes the first one of the first host.
    """

    def __init__(self, name: str, slots: int, ssh_port: int | None, env: Mapping[str, str]) -> None:
        """Connect.

        Raises:
            HostFailed: it cannot be reached, or lacks a path that is needed.
        """
        self.name, self.slots = name, slots
        self.addresses: list[str] = []
        port = [] if ssh_port is None else ["-p", str(ssh_port)]
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *port]
        try:
            self._ssh = subprocess.Popen(
                ["ssh", *options, name, _remote_command(env)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise HostFailed("ssh is not on PATH", "apt-get install openssh-client") from None
        try:
            self.addresses = self._answer(CONNECT_SECONDS + _ANSWER_SECONDS).split()
            self._answer(_ANSWER_SECONDS)
        except HostFailed:
            self.close()
            raise

    @property
    def address(self) -> str:
        """By which the other hosts reach it: what the launcher takes for that of the first host."""
        return self.addresses[0] if self.addresses else self.name

    def ask(self, question: str, seconds: float = _ANSWER_SECONDS, **given: Any) -> Any:
        """The answer of `QUESTIONS` of facts.py.

        Raises:
            HostFailed: none came.
        """
        with contextlib.suppress(BrokenPipeError):  # why, stderr tells
            self._ssh.stdin.write(f"{question} {json.dumps(given)}\n")
            self._ssh.stdin.flush()
        return self._answer(seconds)

    def clock_offset(self) -> tuple[float, float]:
        """Seconds that its clock is ahead of ours, and how far that may be off: half of the way there and back."""
        found = []
        for _ in range(5):
            began = time.time()
            theirs = self.ask("clock")
            ended = time.time()
            found.append(((ended - began) / 2, theirs - (began + ended) / 2))
        error, offset = min(found)
        return offset, error

    def close(self) -> None:
        """It ends with its stdin."""
        with contextlib.suppress(BrokenPipeError):
            self._ssh.stdin.close()
        try:
            self._ssh.wait(5)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()

    def _answer(self, seconds: float) -> Any:
        late = threading.Timer(seconds, self._ssh.kill)
        late.start()
        try:
            for line in self._ssh.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                if line.startswith(_MISSING):
                    raise HostFailed(line.strip(), _same_paths())
        finally:
            timed_out = not late.is_alive()
            late.cancel()
        said = [line for line in self._ssh.stderr.read().splitlines() if line.strip()]
        raise _failure(
            self.name, f"no answer within {seconds:.0f} s" if timed_out else said[-1] if said else "it hung up"
        )


def _remote_command(env: Mapping[str, str]) -> str:
    """What the login shell there runs: as the launcher's own, in this working directory and with this Python."""
    needed = [str(Path.cwd()), str(ROOT / "tinygptv_ds"), sys.executable]
    lines = [f"[ -e {shlex.quote(path)} ] || {{ echo {shlex.quote(_MISSING + path)}; exit 3; }}" for path in needed]
    lines.append(f"echo '{MARK}\"'$(hostname -I)'\"'")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**env, **_python_path(env)}.items()]
    lines.append(f"cd {shlex.quote(needed[0])} && exec {shlex.quote(sys.executable)} -m tinygptv_ds.doctor.host_probe")
    return f"sh -c {shlex.quote('; '.join(lines))}"


def _python_path(env: Mapping[str, str]) -> dict[str, str]:
    return {"PYTHONPATH": ":".join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))}


def _failure(host: str, said: str) -> HostFailed:
    return HostFailed(said, next(remedy.format(host=host) for pattern, remedy in _REMEDIES if re.search(pattern, said)))


_REMEDIES = (
    (r"Permission denied", "ssh-copy-id {host}: the launcher needs ssh without a password"),
    (r"Host key verification failed", "ssh {host} once by hand, and say yes to its key if it is the right one"),
    (r"resolve hostname", "name it by its address in the hostfile, or in ~/.ssh/config or /etc/hosts"),
    (r"refused", "is sshd running there, and on this port? --ssh-port N asks another"),
    (
        r"timed out|No route|unreachable|no answer",
        "is it up and on this network? If not, take its line out of the hostfile",
    ),
    (r"No module named", "install the same packages there: source launch/setup.sh requirements.txt"),
    (r"", "try by hand: ssh {host} true"),
)


def _same_paths() -> str:
    return f"the launcher uses the same paths on every host: {ROOT} with its .venv, and the working directory"


@contextlib.contextmanager
def closing(hosts: Mapping[str, Host]) -> Iterator[None]:
    """Hang up at the end."""
    try:
        yield
    finally:
        for host in hosts.values():
            host.close()
