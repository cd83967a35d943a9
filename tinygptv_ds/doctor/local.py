"""The command `doctor`: what this machine offers for training, what is missing and how to get it."""

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

from tinygptv_ds.config.hostfile import read_hostfile
from tinygptv_ds.distributed import Ranks, cores_per_rank
from tinygptv_ds.doctor.check_result import CheckResult
from tinygptv_ds.errors import ConfigError, require
from tinygptv_ds.resources import project_root

if TYPE_CHECKING:
    from packaging.requirements import Requirement

SETUP = "source launch/setup.sh requirements.txt"
WEIGHTS_GIB = 8  # Phi-2, EVA ViT-g and BLIP-2's Q-Former as published
_IMPORTED = ("torch", "torchvision", "timm", "transformers", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: without any, this machine is checked; with a hostfile, its hosts; with a run, what it left."""
    parser.add_argument(
        "run_directory",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="a run that has hung or lost a rank: report the stacks and collectives that it has left, explained",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="check the hosts of this file over ssh: whether they match, and how fast they communicate",
    )
    parser.add_argument(
        "--all-reduce",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="time all-reduces among N ranks of this machine, or one for each GPU",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="the recipe whose weights and shards each host must have"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the folder for runs (default: runs)")
    parser.add_argument("--ssh-port", type=int, metavar="N", help="ssh port (default: from ssh's own configuration)")


def run(args: argparse.Namespace) -> None:
    """Run the checks and print one line for each.

    Raises:
        ConfigError: training is impossible without something that is missing, or the options exclude each other.
    """
    if args.run_directory is not None:
        from tinygptv_ds.doctor.run_report import run_report

        print("\n".join(run_report(args.run_directory)))
        return
    results, where = _requested_checks(args)
    missing: dict[str, None] = {}
    for result in results:
        print(result, flush=True)
        missing |= {result.name: None} if result.blocks else {}
    if missing:
        raise ConfigError(f"training is not possible {where} yet: see {', '.join(missing)} above")
    print(f"\nTraining is possible {where}.")


def _requested_checks(args: argparse.Namespace) -> tuple[Iterator[CheckResult], str]:
    """Return the checks that the options select, and the machines they are about."""
    if args.hostfile is not None:
        require(
            args.all_reduce is None, "--all-reduce is for this machine alone; --hostfile measures its hosts in any case"
        )
        slots = read_hostfile(args.hostfile)
        return _check_hosts(slots, args), f"on {', '.join(slots)}"
    options = ("recipe", "set", "run_dir", "ssh_port")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
    require(
        not given,
        f"{', '.join(given)} can only be given with --hostfile; check-data checks a recipe's data on this machine",
    )
    if args.all_reduce is None:
        return check_machine(), "here"
    from tinygptv_ds.doctor.exchange import measure_local

    return chain(check_machine(), measure_local(args.all_reduce)), "here"


def _check_hosts(slots: Mapping[str, int], args: argparse.Namespace) -> Iterator[CheckResult]:
    from tinygptv_ds.config.load import load_recipe
    from tinygptv_ds.doctor.hosts import check_hosts

    recipe = None if args.recipe is None else load_recipe(args.recipe, args.set)
    names = [each.name for file in ("requirements.txt", "requirements-gpu.txt") for each in requirements(file)]
    return check_hosts(slots, names, recipe, args.run_dir or Path("runs"), args.ssh_port)


def check_machine() -> Iterator[CheckResult]:
    """Yield all results for this machine, in the order of the report."""
    yield python_version(sys.version_info[:2])
    packages = [*check_packages()]
    yield from packages
    yield computer()
    yield disk(Path.cwd())
    yield launcher()
    yield compiler()
    if any(result.blocks for result in packages):
        yield CheckResult("accelerator", "not checked, because packages are missing")
        return
    yield imports()
    yield from torch_checks()


def python_version(version: tuple[int, int]) -> CheckResult:
    """Check that Python is 3.11 to 3.13."""
    text = platform.python_version()
    if (3, 11) <= version <= (3, 13):
        return CheckResult("python", text)
    return CheckResult(
        "python", f"{text}, tested with 3.11 to 3.13", f"PYTHON=python3.11 {SETUP}", blocks=version < (3, 11)
    )


def check_packages() -> Iterator[CheckResult]:
    """Check the packages of requirements.txt, and those that only GPUs use."""
    try:
        wanted, for_gpus = requirements("requirements.txt"), requirements("requirements-gpu.txt")
    except ImportError as error:  # packaging, which torch's own requirements bring
        yield CheckResult(
            "packages", f"{error.name} is not installed, nor are the packages that need it", SETUP, blocks=True
        )
        return
    yield from package_versions(wanted)
    yield from map(flash_attention, for_gpus)


def requirements(name: str) -> list[Requirement]:
    """Return the requirements in a file of the repository, or those of the installed package without such a file."""
    from packaging.requirements import Requirement

    file = project_root() / name
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


def package_versions(wanted: Iterable[Requirement]) -> Iterator[CheckResult]:
    """Compare each installed version with its tested range."""
    for requirement in wanted:
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield CheckResult(requirement.name, "not installed", remedy, blocks=True)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield CheckResult(requirement.name, f"{found} (tested: {requirement.specifier})")
        else:
            yield CheckResult(requirement.name, f"{found}, tested with {requirement.specifier}", remedy, blocks=True)


def flash_attention(requirement: Requirement) -> CheckResult:
    """Report flash-attn, which is optional: the fastest attention backend on a GPU."""
    try:
        return CheckResult(requirement.name, metadata.version(requirement.name))
    except metadata.PackageNotFoundError:
        remedy = "on a GPU machine with nvcc: pip install --no-build-isolation -r requirements-gpu.txt"
        return CheckResult(requirement.name, "not installed, optional: torch has its own attention", remedy)


def computer() -> CheckResult:
    """Report the CPU cores that this process may use, and the memory."""
    cores = cores_per_rank(Ranks(0, 0, 1, 1))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return CheckResult("computer", f"{cores} CPU cores, {memory:.0f} GiB of memory")


def disk(folder: Path) -> CheckResult:
    """Check the free space in `folder`, for runs and, by default, weights."""
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{free:.0f} GiB free in {folder}"
    if free >= 2 * WEIGHTS_GIB:
        return CheckResult("disk", text)
    remedy = f"the published base weights alone take {WEIGHTS_GIB} GiB: keep them elsewhere (--set model.phi=DIR, ...)"
    return CheckResult("disk", text, remedy)


def launcher() -> CheckResult:
    """Find the `deepspeed` command on PATH, or next to this Python in an environment that is not activated."""
    on_path = shutil.which("deepspeed")
    if on_path:
        return CheckResult("launcher", on_path)
    scripts = Path(sys.executable).parent
    not_on_path = shutil.which("deepspeed", path=str(scripts))
    if not_on_path:
        return CheckResult("launcher", f"{not_on_path}, not on PATH", f"source {scripts / 'activate'}")
    return CheckResult("launcher", f"no deepspeed on PATH, nor in {scripts}", SETUP, blocks=True)


def compiler() -> CheckResult:
    """Look for a C++ compiler, which only DeepSpeed's compiled extras use; no JSON in ds_configs/ needs them."""
    tools = {name: shutil.which(name) for name in ("c++", "ninja")}
    missing = [name for name, path in tools.items() if path is None]
    if not missing:
        return CheckResult("compiler", f"{tools['c++']}, {tools['ninja']} (only for offload to NVMe)")
    remedy = "only for offload to NVMe: apt-get install g++ (or your system's compiler), pip install ninja"
    return CheckResult("compiler", f"no {' and no '.join(missing)}", remedy)


def imports() -> CheckResult:
    """Import the packages together in a new process, because matching versions do not guarantee that they load."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(_IMPORTED)}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return CheckResult("imports", f"{', '.join(_IMPORTED)} load together")
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    remedy = f"make a fresh environment, torch and torchvision from one source: rm -r .venv; {SETUP}"
    return CheckResult("imports", reason, remedy, blocks=True)


def torch_checks() -> Iterator[CheckResult]:
    """Report the accelerators, the attention backend of each precision, and the communication backend."""
    import torch

    gpus = range(torch.cuda.device_count())
    for number in gpus:
        properties = torch.cuda.get_device_properties(number)
        memory, version = properties.total_memory / 2**30, f"{properties.major}.{properties.minor}"
        yield CheckResult(f"GPU {number}", f"{properties.name}, {memory:.0f} GiB, capability {version}")
    if not gpus:
        yield no_gpu(driver=any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")))
    yield from precisions("cuda" if gpus else "cpu")
    yield communication("nccl" if gpus else "gloo")


def no_gpu(driver: bool) -> CheckResult:
    """Report that torch sees no GPU; `driver` is whether the system itself has one."""
    if driver:
        remedy = "install the torch build for its driver (pytorch.org), or look at CUDA_VISIBLE_DEVICES"
        return CheckResult("accelerator", "the system has a GPU, but torch does not see it", remedy)
    return CheckResult(
        "accelerator", "no GPU: all runs on the CPU, which is enough for the tests and launch/quickstart.sh"
    )


def precisions(device: str) -> Iterator[CheckResult]:
    """Report the attention backends for bf16, fp16 and fp32; the first of each is the one that "auto" chooses."""
    import torch

    from tinygptv_ds.models.attention import available_backends, unusable_backends

    bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        if name == "bf16" and not bf16:
            yield CheckResult(name, "not in this GPU's hardware", "--deepspeed_config ds_configs/zero2_fp16.json")
            continue
        first, *others = available_backends(device, dtype)
        text = f"attention by {first}" + (f" (also: {', '.join(others)})" if others else "")
        yield CheckResult(name, text)
        for backend, reason in unusable_backends(device, dtype).items():
            remedy = f"a build of it for torch {torch.__version__}, or uninstall it"
            yield CheckResult(name, f"{backend} is installed but cannot be imported ({reason})", remedy)


def communication(backend: str) -> CheckResult:
    """Check that torch has the communication backend of the ranks."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_backend_available(backend):
        return CheckResult("communication", backend)
    return CheckResult(
        "communication", f"torch was built without {backend}", "pip install torch from PyPI", blocks=True
    )
