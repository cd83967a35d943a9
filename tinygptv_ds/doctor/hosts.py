"""`doctor --hostfile`: whether the hosts of a hostfile can train together, and how fast they exchange gradients."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tinygptv_ds.config.hostfile import passed_on
from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.doctor import host_probe
from tinygptv_ds.doctor.check_result import CheckResult
from tinygptv_ds.doctor.exchange import measure_hosts
from tinygptv_ds.doctor.ssh import Host, HostFailed, closing

_CLOCK_SECONDS = 1.0  # with larger offsets the logs of two hosts cannot be merged
_FREE_GIB = 5  # a run's checkpoints and log
_FILES_SECONDS = 600.0  # for all shards of a recipe, on a slow file system


def check_hosts(
    slots: Mapping[str, int], packages: Sequence[str], recipe: Recipe | None, run_dir: Path, ssh_port: int | None
) -> Iterator[CheckResult]:
    """Yield all results in the order of the report; the same result on several hosts is one line.

    Args:
        slots: of each host, as in the hostfile.
        packages: names of packages whose versions must match.
        recipe: the recipe whose weights and shards each host must have; None: not checked.
        run_dir: folder for runs.
        ssh_port: None: from ssh's own configuration.

    Raises:
        ConfigError: a `.deepspeed_env` that the launcher cannot read.
    """
    env = passed_on()
    yield _pdsh()
    with ThreadPoolExecutor(len(slots)) as pool:

        def everywhere(do: Callable[[Any], Any], over: Iterable[Any]) -> list[Any]:
            """Call `do` for all hosts at once; a HostFailed takes the place of the result."""
            return list(pool.map(lambda each: _attempt(do, each), over))

        reached = everywhere(lambda item: Host(item[0], item[1], ssh_port, env), slots.items())
        hosts = {name: host for name, host in zip(slots, reached, strict=True) if isinstance(host, Host)}
        failed = {name: error for name, error in zip(slots, reached, strict=True) if isinstance(error, HostFailed)}
        with closing(hosts):
            yield from (CheckResult("ssh", f"{n}: {error}", error.remedy, blocks=True) for n, error in failed.items())
            if hosts:
                yield CheckResult(
                    "ssh", f"{_listed(list(hosts), slots)}: reached without a password, same paths as here"
                )
            check = _HostCheck(list(hosts.values()), packages, recipe, run_dir, env)
            found = everywhere(check.run, hosts.values())
            found = [
                [CheckResult("ssh", str(f), f.remedy, blocks=True)] if isinstance(f, HostFailed) else f for f in found
            ]
            by_host = dict(zip(hosts, found, strict=True))
            for name, seen in check.files.items():
                by_host[name] += files(seen, *next(iter(check.files.items())))
            merged = merge(by_host, slots)
            yield from merged
            if failed or any(result.blocks for result in merged):
                yield CheckResult("all-reduce", "not measured, because something above is missing")
            elif sum(slots.values()) > 1:
                yield from measure_hosts(
                    list(hosts.values()), check.ports[next(iter(hosts))], check.backend, check.interfaces
                )


def _pdsh() -> CheckResult:
    found = shutil.which("pdsh")
    if found is not None:
        return CheckResult("pdsh", found)
    remedy = "apt-get install pdsh, or start each host separately: --no_ssh --node_rank N, torchrun, or SLURM"
    return CheckResult("pdsh", "not on PATH; deepspeed --hostfile starts the hosts through it", remedy)


def _attempt(do: Callable[[Any], Any], on: Any) -> Any:
    try:
        return do(on)
    except HostFailed as error:
        return error


class _HostCheck:
    """The checks of one host, which may run for several at once.

    Attributes:
        backend: the communication backend of the ranks; known once all hosts have been checked.
        interfaces: by host, the network interface that leads to the others.
        ports: by host, a free port.
        files: by host, the recipe's weights and shards as found there.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        packages: Sequence[str],
        recipe: Recipe | None,
        run_dir: Path,
        env: Mapping[str, str],
    ) -> None:
        self._hosts, self._run_dir, self._env = hosts, run_dir, env
        self._packages = list(packages)
        self._here = host_probe.software(self._packages)
        self._recipe = None if recipe is None else recipe_dict(recipe)
        self._gpus: set[int] = set()
        self.interfaces: dict[str, str] = {}
        self.ports: dict[str, int] = {}
        self.files: dict[str, dict[str, str]] = {}

    @property
    def backend(self) -> str:
        return "nccl" if self._gpus and min(self._gpus) > 0 else "gloo"

    def run(self, host: Host) -> list[CheckResult]:
        """Check one host.

        Raises:
            HostFailed: it no longer answers.
        """
        machine = host.ask("machine", run_dir=str(self._run_dir))
        self._gpus.add(machine["gpus"])
        self.ports[host.name] = machine["free_port"]
        found = [
            self._software(host.ask("software", packages=self._packages)),
            _slots(host.slots, machine["gpus"], machine["cores"]),
            clock(*host.clock_offset()),
            self._disk(machine["free"]),
        ]
        if len(self._hosts) > 1:
            found.append(self._network(host, machine))
        if self._recipe is not None:
            self.files[host.name] = host.ask("files", _FILES_SECONDS, recipe=self._recipe)
        return found

    def _software(self, there: Mapping[str, str | None]) -> CheckResult:
        differing = [name for name, version in self._here.items() if there[name] != version]
        if not differing:
            others = len(self._here) - 2
            return CheckResult(
                "software", f"python {self._here['python']}, {others} packages and this repository as here"
            )
        text = ", ".join(f"{name} {there[name] or 'missing'} (here {self._here[name] or 'none'})" for name in differing)
        remedy = (
            "the same everywhere: one shared .venv, or source launch/setup.sh requirements.txt with the same wheels"
        )
        return CheckResult("software", text, remedy, blocks=True)

    def _disk(self, free: int) -> CheckResult:
        text = f"{free / 2**30:.0f} GiB free for {self._run_dir}"
        if free >= _FREE_GIB * 2**30:
            return CheckResult("disk", text)
        return CheckResult(
            "disk", text, "make room, or choose another --run-dir; rank 0, on the first host, writes there"
        )

    def _network(self, host: Host, machine: Mapping[str, Any]) -> CheckResult:
        first, second = self._hosts[0], self._hosts[1]
        other = second if host is first else first
        way = host.ask("route", to=other.address)
        if way["interface"] is None:
            why = way.get("why", f"no interface has the address {way.get('address')}")
            return CheckResult(
                "network", f"no way to {other.name}: {why}", "repair the route between the hosts", blocks=True
            )
        self.interfaces[host.name] = way["interface"]
        name = f"{'NCCL' if machine['gpus'] else 'GLOO'}_SOCKET_IFNAME"
        return network(way["interface"], way["interfaces"], name, self._env.get(name), machine["own_address"])


