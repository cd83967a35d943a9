"""Two hosts on this machine: network namespaces joined by a cable, an sshd in each, and names of their own.

Nothing outside the given folder and the namespaces is changed: keys and configurations are in the folder, an `ssh` that
reads them comes first on PATH, and sshd sees a /run and a hostname of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.patience import PATIENCE

ROOT = Path(__file__).parents[2]
NAMES = ("node1", "node2")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        name: by which ssh reaches it.
        address: on the cable.
        namespace: its network namespace.
        sshd: the process id of its sshd.
    """

    name: str
    address: str
    namespace: str
    sshd: int

    def pids(self) -> list[int]:
        """Everything that runs on it."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def strays(self, patience: float = 60.0) -> list[str]:
        """The command lines of what runs on it next to sshd, after a moment."""
        until = time.monotonic() + patience
        while (left := self._other_than_sshd()) and time.monotonic() < until:
            time.sleep(0.1)
        return left

    def _other_than_sshd(self) -> list[str]:
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if line and "sshd" not in line.split()[0]:
                    found.append(line)
        return found

    def crash(self) -> None:
        """All its processes are gone at once, sshd too."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut_off(self) -> None:
        """Its cable is pulled out."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")


@dataclass(frozen=True)
class TwoHosts:
    """The hosts, and the folder of their hostfile, `.deepspeed_env` and keys, which commands are started in."""

    hosts: tuple[Host, Host]
    folder: Path

    @property
    def hostfile(self) -> Path:
        """One slot on each."""
        return self.folder / "hostfile"

    def start(self, command: Sequence[str], on: int = 0, **env: str) -> subprocess.Popen[str]:
        """A command on a host; its stdout and stderr come together through a pipe."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            ["ip", "netns", "exec", self.hosts[on].namespace, *command],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: Sequence[str], on: int = 0, timeout: float = PATIENCE) -> tuple[int, str]:
        """A command on a host, to its end; exit code and output."""
        return finish(self.start(command, on), timeout)


def finish(process: subprocess.Popen[str], timeout: float = PATIENCE) -> tuple[int, str]:
    """Exit code and output of a command; one that does not end in time is killed, which is an error."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{process.args} did not end in {timeout:.0f} s:\n{output}") from None
    return process.returncode, output


def why_not() -> str | None:
    """What is missing here for two hosts; None if nothing is."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [
        name
        for name in ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
        if shutil.which(name, path=_path()) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    trial = f"tgv-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces are not allowed: {made.stderr.strip()}"
    _ip("netns", "del", trial)
    return None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Make them; at the end, whatever the reason, all that runs on them is killed and they are removed."""
    spaces = [f"tgv-{uuid.uuid4().hex[:8]}" for _ in NAMES]
    sshds: list[subprocess.Popen] = []
    try:
        for space in spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", spaces[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        for space, address in zip(spaces, _ADDRESSES, strict=True):
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
        _write_files(folder)
        sshds += [_start_sshd(folder, *where) for where in zip(NAMES, spaces, _ADDRESSES, strict=True)]
        first, second = (
            Host(name, address, space, sshd.pid)
            for name, address, space, sshd in zip(NAMES, _ADDRESSES, spaces, sshds, strict=True)
        )
        two = TwoHosts((first, second), folder)
        _wait_for_ssh(two)
        yield two
    finally:
        for space in spaces:
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        for sshd in sshds:
            sshd.wait()


def _write_files(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
    )
    known = "".join(f"Host {n}\n  HostName {a}\n" for n, a in zip(NAMES, _ADDRESSES, strict=True))
    (folder / "ssh_config").write_text(
        f"{known}Host *\n  IdentityFile {folder}/user_key\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  LogLevel ERROR\n"
        "  ServerAliveInterval 1\n  ServerAliveCountMax 3\n"
    )
    ssh = folder / "bin/ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    passed_on = {
        "GLOO_SOCKET_IFNAME": "eth0",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": 1,
    }
    (folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in passed_on.items()))


def _start_sshd(folder: Path, name: str, space: str, address: str) -> subprocess.Popen:
    own = f'mount -t tmpfs none /run && mkdir /run/sshd && hostname {name} && exec "$@"'
    sshd = [shutil.which("sshd", path=_path()), "-D", "-f", f"{folder}/sshd_config", "-o", f"ListenAddress={address}"]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", own, "sh", *sshd], stdout=log, stderr=log
        )


def _wait_for_ssh(two: TwoHosts) -> None:
    until = time.monotonic() + PATIENCE
    for name in NAMES:
        while True:
            code, output = two.run(["ssh", "-o", "BatchMode=yes", name, "true"], timeout=10)
            if code == 0:
                break
            log = (two.folder / f"{name}.log").read_text()
            assert time.monotonic() < until, f"ssh {name} does not work: {output}\n{log}"
            time.sleep(0.1)


def _path() -> str:
    """Where sshd and ip are is not on everyone's PATH."""
    return os.pathsep.join([os.environ["PATH"], "/sbin", os.path.join("/", "usr", "sbin")])  # noqa: PTH118


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
