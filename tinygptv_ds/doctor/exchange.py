"""How fast the hosts add up tensors together, and what that means for a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from tinygptv_ds.doctor import host_probe as facts
from tinygptv_ds.doctor.bandwidth import GRADIENTS_MB, SIZES_MB, Row
from tinygptv_ds.doctor.check_result import Finding
from tinygptv_ds.doctor.ssh import Host, HostFailed
from tinygptv_ds.errors import ConfigError

_SECONDS = 180.0  # for the program to start and to measure
_SLOW = 0.5e9  # bytes a second among GPUs; a link of 10 Gbit/s gives about 1.1e9


def exchange_findings(
    hosts: Sequence[Host], port: int, backend: str, interfaces: Mapping[str, str]
) -> Iterator[Finding]:
    """All-reduces among all ranks of these hosts, size by size.

    Args:
        hosts: rank 0 runs on the first.
        port: a free one there.
        backend: gloo or nccl.
        interfaces: by host, what to talk through unless the environment that is passed on names another.
    """
    firsts = [0, *accumulate(host.slots for host in hosts)]
    master = hosts[0].address if len(hosts) > 1 else "127.0.0.1"

    def ranks_of(number: int) -> dict:
        host = hosts[number]
        given = {"master": master, "port": port, "backend": backend, "interface": interfaces.get(host.name)}
        given |= {"first": firsts[number], "slots": host.slots, "world": firsts[-1]}
        try:
            return host.ask("all_reduce", _SECONDS + 30, **given, sizes_mb=list(SIZES_MB), limit=_SECONDS)
        except HostFailed as error:
            return {"error": str(error)}

    with ThreadPoolExecutor(len(hosts)) as pool:  # all together, since they wait for each other
        told = list(pool.map(ranks_of, range(len(hosts))))
    failed = {host.name: answer["error"] for host, answer in zip(hosts, told, strict=True) if "error" in answer}
    if failed:
        remedy = f"is {master} open to the others on every port, and does the interface lead there (.deepspeed_env)?"
        for name, error in failed.items():
            yield Finding("all-reduce", f"{name}: {error}", remedy, blocks=True)
        return
    yield from table([Row(*row) for row in told[0]["rows"]], firsts[-1], backend)


def table(rows: Sequence[Row], ranks: int, backend: str) -> Iterator[Finding]:
    """A line a size, and what an optimizer step makes of them."""
    yield Finding("all-reduce", f"{ranks} ranks over {backend}:  size | time | algorithm | bus")
    for row in rows:
        algorithm, bus = row.algorithm_bandwidth() / 1e9, row.bus_bandwidth(ranks) / 1e9
        text = f"{row.size_mb:>6} MB | {row.seconds * 1000:9.1f} ms | {algorithm:7.2f} GB/s | {bus:7.2f} GB/s"
        yield Finding("all-reduce", text)
    of_gradients = next((row for row in rows if row.size_mb == GRADIENTS_MB), None)
    seconds = of_gradients.seconds if of_gradients else GRADIENTS_MB / rows[-1].size_mb * rows[-1].seconds
    slow = backend == "nccl" and rows[-1].bus_bandwidth(ranks) < _SLOW
    yield Finding(
        "a ZeRO-2 step",
        f"{GRADIENTS_MB} MB of gradients (45.3 M parameters, fp32) are added up once a micro-batch: {seconds:.2f} s, "
        "next to the backward pass where overlap_comm is on; gathering the new weights sends half as much, once a step",
        "slower than a link of 10 Gbit/s: see the interface above and NCCL_DEBUG=INFO; else fewer, larger micro-batches"
        if slow
        else None,
    )


def local_findings(ranks: int | None) -> Iterator[Finding]:
    """All-reduces among ranks of this machine alone; None: one for each GPU."""
    machine = facts.machine(".")
    ranks = ranks or machine["gpus"]
    if ranks < 2:
        raise ConfigError("--all-reduce takes two ranks or more: there is no second GPU here, so say how many")
    backend = "nccl" if machine["gpus"] else "gloo"
    if backend == "nccl" and ranks > machine["gpus"]:
        raise ConfigError(
            f"--all-reduce {ranks}: there are {machine['gpus']} GPUs here, and NCCL takes one for each rank"
        )
    told = facts.all_reduce(
        first=0,
        slots=ranks,
        world=ranks,
        master="127.0.0.1",
        port=machine["free_port"],
        backend=backend,
        interface="lo" if backend == "gloo" else None,
        sizes_mb=list(SIZES_MB),
        limit=_SECONDS,
    )
    if "error" in told:
        yield Finding("all-reduce", told["error"], "see the lines on communication and GPUs above", blocks=True)
        return
    yield from table([Row(*row) for row in told["rows"]], ranks, backend)
