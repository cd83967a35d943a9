"""The files that DeepSpeed's launcher reads: the hostfile, and the environment to pass on to the ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tinygptv_ds.config.paths import expand_user
from tinygptv_ds.errors import ConfigError, shown
from tinygptv_ds.files import read_text

_LONGEST = 10_000_000  # bytes, of 100,000 hosts and more
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})(\s+max_slots=[0-9]+)?(\s+#.*)?")
# What pdsh and ssh take for one host: no option, list or range ("node[1-4]"), and nothing that a shell changes.
_HOST = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]{0,252}", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host, in the order of the file; rank 0 runs on the first.

    Raises:
        ConfigError: there is no such file, it names no host or names one twice, or a line is malformed.
    """
    try:
        lines = read_text(path, _LONGEST).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"hostfile {path} cannot be read: {reason}; launch/hostfile.example shows one") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or int(found[2]) == 0:
            raise ConfigError(
                f"hostfile {path}, line {number}: {shown(line)} is not NAME slots=NUMBER, as in 'node1 slots=8'"
            )
        if _HOST.fullmatch(found[1]) is None:
            raise ConfigError(
                f"hostfile {path}, line {number}: {shown(found[1])} is no name of one host; give each host a line "
                "of its own, an IPv6 address a name in /etc/hosts, and a port by --ssh_port"
            )
        if found[1] in slots:
            raise ConfigError(
                f"hostfile {path}, line {number}: {found[1]} is named twice; give it one line with all slots"
            )
        slots[found[1]] = int(found[2])
    if not slots:
        raise ConfigError(f"hostfile {path} names no host; write one a line, as in 'node1 slots=8'")
    return slots


def passed_on() -> dict[str, str]:
    """Return the environment that DeepSpeed's launcher passes on to the ranks of other hosts.

    Raises:
        ConfigError: a line of `.deepspeed_env` that the launcher cannot read.
    """
    # The prefixes that DeepSpeed 0.19's runner.py exports; NCCL on GPUs only.
    names = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
    found = {name: value for name, value in os.environ.items() if name.startswith(names)}
    for folder in (expand_user("~"), Path()):
        file = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if file.is_file():
            found |= _key_values(file)
    return found


def _key_values(file: Path) -> dict[str, str]:
    found = {}
    try:
        lines = read_text(file, _LONGEST).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{file}, which DeepSpeed's launcher reads, cannot be read: {reason}") from None
    for number, line in enumerate(lines, 1):
        key, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"\w+", key.strip()):
            raise ConfigError(
                f"{file}, line {number}: {line!r} is not KEY=value; DeepSpeed's launcher accepts no other line "
                "there, not even an empty one or a comment"
            )
        found[key.strip()] = value.strip()
    return found
