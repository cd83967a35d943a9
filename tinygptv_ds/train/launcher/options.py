"""The options of DeepSpeed's launcher, separated from a stage's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tinygptv_ds.errors import ConfigError

_VALUES = (
    *("--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--master_addr", "--master_port"),
    *("--node_rank", "--launcher", "--launcher_args", "--ssh_port", "--bind_core_list", "--log_level"),
    *("--enable_each_rank_log", "--venv_script"),
)
_FLAGS = (
    *("--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank", "--no_local_rank", "--save_pid"),
    "--quiet",
)
_SHORT = {"-H": "--hostfile", "-i": "--include", "-e": "--exclude", "-q": "--quiet"}
_OTHER_NAMES = {"--num_accelerators": "--num_gpus"}
_NUMBERS = ("--num_nodes", "--num_gpus", "--master_port", "--node_rank", "--ssh_port")
_REFUSED = {
    "--module": "a stage is a script",
    "--no_python": "a stage runs under Python",
    "--autotuning": "a stage has no code for DeepSpeed's autotuner; 'tinygptv-ds estimate' compares settings",
}


@dataclass
class LaunchOptions:
    """What a launch was given.

    Attributes:
        launcher: options of DeepSpeed's launcher under its own spelling; "" for a flag.
        stage: the words that remain: a stage's options.
        restarts: how often a run that has lost a rank is started again.
    """

    launcher: dict[str, str] = field(default_factory=dict)
    stage: list[str] = field(default_factory=list)
    restarts: int = 0

    def number(self, name: str, default: int) -> int:
        """Return a launcher's option as a number."""
        return int(self.launcher.get(name, default))

    def words(self) -> list[str]:
        """Return the launcher's part of a command line."""
        return [f"{name}={value}" if name in _VALUES else name for name, value in self.launcher.items()]


def parse_options(words: Sequence[str]) -> LaunchOptions:
    """Divide a command line.

    Args:
        words: options of the launcher, anywhere, with hyphens or underscores, and of the stage.

    Raises:
        ConfigError: a value is missing or no number, or the launcher's option makes no sense here.
    """
    found = LaunchOptions()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, "--" + name[2:].replace("-", "_") if name.startswith("--") else name)
        name = _OTHER_NAMES.get(name, name)
        if name in _REFUSED:
            raise ConfigError(f"{word}: {_REFUSED[name]}; leave it out")
        if name in _FLAGS:
            found.launcher[name] = ""
        elif name in _VALUES or name == "--restarts":
            if not equals:
                if not rest:
                    raise ConfigError(f"{word} needs a value")
                value = rest.pop(0)
            if name in (*_NUMBERS, "--restarts") and not (value.isascii() and value.isdigit() and len(value) < 10):
                raise ConfigError(f"{word.partition('=')[0]} must be a whole number, not {value!r}")
            if name == "--restarts":
                found.restarts = int(value)
            else:
                found.launcher[name] = value
        else:
            found.stage.append(word)
    _check(found)
    return found


def _check(found: LaunchOptions) -> None:
    given = found.launcher
    filters = [name for name in ("--include", "--exclude") if name in given]
    counts = [name for name in ("--num_nodes", "--num_gpus") if name in given]
    if filters and counts:
        raise ConfigError(f"{filters[0]} and {counts[0]} cannot be combined; give one of them")
    if "--no_ssh" in given and "--node_rank" not in given:
        raise ConfigError("--no_ssh starts this node's ranks only: give --node_rank N, 0 on the first node")
    port = found.number("--master_port", 29500)
    if not 0 < port < 65536:
        raise ConfigError(f"--master_port {port} is no port; give one from 1024 to 65535")
