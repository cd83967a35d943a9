"""What a launch finds on this machine: GPUs by their names, free ports, hosts that answer."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from tinygptv_ds.distributed import free_port
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import QUIET
from tinygptv_ds.train.launcher.options import LaunchOptions
from tinygptv_ds.train.setup.job import has_gpu
from tinygptv_ds.train.setup.machine import SAFE_PATH, port_is_taken, port_message

_SSH_SECONDS = 10
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "CROSS_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_LOCAL_RANK"),  # DeepSpeed compares the last one with its own
)


def name_gpus(options: LaunchOptions, env: dict[str, str]) -> dict[str, str]:
    """Prepare `CUDA_VISIBLE_DEVICES` for DeepSpeed's launcher: it knows numbers only, and forgets them for --num_gpus.

    Args:
        options: get `--num_gpus`, as many as GPUs are named.
        env: the launcher's environment; is changed.

    Returns:
        Variables for the ranks, which see the GPUs as they were given.

    Raises:
        ConfigError: a word that names no GPU, or one twice, or several MIG instances, between which NCCL does not
            communicate.
    """
    given = env.get("CUDA_VISIBLE_DEVICES")
    if given is None or "--hostfile" in options.launcher:
        return {}
    names = [name.strip() for name in given.split(",")]
    names = list(itertools.takewhile(lambda name: not name.startswith("-"), names))  # as CUDA reads it
    are_numbers = all(re.fullmatch(r"[0-9]{1,4}", name) for name in names)
    if names in ([], [""], ["NoDevFiles"]) or (are_numbers and not has_gpu()):
        del env["CUDA_VISIBLE_DEVICES"]
        env["DS_ACCELERATOR"] = "cpu"
        return {}
    _check_names(given, names)
    if are_numbers and options.launcher.keys() & {"--include", "--exclude"}:
        return {}  # DeepSpeed's launcher counts all GPUs then
    migs = [name for name in names if name.startswith("MIG-")]
    if len(migs) > 1 or (migs and len(names) > 1):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES names {len(names)} devices, among them MIG instances, between which NCCL does not "
            "communicate; name one MIG instance or whole GPUs"
        )
    if options.launcher.keys() & {"--include", "--exclude"}:
        raise ConfigError("CUDA_VISIBLE_DEVICES names GPUs by UUID: leave out --include and --exclude, or unset it")
    wanted = options.number("--num_gpus", len(names))
    if wanted > len(names):
        raise ConfigError(f"--num_gpus {wanted}, but CUDA_VISIBLE_DEVICES names {len(names)} GPU(s)")
    options.launcher["--num_gpus"] = str(wanted)
    del env["CUDA_VISIBLE_DEVICES"]
    return {"CUDA_VISIBLE_DEVICES": given}


def _check_names(given: str, names: Sequence[str]) -> None:
    for name in names:
        if re.fullmatch(r"[0-9]{1,4}|(GPU|MIG)-[\w/-]+", name, re.ASCII) is None:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES is {given[:100]!r}, in which {name[:100]!r} names no GPU; give numbers or UUIDs "
                "(nvidia-smi -L) with commas between them, e.g. 0,1, or unset it for all GPUs"
            )
        if names.count(name) > 1:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES is {given[:100]!r}, in which {name} is named twice; name it once")


def choose_port(options: LaunchOptions) -> None:
    """Set `--master_port` for a launch on this node alone: a free one, unless one was asked for.

    Not the usual one where that is free: ranks listen only once torch is imported, so a second launch in the meantime
    would find it free, too.

    Raises:
        ConfigError: the port that was asked for is taken.
    """
    if "--master_port" not in options.launcher:
        options.launcher["--master_port"] = str(free_port())
    elif port_is_taken(port := options.number("--master_port", 29500)):
        raise ConfigError(port_message(port))


def hosts_that_answer(hosts: Iterable[str], ssh_port: str | None) -> list[str]:
    """Return those of the hosts that ssh reaches, asked all at once."""
    command = ["ssh", "-oBatchMode=yes", f"-oConnectTimeout={_SSH_SECONDS}", *(["-p", ssh_port] if ssh_port else [])]
    asked = {
        host: subprocess.Popen(
            [*command, host, "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for host in hosts
    }
    return [host for host, process in asked.items() if _ends_well(process)]


def _ends_well(process: subprocess.Popen[bytes]) -> bool:
    try:
        return process.wait(3 * _SSH_SECONDS) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def check_for_shell(values: Mapping[str, str], allowed: str) -> None:
    """Check what pdsh passes through a shell without quoting it.

    Raises:
        ConfigError: a value holds a character that is not `allowed` (a character class of regular expressions).
    """
    for name, value in values.items():
        odd = sorted(set(re.sub(allowed, "", value)))
        if odd:
            raise ConfigError(
                f"{name} ({value}) holds {' '.join(map(repr, odd))}, which the shell of the other nodes would change: "
                "move or rename it, or start each node by itself with --no_ssh --node_rank N"
            )


def launch_environment() -> dict[str, str]:
    """Return the environment for DeepSpeed's launcher, and remove the ranks of another launcher from this process's.

    Kubernetes' training operators set them in every pod; the ranks of this launch get their own.
    """
    for name in _OF_RANKS:
        os.environ.pop(name, None)
    env = dict(os.environ)
    # If a node dies silently, ssh, and with it the launcher, would otherwise wait for it for a quarter of an hour.
    alive = "-oServerAliveInterval=15 -oServerAliveCountMax=4"
    env["PDSH_SSH_ARGS_APPEND"] = f"{alive} {env.get('PDSH_SSH_ARGS_APPEND', '')}"
    env.setdefault("PYTHONWARNINGS", QUIET)
    # It is started with "python -m", which would import a random.py or yaml.py of the working directory.
    env.setdefault("PYTHONSAFEPATH", SAFE_PATH)
    return env
