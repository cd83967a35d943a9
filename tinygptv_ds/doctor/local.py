"""`python -m tinygptv_ds doctor`: what this machine offers for training, what is missing and how to get it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.distributed import Ranks, cores_per_rank
from tinygptv_ds.doctor.check_result import Finding
from tinygptv_ds.doctor.hostfile import read_hostfile
from tinygptv_ds.errors import ConfigError, require

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SETUP = "source launch/setup.sh requirements.txt"
WEIGHTS_GIB = 8  # Phi-2, EVA ViT-g and BLIP-2's Q-Former as published
_IMPORTED = ("torch", "torchvision", "timm", "transformers", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Without options the verb looks at this machine; with a hostfile, at those hosts."""
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="look at the hosts of this file over ssh: are they alike, and how fast are they together",
    )
    parser.add_argument(
        "--all-reduce",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="time all-reduces among N ranks of this machine, or one for each GPU",
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="whose weights and shards each host has to see")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where runs are to go (default: runs)")
    parser.add_argument("--ssh-port", type=int, metavar="N", help="other than ssh's own configuration says")


def run(args: argparse.Namespace) -> None:
    """Print the report.

    Raises:
        ConfigError: something is missing without which no stage can be trained, or the options do not fit together.
    """
    findings, where = _asked(args)
    missing = {}
    for finding in findings:
        print(finding, flush=True)
        missing |= {finding.name: None} if finding.blocks else {}
    if missing:
        raise ConfigError(f"training is not possible {where} yet: see {', '.join(missing)} above")
    print(f"\nTraining is possible {where}.")


def _asked(args: argparse.Namespace) -> tuple[Iterator[Finding], str]:
    """The findings that the options ask for, and of where."""
    if args.hostfile is not None:
        require(
            args.all_reduce is None, "--all-reduce is for this machine alone; --hostfile times its hosts in any case"
        )
        slots = read_hostfile(args.hostfile)
        return _of_hosts(slots, args), f"on {', '.join(slots)}"
    options = ("recipe", "set", "run_dir", "ssh_port")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
    require(
        not given, f"{', '.join(given)} can only be given with --hostfile; check-data looks at a recipe's data here"
    )
    if args.all_reduce is None:
        return diagnose(), "here"
    from tinygptv_ds.doctor.exchange import local_findings

    return chain(diagnose(), local_findings(args.all_reduce)), "here"


def _of_hosts(slots: Mapping[str, int], args: argparse.Namespace) -> Iterator[Finding]:
    from tinygptv_ds.config.load import load_recipe
    from tinygptv_ds.doctor.hosts import diagnose_hosts

    recipe = None if args.recipe is None else load_recipe(args.recipe, args.set)
    names = [each.name for file in ("requirements.txt", "requirements-gpu.txt") for each in requirements(file)]
    return diagnose_hosts(slots, names, recipe, args.run_dir or Path("runs"), args.ssh_port)


def diagnose() -> Iterator[Finding]:
    """Everything that is looked at, in the order of the report."""
    yield python_version(sys.version_info[:2])
    packages = [*packages_found()]
    yield from packages
    yield computer()
    yield disk(Path.cwd())
    yield launcher()
    yield compiler()
    if any(finding.blocks for finding in packages):
        yield Finding("accelerator", "not looked at, since packages are missing")
        return
    yield imports()
    yield from torch_findings()


def python_version(version: tuple[int, int]) -> Finding:
    """3.11 to 3.13."""
    text = platform.python_version()
    if (3, 11) <= version <= (3, 13):
        return Finding("python", text)
    return Finding(
        "python", f"{text}, tested with 3.11 to 3.13", f"PYTHON=python3.11 {SETUP}", blocks=version < (3, 11)
    )


def packages_found() -> Iterator[Finding]:
    """All of requirements.txt, and what only GPUs use."""
    try:
        wanted, for_gpus = requirements("requirements.txt"), requirements("requirements-gpu.txt")
    except ImportError as error:  # packaging, which torch's own requirements bring
        yield Finding("packages", f"{error.name} is not installed, nor what needs it", SETUP, blocks=True)
        return
    yield from package_versions(wanted)
    yield from map(flash_attention, for_gpus)


def requirements(name: str) -> list[Requirement]:
    """The lines of a requirements file of the repository; an installed package's own without a repository."""
    from packaging.requirements import Requirement

    file = ROOT / name
    if file.is_file():
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        return [Requirement(line) for line in lines if line and not line.startswith("-")]
    try:
        declared = [Requirement(line) for line in metadata.requires("tinygptv_ds") or []]
    except metadata.PackageNotFoundError:
        return []
    extra = {"requirements.txt": "", "requirements-gpu.txt": "gpu"}[name]
    return [
        r for r in declared if (r.marker is None and not extra) or (r.marker and r.marker.evaluate({"extra": extra}))
    ]


