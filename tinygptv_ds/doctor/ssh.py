"""A connection to a host: `host_probe` runs there over ssh and answers requests."""

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

from tinygptv_ds.doctor.host_probe import MARK, PACKAGE

CONNECT_SECONDS = 10
_ANSWER_SECONDS = 90.0  # an idle network file system can take this long to answer
_MISSING = "there is no "


class HostFailed(Exception):
    """A host that cannot be reached or does not answer.

    Attributes:
        remedy: what to do about it.
    """

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


class Host:
    """A connection to a host of the hostfile.

    Attributes:
        name: as in the hostfile.
        slots: as in the hostfile.
        addresses: its own, from `hostname -I`; the launcher uses the first address of the first host.
    """

    def __init__(self, name: str, slots: int, ssh_port: int | None, env: Mapping[str, str]) -> None:
        """Connect.

        Raises:
            HostFailed: it cannot be reached, or a needed path is missing there.
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
        # Popen has no type that says its pipes are there.
        assert self._ssh.stdin and self._ssh.stdout and self._ssh.stderr
        self._stdin, self._stdout, self._stderr = self._ssh.stdin, self._ssh.stdout, self._ssh.stderr
        try:
            self.addresses = self._answer(CONNECT_SECONDS + _ANSWER_SECONDS).split()
            self._answer(_ANSWER_SECONDS)
        except HostFailed:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The address by which other hosts reach it, chosen as the launcher does for the first host."""
        return self.addresses[0] if self.addresses else self.name

    def ask(self, request: str, seconds: float = _ANSWER_SECONDS, **given: Any) -> Any:
        """Send one of `host_probe.REQUESTS` and return the answer.

        Raises:
            HostFailed: no answer came.
        """
        with contextlib.suppress(BrokenPipeError):  # stderr has the reason
            self._stdin.write(f"{request} {json.dumps(given)}\n")
            self._stdin.flush()
        return self._answer(seconds)

    def clock_offset(self) -> tuple[float, float]:
        """Return the seconds that its clock is ahead of ours, and the error: half of the round trip."""
        found = []
        for _ in range(5):
            began = time.time()
            theirs = self.ask("clock")
            ended = time.time()
            found.append(((ended - began) / 2, theirs - (began + ended) / 2))
        error, offset = min(found)
        return offset, error

    def close(self) -> None:
        """Close the connection; the program there ends with its stdin."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._ssh.wait(5)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()

    def _answer(self, seconds: float) -> Any:
        late = threading.Timer(seconds, self._ssh.kill)
        late.start()
        try:
            for line in self._stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                if line.startswith(_MISSING):
                    raise HostFailed(line.strip(), _same_paths())
        finally:
            timed_out = not late.is_alive()
            late.cancel()
        lines = [line for line in self._stderr.read().splitlines() if line.strip()]
        raise _failure(
            self.name, f"no answer within {seconds:.0f} s" if timed_out else lines[-1] if lines else "it hung up"
        )


def _remote_command(env: Mapping[str, str]) -> str:
    """Return the command for the login shell there: in this working directory and with this Python."""
    needed = [str(Path.cwd()), str(PACKAGE), sys.executable]
    lines = [f"[ -e {shlex.quote(path)} ] || {{ echo {shlex.quote(_MISSING + path)}; exit 3; }}" for path in needed]
    lines.append(f"echo '{MARK}\"'$(hostname -I)'\"'")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**env, **_python_path(env)}.items()]
    lines.append(f"cd {shlex.quote(needed[0])} && exec {shlex.quote(sys.executable)} -m tinygptv_ds.doctor.host_probe")
    return f"sh -c {shlex.quote('; '.join(lines))}"


def _python_path(env: Mapping[str, str]) -> dict[str, str]:
    return {"PYTHONPATH": ":".join(filter(None, [str(PACKAGE.parent), env.get("PYTHONPATH")]))}


def _failure(host: str, reason: str) -> HostFailed:
    remedy = next(remedy for pattern, remedy in _REMEDIES if re.search(pattern, reason))
    return HostFailed(reason, remedy.format(host=host))


_REMEDIES = (
    (r"Permission denied", "ssh-copy-id {host}: the launcher needs ssh without a password"),
    (r"Host key verification failed", "ssh {host} once by hand, and accept its key if it is the right one"),
    (r"resolve hostname", "name it by its address in the hostfile, or in ~/.ssh/config or /etc/hosts"),
    (r"refused", "is sshd running there, and on this port? --ssh-port N chooses another"),
    (
        r"timed out|No route|unreachable|no answer",
        "is it up and on this network? If not, remove its line from the hostfile",
    ),
    (r"No module named", "install the same packages there: source launch/setup.sh requirements.txt"),
    (r"", "try by hand: ssh {host} true"),
)


def _same_paths() -> str:
    return f"the launcher uses the same paths on every host: {PACKAGE.parent} with its .venv, and the working directory"


@contextlib.contextmanager
def closing(hosts: Mapping[str, Host]) -> Iterator[None]:
    """Close the connections at the end of the block."""
    try:
        yield
    finally:
        for host in hosts.values():
            host.close()
