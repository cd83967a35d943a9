"""All-reduces among hosts or local ranks, and what their speed means for a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from tinygptv_ds.doctor import host_probe
from tinygptv_ds.doctor.bandwidth import GRADIENTS_MB, SIZES_MB, TimingRow
from tinygptv_ds.doctor.check_result import CheckResult
from tinygptv_ds.doctor.ssh import Host, HostFailed
from tinygptv_ds.errors import ConfigError

_SECONDS = 180.0  # for the program to start and to measure
_SLOW = 0.5e9  # bytes a second among GPUs; a link of 10 Gbit/s gives about 1.1e9


def measure_hosts(
    hosts: Sequence[Host], port: int, backend: str, interfaces: Mapping[str, str]
) -> Iterator[CheckResult]:
    """Time all-reduces among all ranks of these hosts, one tensor size after the other.

    Args:
        hosts: rank 0 runs on the first.
        port: a free one there.
        backend: gloo or nccl.
        interfaces: the network interface of each host, unless the environment that is passed on names another.
    """
    firsts = [0, *accumulate(host.slots for host in hosts)]
    master = hosts[0].address if len(hosts) > 1 else "127.0.0.1"

    def run_ranks(number: int) -> dict:
        host = hosts[number]
        given = {"master": master, "port": port, "backend": backend, "interface": interfaces.get(host.name)}
        given |= {"first": firsts[number], "slots": host.slots, "world": firsts[-1]}
        try:
            return host.ask("all_reduce", _SECONDS + 30, **given, sizes_mb=list(SIZES_MB), limit=_SECONDS)
        except HostFailed as error:
            return {"error": str(error)}

    with ThreadPoolExecutor(len(hosts)) as pool:  # at once, because they wait for each other
        answers = list(pool.map(run_ranks, range(len(hosts))))
    failed = {host.name: answer["error"] for host, answer in zip(hosts, answers, strict=True) if "error" in answer}
    if failed:
        remedy = f"is {master} open to the others on every port, and does the interface lead there (.deepspeed_env)?"
        for name, error in failed.items():
            yield CheckResult("all-reduce", f"{name}: {error}", remedy, blocks=True)
        return
    yield from table([TimingRow(*row) for row in answers[0]["rows"]], firsts[-1], backend)


def table(rows: Sequence[TimingRow], ranks: int, backend: str) -> Iterator[CheckResult]:
    """Yield one result for each size, and the time of a ZeRO-2 step's gradients."""
    yield CheckResult("all-reduce", f"{ranks} ranks over {backend}:  size | time | algorithm | bus")
    for row in rows:
        algorithm, bus = row.algorithm_bandwidth() / 1e9, row.bus_bandwidth(ranks) / 1e9
        text = f"{row.size_mb:>6} MB | {row.seconds * 1000:9.1f} ms | {algorithm:7.2f} GB/s | {bus:7.2f} GB/s"
        yield CheckResult("all-reduce", text)
    of_gradients = next((row for row in rows if row.size_mb == GRADIENTS_MB), None)
    seconds = of_gradients.seconds if of_gradients else GRADIENTS_MB / rows[-1].size_mb * rows[-1].seconds
    slow = backend == "nccl" and rows[-1].bus_bandwidth(ranks) < _SLOW
    yield CheckResult(
        "a ZeRO-2 step",
        f"{GRADIENTS_MB} MB of gradients (45.3 M parameters, fp32) are reduced once per micro-batch: {seconds:.2f} s, "
        "next to the backward pass where overlap_comm is on; gathering the new weights transfers half as much per step",
        "slower than a link of 10 Gbit/s: see the interface above and NCCL_DEBUG=INFO; else fewer, larger micro-batches"
        if slow
        else None,
    )


def measure_local(ranks: int | None) -> Iterator[CheckResult]:
    """Time all-reduces among `ranks` ranks of this machine; None or 0: one rank for each GPU."""
    machine = host_probe.machine(".")
    ranks = ranks or machine["gpus"]
    if ranks < 2:
        raise ConfigError("--all-reduce takes two ranks or more: there is no second GPU here, so give their number")
    backend = "nccl" if machine["gpus"] else "gloo"
    if backend == "nccl" and ranks > machine["gpus"]:
        raise ConfigError(
            f"--all-reduce {ranks}: there are {machine['gpus']} GPUs here, and NCCL needs one for each rank"
        )
    answers = host_probe.all_reduce(
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
    if "error" in answers:
        yield CheckResult("all-reduce", answers["error"], "see the lines on communication and GPUs above", blocks=True)
        return
    yield from table([TimingRow(*row) for row in answers["rows"]], ranks, backend)