def _slots(slots: int, gpus: int, cores: int) -> CheckResult:
    if gpus == 0:
        return CheckResult("slots", f"{slots}, no GPU: ranks on {cores} CPU cores")
    if slots == gpus:
        return CheckResult("slots", f"{slots}, as many GPUs as torch sees")
    text = f"{slots}, but torch sees {gpus} GPU(s)"
    return CheckResult("slots", text, f"write slots={gpus} in the hostfile", blocks=slots > gpus)


def clock(offset: float, error: float) -> CheckResult:
    """Judge a host's clock, `offset` seconds ahead of this host's, measured to within `error` seconds."""
    if abs(offset) - error <= _CLOCK_SECONDS:
        return CheckResult("clock", f"within {max(0.1, round(abs(offset) + error + 0.05, 1))} s of this host's")
    text = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} this host's (to {error:.2f} s)"
    return CheckResult(
        "clock", text, "timedatectl set-ntp true, or chrony: otherwise logs of several hosts cannot be compared"
    )


def network(
    interface: str, interfaces: Mapping[str, str], name: str, given: str | None, own_address: str | None
) -> CheckResult:
    """Check that the ranks will use the interface that leads to the other hosts.

    Args:
        interface: the one that leads to the other hosts.
        interfaces: all interfaces of the host, with their addresses.
        name: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, depending on the backend.
        given: its value as the launcher passes it on, or None.
        own_address: the address of the host's own name there, which gloo uses by default.
    """
    remedy = f"in .deepspeed_env: {name}={interface}"
    others = [each for each in interfaces if each != "lo"]
    if given is not None:
        wanted = [part.lstrip("=") for part in given.lstrip("^").split(",")]
        taken = [each for each in interfaces if given.startswith("^") != any(each.startswith(part) for part in wanted)]
        if not taken:
            return CheckResult("network", f"{name}={given} names none of {', '.join(interfaces)}", remedy, blocks=True)
        if interface not in taken:
            return CheckResult("network", f"{name}={given}, while {interface} leads to the others", remedy)
        return CheckResult("network", f"{interface}, as {name}={given} requires")
    if name.startswith("GLOO") and own_address != interfaces[interface]:
        return CheckResult(
            "network", f"{interface}; gloo would take {own_address}, the address of its own name", remedy
        )
    if name.startswith("NCCL") and len(others) > 1:
        return CheckResult("network", f"{interface}; NCCL would choose among {', '.join(others)}", remedy)
    return CheckResult("network", f"{interface} leads to the others")


def files(there: Mapping[str, str], first: str, on_first: Mapping[str, str]) -> list[CheckResult]:
    """Compare a recipe's weights and shards on a host, `there`, with those on the `first` host."""
    found = []
    for name, seen in there.items():
        missing = seen.startswith("missing")
        if not missing and seen == on_first[name]:
            found.append(CheckResult("recipe", f"{name}: {seen}"))
            continue
        as_there = "" if there is on_first else f"; on {first}: {on_first[name]}"
        remedy = "the same files at the same path on every host, on a shared file system or copied"
        found.append(CheckResult("recipe", f"{name}: {seen}{as_there}", remedy, blocks=True))
    return found


def merge(found: Mapping[str, Sequence[CheckResult]], hosts: Iterable[str]) -> list[CheckResult]:
    """Merge equal results of several hosts into one line, in the order of their first occurrence."""
    of: dict[tuple, list[str]] = {}
    for host, results in found.items():
        for result in results:
            of.setdefault((result.name, result.text, result.remedy, result.blocks), []).append(host)
    order = list(Counter(name for name, *_ in of))
    lines = [
        CheckResult(name, f"{_listed(where, hosts)}: {text}", remedy, blocks)
        for (name, text, remedy, blocks), where in of.items()
    ]
    return sorted(lines, key=lambda result: order.index(result.name))


def _listed(where: Sequence[str], hosts: Iterable[str]) -> str:
    count = len(list(hosts))
    return f"all {count} hosts" if len(where) == count > 2 else ", ".join(where)
