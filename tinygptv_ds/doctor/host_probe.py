"""The program that `doctor` runs on each host over ssh; it answers requests on stdin until that ends.

A request is a line `NAME JSON`, an answer a line of JSON after `MARK`. torch is not imported here: what needs it runs
in new processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tinygptv_ds.processes import usable_cores
from tinygptv_ds.resources import project_root

MARK = "@tinygptv "  # separates answers from what the login shell prints
PACKAGE = Path(__file__).resolve().parents[1]
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_DISCARD = 9  # a UDP port to look up the route for; nothing is sent
_WEIGHTS = ("phi", "eva_vit", "qformer", "init_from")  # of a recipe's `model`


def software(packages: list[str]) -> dict[str, str | None]:
    """Return the versions of Python and of packages, and a hash of this repository's code and recipes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"this repository": _code()}


def _code() -> str:
    digest = hashlib.sha256()
    for folder in (PACKAGE, project_root() / "stages", project_root() / "ds_configs"):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".yaml", ".json"):
                digest.update(f"{folder.name}/{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def machine(run_dir: str) -> dict[str, Any]:
    """Return the number of GPUs and cores, free bytes at `run_dir`, the host's own name and address, a free port."""
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return {
        "gpus": _gpus(),
        "cores": usable_cores(),
        "free": shutil.disk_usage(folder).free,
        "own_name": socket.gethostname(),
        "own_address": _resolved(socket.gethostname()),
        "free_port": port,
    }


def _gpus() -> int:
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        return 0
    done = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def _resolved(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def route(to: str) -> dict[str, Any]:
    """Return the interface through which the address `to` is reached, and all interfaces that have an address."""
    addresses = dict(_interfaces())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((to, _DISCARD))
            own = probe.getsockname()[0]
        except OSError as error:
            return {"interface": None, "why": str(error), "interfaces": addresses}
    interface = next((name for name, address in addresses.items() if address == own), None)
    return {"interface": interface, "address": own, "interfaces": addresses}


def _interfaces() -> Iterator[tuple[str, str]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            yield name, socket.inet_ntoa(request[20:24])


def files(recipe: dict[str, Any]) -> dict[str, str]:
    """Return for each file or dataset of a recipe the number of files, samples and bytes, or what is wrong."""
    from tinygptv_ds.config.load import build_recipe
    from tinygptv_ds.errors import DataError
    from tinygptv_ds.features.format import shards_of

    built = build_recipe(recipe, "recipe")
    found = {}
    for key in _WEIGHTS:
        path = getattr(built.model, key)
        if path is not None:
            found[f"model.{key}"] = _weights(Path(path))
    sections = [(s, built.data.features) for s in built.data.used] + [(s, None) for s in built.data.validation]
    for section, root in sections:
        try:
            shards = shards_of(section, root, allow_pipe=section.name in built.data.allow_pipe)
        except DataError as error:
            found[f"dataset {section.name}"] = f"missing: {error}"
        else:
            found[f"dataset {section.name}"] = _shards(
                [shard for shard in shards if isinstance(shard, Path)], len(shards)
            )
    return found


def _weights(path: Path) -> str:
    if not path.exists():
        return f"missing: {path}"
    folder = path / "model" if (path / "model").is_dir() else path  # of a run directory
    sizes = [file.stat().st_size for file in ([path] if path.is_file() else folder.iterdir()) if file.is_file()]
    return f"{len(sizes)} file(s), {sum(sizes):,} bytes"


def _shards(here: list[Path], count: int) -> str:
    from tinygptv_ds.data.shards.index import stored_count

    if not here:
        return f"{count} remote shard(s)"
    counts = [stored_count(shard) for shard in here]
    samples = f"{sum(filter(None, counts)):,} samples"
    if None in counts:
        samples += f" in those that are indexed ({counts.count(None)} are not yet)"
    return f"{len(here)} shard(s), {sum(shard.stat().st_size for shard in here):,} bytes, {samples}"


def all_reduce(
    first: int,
    slots: int,
    world: int,
    *,
    master: str,
    port: int,
    backend: str,
    interface: str | None,
    sizes_mb: list[int],
    limit: float,
) -> dict[str, Any]:
    """Run this host's ranks of the bandwidth program and return its measurements.

    Args:
        first: the first rank of this host.
        slots: number of ranks on this host.
        world: number of ranks on all hosts.
        master: address of rank 0's host.
        port: a free port there.
        backend: gloo or nccl.
        interface: network interface, unless the environment names another.
        sizes_mb: tensor sizes in megabytes.
        limit: seconds after which they are killed.

    Returns:
        "rows": the measurements, from the host of rank 0 alone; or "error": what failed.
    """
    env = os.environ | {"MASTER_ADDR": master, "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    name = f"{backend.upper()}_SOCKET_IFNAME"
    if interface is not None:
        env.setdefault(name, interface)
    command = [
        sys.executable,
        "-P",
        "-m",
        "tinygptv_ds.doctor.bandwidth",
        "--backend",
        backend,
        "--sizes-mb",
        *map(str, sizes_mb),
    ]
    ranks = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(first + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(slots)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for local in range(slots)
    ]
    until = time.monotonic() + limit
    ended = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=max(0.0, until - time.monotonic()))
            ended.append((rank.returncode, out, err.strip().splitlines()))
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit:g} s"}
    finally:
        for rank in ranks:
            rank.kill()
    failed = next(((code, lines) for code, _, lines in ended if code != 0), None)
    if failed is not None:
        code, lines = failed
        return {"error": lines[-1] if lines else f"exit code {code}"}
    return {"rows": json.loads(ended[0][1].partition(MARK)[2]) if first == 0 else []}


REQUESTS: dict[str, Callable[..., Any]] = {
    "clock": time.time,
    "software": software,
    "machine": machine,
    "route": route,
    "files": files,
    "all_reduce": all_reduce,
}


def main() -> None:
    """Answer requests until stdin ends."""
    print(f"{MARK}{json.dumps('ready')}", flush=True)
    for line in sys.stdin:
        name, _, given = line.partition(" ")
        print(f"{MARK}{json.dumps(REQUESTS[name](**json.loads(given)))}", flush=True)


if __name__ == "__main__":
    main()
