"""`doctor --hostfile`: are the hosts of a hostfile fit to train together, and how fast do they exchange gradients."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.doctor import host_probe as facts
from tinygptv_ds.doctor.check_result import Finding
from tinygptv_ds.doctor.exchange import exchange_findings
from tinygptv_ds.doctor.hostfile import passed_on
from tinygptv_ds.doctor.ssh import Host, HostFailed, closing

_CLOCK_SECONDS = 1.0  # apart, and the logs of two hosts can no longer be read together
_FREE_GIB = 5  # a run's checkpoints and log
_LOOK_SECONDS = 600.0  # at all shards of a recipe, on a slow file system


def diagnose_hosts(
    slots: Mapping[str, int], packages: Sequence[str], recipe: Recipe | None, run_dir: Path, ssh_port: int | None
) -> Iterator[Finding]:
    """Everything that is looked at, in the order of the report. What is the same on several hosts is one line.

    Args:
        slots: of each host, as in the hostfile.
        packages: whose versions have to be the same.
        recipe: whose weights and shards each host has to see; None: not looked at.
        run_dir: where runs go.
        ssh_port: other than that of ssh's own configuration.

    Raises:
        ConfigError: a `.deepspeed_env` that the launcher cannot read.
    """
    env = passed_on()
    yield _pdsh()
    with ThreadPoolExecutor(len(slots)) as pool:

        def everywhere(do: Callable[[Any], Any], over: Iterable[Any]) -> list[Any]:
            """On all hosts at once; what went wrong comes in place of the result."""
            return list(pool.map(lambda each: _attempt(do, each), over))

        reached = everywhere(lambda item: Host(*item, ssh_port, env), slots.items())
        hosts = {name: host for name, host in zip(slots, reached, strict=True) if isinstance(host, Host)}
        failed = {name: error for name, error in zip(slots, reached, strict=True) if isinstance(error, HostFailed)}
        with closing(hosts):
            yield from (Finding("ssh", f"{n}: {error}", error.remedy, blocks=True) for n, error in failed.items())
            if hosts:
                yield Finding("ssh", f"{_listed(list(hosts), slots)}: reached without a password, same paths as here")
            look = _Look(list(hosts.values()), packages, recipe, run_dir, env)
            found = everywhere(look.at, hosts.values())
            found = [[Finding("ssh", str(f), f.remedy, blocks=True)] if isinstance(f, HostFailed) else f for f in found]
            by_host = dict(zip(hosts, found, strict=True))
            for name, seen in look.files.items():
                by_host[name] += files(seen, *next(iter(look.files.items())))
            merged = merge(by_host, slots)
            yield from merged
            if failed or any(finding.blocks for finding in merged):
                yield Finding("all-reduce", "not measured before what is missing above is there")
            elif sum(slots.values()) > 1:
                yield from exchange_findings(
                    list(hosts.values()), look.ports[next(iter(hosts))], look.backend, look.interfaces
                )


def _pdsh() -> Finding:
    found = shutil.which("pdsh")
    if found is not None:
        return Finding("pdsh", found)
    remedy = "apt-get install pdsh, or start each host by itself: --no_ssh --node_rank N, torchrun, or SLURM"
    return Finding("pdsh", "not on PATH; deepspeed --hostfile starts the hosts through it", remedy)


def _attempt(do: Callable[[Any], Any], on: Any) -> Any:
    try:
        return do(on)
    except HostFailed as error:
        return error


class _Look:
    """At one host after the other, or at several at once.

    Attributes:
        backend: what the ranks will talk through; known once all hosts have been looked at.
        interfaces: by host, through which it reaches the others.
        ports: by host, one that is free.
        files: by host, what it sees of the recipe's weights and shards.
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
        self._here = facts.software(self._packages)
        self._recipe = None if recipe is None else recipe_dict(recipe)
        self._gpus: set[int] = set()
        self.interfaces: dict[str, str] = {}
        self.ports: dict[str, int] = {}
        self.files: dict[str, dict[str, str]] = {}

    @property
    def backend(self) -> str:
        return "nccl" if self._gpus and min(self._gpus) > 0 else "gloo"

    def at(self, host: Host) -> list[Finding]:
        """What is found on it.

        Raises:
            HostFailed: it does not answer any more.
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
            self.files[host.name] = host.ask("files", _LOOK_SECONDS, recipe=self._recipe)
        return found

    def _software(self, there: Mapping[str, str | None]) -> Finding:
        differing = [name for name, version in self._here.items() if there[name] != version]
        if not differing:
            others = len(self._here) - 2
            return Finding("software", f"python {self._here['python']}, {others} packages and this repository as here")
        text = ", ".join(f"{name} {there[name] or 'missing'} (here {self._here[name] or 'none'})" for name in differing)
        remedy = (
            "the same everywhere: one shared .venv, or source launch/setup.sh requirements.txt with the same wheels"
        )
        return Finding("software", text, remedy, blocks=True)

    def _disk(self, free: int) -> Finding:
        text = f"{free / 2**30:.0f} GiB free for {self._run_dir}"
        if free >= _FREE_GIB * 2**30:
            return Finding("disk", text)
        return Finding("disk", text, "make room, or choose another --run-dir; rank 0, on the first host, writes there")

    def _network(self, host: Host, machine: Mapping[str, Any]) -> Finding:
        first, second = self._hosts[0], self._hosts[1]
        other = second if host is first else first
        way = host.ask("route", to=other.address)
        if way["interface"] is None:
            why = way.get("why", f"no interface has the address {way.get('address')}")
            return Finding("network", f"no way to {other.name}: {why}", "mend the route between the hosts", blocks=True)
        self.interfaces[host.name] = way["interface"]
        name = f"{'NCCL' if machine['gpus'] else 'GLOO'}_SOCKET_IFNAME"
        return network(way["interface"], way["interfaces"], name, self._env.get(name), machine["own_address"])


def _slots(slots: int, gpus: int, cores: int) -> Finding:
    if gpus == 0:
        return Finding("slots", f"{slots}, no GPU: ranks on {cores} CPU cores")
    if slots == gpus:
        return Finding("slots", f"{slots}, as many GPUs as torch sees")
    text = f"{slots}, but torch sees {gpus} GPU(s)"
    return Finding("slots", text, f"write slots={gpus} in the hostfile", blocks=slots > gpus)


def clock(offset: float, error: float) -> Finding:
    """How far it is from the clock here, in seconds, give or take `error`."""
    if abs(offset) - error <= _CLOCK_SECONDS:
        return Finding("clock", f"within {max(0.1, round(abs(offset) + error + 0.05, 1))} s of this host's")
    text = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} this host's (to {error:.2f} s)"
    return Finding("clock", text, "timedatectl set-ntp true, or chrony: logs of hosts cannot be read together")


def network(
    interface: str, interfaces: Mapping[str, str], name: str, given: str | None, own_address: str | None
) -> Finding:
    """Whether the ranks will talk through the interface that leads to the other hosts.

    Args:
        interface: that one.
        interfaces: all of the host, with their addresses.
        name: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, whichever counts there.
        given: its value as the launcher passes it on, or None.
        own_address: what the host's own name stands for there, which gloo takes if not told.
    """
    remedy = f"in .deepspeed_env: {name}={interface}"
    others = [each for each in interfaces if each != "lo"]
    if given is not None:
        wanted = [part.lstrip("=") for part in given.lstrip("^").split(",")]
        taken = [each for each in interfaces if given.startswith("^") != any(each.startswith(part) for part in wanted)]
        if not taken:
            return Finding("network", f"{name}={given} names none of {', '.join(interfaces)}", remedy, blocks=True)
        if interface not in taken:
            return Finding("network", f"{name}={given}, while {interface} leads to the others", remedy)
        return Finding("network", f"{interface}, as {name}={given} says")
    if name.startswith("GLOO") and own_address != interfaces[interface]:
        return Finding("network", f"{interface}; gloo would take {own_address}, as its own name says", remedy)
    if name.startswith("NCCL") and len(others) > 1:
        return Finding("network", f"{interface}; NCCL would choose among {', '.join(others)}", remedy)
    return Finding("network", f"{interface} leads to the others")


def files(there: Mapping[str, str], first: str, on_first: Mapping[str, str]) -> list[Finding]:
    """A recipe's weights and shards as a host sees them, against those on the `first` one."""
    found = []
    for name, seen in there.items():
        missing = seen.startswith("missing")
        if not missing and seen == on_first[name]:
            found.append(Finding("recipe", f"{name}: {seen}"))
            continue
        as_there = "" if there is on_first else f"; on {first}: {on_first[name]}"
        remedy = "the same files at the same path on every host, on a shared file system or copied"
        found.append(Finding("recipe", f"{name}: {seen}{as_there}", remedy, blocks=True))
    return found


def merge(found: Mapping[str, Sequence[Finding]], hosts: Iterable[str]) -> list[Finding]:
    """One line for all hosts of which the same is found, in the order in which it is first found."""
    of: dict[tuple, list[str]] = {}
    for host, findings in found.items():
        for finding in findings:
            of.setdefault((finding.name, finding.text, finding.remedy, finding.blocks), []).append(host)
    order = list(Counter(name for name, *_ in of))
    lines = [
        Finding(name, f"{_listed(where, hosts)}: {text}", remedy, blocks)
        for (name, text, remedy, blocks), where in of.items()
    ]
    return sorted(lines, key=lambda finding: order.index(finding.name))


def _listed(where: Sequence[str], hosts: Iterable[str]) -> str:
    count = len(list(hosts))
    return f"all {count} hosts" if len(where) == count > 2 else ", ".join(where)
