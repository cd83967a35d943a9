"""What a stage checks of the machine before anything is loaded: the user, GPUs, the port and the run directory."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import socket
import stat
import sys
import tempfile
from pathlib import Path

from tinygptv_ds.distributed import free_port
from tinygptv_ds.errors import ConfigError, shown
from tinygptv_ds.train.checkpoint.folders import FOLDER as CHECKPOINTS

SAFE_PATH = "for the launcher"  # value of $PYTHONSAFEPATH, which Python only asks to be not empty
_FOLDERS = (CHECKPOINTS, "model", "best", "tensorboard", "stacks", "skipped", "deepspeed")  # of a run directory
_FILES = (".json", ".jsonl", ".yaml", ".txt")
_OPEN_FILES, _FEWEST_OPEN_FILES = 65_536, 64
_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # Intel and AMD, Intel, ARM


def complete_user() -> None:
    """Give a user without home directory or name, as containers have them, those of its number.

    torch and DeepSpeed ask for both.
    """
    try:
        known = pwd.getpwuid(os.getuid())
    except KeyError:
        known = None
    if known is None:
        os.environ.setdefault("USER", f"user-{os.getuid()}")
        home = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
        if "HOME" not in os.environ:
            home.mkdir(mode=0o700, exist_ok=True)
            os.environ["HOME"] = str(home)


def check_accelerator() -> None:
    """Check what the user has DeepSpeed run on.

    Raises:
        ConfigError: nothing that this trainer runs on.
    """
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted not in (None, "cpu", "cuda"):
        raise ConfigError(f"DS_ACCELERATOR is {shown(wanted)}; unset it, or set it to cpu or cuda (also of ROCm)")


def check_interface() -> None:
    """Check that this host has the network interfaces that the ranks are to meet through.

    Raises:
        ConfigError: it has not; the message lists what there is.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()]
    missing = [name for name in wanted.split(",") if name and name not in there]
    if missing:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME names {', '.join(missing)[:100]}, which {socket.gethostname()} has not; it has "
            f"{', '.join(there)}. Correct it, in .deepspeed_env too, or unset it"
        )


def leave_safe_path() -> None:
    """Undo what was set for the launcher's sake, before this process starts others, e.g. pipe: commands."""
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:
        del os.environ["PYTHONSAFEPATH"]


def raise_open_files() -> None:
    """Allow this process as many open files as the system lets it have; ranks, workers and shards all need some.

    Raises:
        ConfigError: those are too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _FEWEST_OPEN_FILES:
        raise ConfigError(
            f"this process may open {wanted} files, and training needs at least {_FEWEST_OPEN_FILES}: raise the limit "
            "(ulimit -n 4096), or ask the administrator to"
        )


def gpus_are_hidden() -> bool:
    """Return whether the environment keeps this process from using a GPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return True
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (not visible.strip() or visible.strip().startswith(("-", "NoDevFiles")))


def computes_in_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU multiplies matrices in bf16; others emulate it, which is slower than fp32.

    True where the file does not say what the CPU has.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    listed = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return not listed or bool(listed[0] & _BF16_INSTRUCTIONS)


def check_writable(run_dir: Path) -> None:
    """Check that a run directory, or the nearest folder above it that exists, can be written to.

    Raises:
        ConfigError: it cannot; the message names the folder that is in the way.
    """
    there = run_dir.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
        Path(tempfile.mkdtemp(prefix=".writable-", dir=there)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"--run-dir {run_dir} cannot be used: {there}: {error.strerror}; choose another --run-dir"
        ) from None


def check_kinds(run_dir: Path) -> None:
    """Check that a run directory holds files and folders where a run has them, and nothing else.

    A pipe would keep anyone who opens it waiting, and a file in the place of `checkpoints/` would cost all steps until
    two have failed.

    Raises:
        ConfigError: the message names what is in the way.
    """
    inner = (path for path in run_dir.glob("*/*") if path.parent.name != CHECKPOINTS)
    for path in (*run_dir.glob("*"), *inner):
        problem = _wrong_kind(path, is_top=path.parent == run_dir)
        if problem is not None:
            raise ConfigError(f"{path} {problem}; remove it, or choose another --run-dir")


def _wrong_kind(path: Path, *, is_top: bool) -> str | None:
    if path.suffix in (".partial", ".old"):  # interrupted, and removed when it is written again
        return None
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # a link to nothing
        return None
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "is a pipe or a device"
    if is_top and path.name in _FOLDERS and not stat.S_ISDIR(mode):
        return "is no folder"
    if is_top and path.suffix in _FILES and stat.S_ISDIR(mode):
        return "is a folder"
    return None


def check_port() -> None:
    """Check that rank 0 of a launch can listen where the ranks meet.

    Raises:
        ConfigError: another program does.
    """
    torch = sys.modules.get("torch")  # never imported for this; where the ranks have met already, the port is their own
    if torch is not None and torch.distributed.is_initialized():
        return
    port = os.environ.get("MASTER_PORT", "")
    if port.isdigit() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and port_is_taken(int(port)):
        raise ConfigError(port_message(int(port)))


def port_is_taken(port: int) -> bool:
    """Return whether another program listens on a port of this machine."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier run do not count
        try:
            ours.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def port_message(port: int) -> str:
    """Return the message about a port that is taken."""
    return (
        f"port {port} is taken on {socket.gethostname()}, perhaps by another run: give the launcher "
        f"--master_port {free_port()}"
    )