def package_versions(wanted: Iterable[Requirement]) -> Iterator[Finding]:
    """Each installed version against its tested range."""
    for requirement in wanted:
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", remedy, blocks=True)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding(requirement.name, f"{found} (tested: {requirement.specifier})")
        else:
            yield Finding(requirement.name, f"{found}, tested with {requirement.specifier}", remedy, blocks=True)


def flash_attention(requirement: Requirement) -> Finding:
    """Never needed; the fastest attention on a GPU."""
    try:
        return Finding(requirement.name, metadata.version(requirement.name))
    except metadata.PackageNotFoundError:
        remedy = "on a GPU machine with nvcc: pip install --no-build-isolation -r requirements-gpu.txt"
        return Finding(requirement.name, "not installed, optional: torch has an attention of its own", remedy)


def computer() -> Finding:
    """Cores that this process may use, and memory."""
    cores = cores_per_rank(Ranks(0, 0, 1, 1))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("computer", f"{cores} CPU cores, {memory:.0f} GiB of memory")


def disk(folder: Path) -> Finding:
    """Space where runs and, by default, weights go."""
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{free:.0f} GiB free in {folder}"
    if free >= 2 * WEIGHTS_GIB:
        return Finding("disk", text)
    remedy = f"the published base weights alone take {WEIGHTS_GIB} GiB: keep them elsewhere (--set model.phi=DIR, ...)"
    return Finding("disk", text, remedy)


def launcher() -> Finding:
    """The `deepspeed` command."""
    on_path = shutil.which("deepspeed")
    if on_path:
        return Finding("launcher", on_path)
    adjacent = Path(sys.executable).parent / "deepspeed"
    remedy = f"export PATH={adjacent.parent}:$PATH" if adjacent.is_file() else SETUP
    return Finding("launcher", "deepspeed is not on PATH", remedy, blocks=True)


def compiler() -> Finding:
    """Only DeepSpeed's compiled extras use it, of which no JSON in ds_configs/ needs one."""
    tools = {name: shutil.which(name) for name in ("c++", "ninja")}
    missing = [name for name, path in tools.items() if path is None]
    if not missing:
        return Finding("compiler", f"{tools['c++']}, {tools['ninja']} (only for offload to NVMe)")
    remedy = "only for offload to NVMe: apt-get install g++ (or your system's compiler), pip install ninja"
    return Finding("compiler", f"no {' and no '.join(missing)}", remedy)


def imports() -> Finding:
    """Whether the packages load together, which versions alone do not tell. Tried in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(_IMPORTED)}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return Finding("imports", f"{', '.join(_IMPORTED)} load together")
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    remedy = f"make a fresh environment, torch and torchvision from one source: rm -r .venv; {SETUP}"
    return Finding("imports", reason, remedy, blocks=True)


def torch_findings() -> Iterator[Finding]:
    """Accelerators, precisions with the attention that each gets, and communication."""
    import torch

    gpus = range(torch.cuda.device_count())
    for number in gpus:
        properties = torch.cuda.get_device_properties(number)
        memory, version = properties.total_memory / 2**30, f"{properties.major}.{properties.minor}"
        yield Finding(f"GPU {number}", f"{properties.name}, {memory:.0f} GiB, capability {version}")
    if not gpus:
        yield no_gpu(driver=any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")))
    yield from precisions("cuda" if gpus else "cpu")
    yield communication("nccl" if gpus else "gloo")


def no_gpu(driver: bool) -> Finding:
    """Not needed; `driver` is whether the system shows one all the same."""
    if driver:
        remedy = "install the torch build for its driver (pytorch.org), or look at CUDA_VISIBLE_DEVICES"
        return Finding("accelerator", "the system has a GPU, but torch does not see it", remedy)
    return Finding("accelerator", "no GPU: all runs on the CPU, which does for the tests and launch/quickstart.sh")


def precisions(device: str) -> Iterator[Finding]:
    """bf16, fp16 and fp32, each with the attention back ends that can run in it; the first is what "auto" takes."""
    import torch

    from tinygptv_ds.models.attention import available_backends

    bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        if name == "bf16" and not bf16:
            yield Finding(name, "not in this GPU's hardware", "--deepspeed_config ds_configs/zero2_fp16.json")
            continue
        first, *others = available_backends(device, dtype)
        text = f"attention by {first}" + (f" (also: {', '.join(others)})" if others else "")
        yield Finding(name, text)


def communication(backend: str) -> Finding:
    """What ranks talk through."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_backend_available(backend):
        return Finding("communication", backend)
    return Finding("communication", f"torch was built without {backend}", "pip install torch from PyPI", blocks=True)
