"""Install the packages that this Python lacks from a folder of wheels into a separate folder."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path


def missing_packages(wheels: list[Path]) -> list[Path]:
    """Return the wheels whose package is not installed in any version."""
    return [wheel for wheel in wheels if not _is_installed(wheel.name.split("-")[0])]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Carry out `install.py WHEELS SITE`."""
    folder, site = Path(sys.argv[1]), Path(sys.argv[2])
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"error: {folder} contains no wheels; bash benchmarks/gpu_wheels.sh {folder} collects them")
    chosen = missing_packages(wheels)
    if chosen:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
        ]
        done = subprocess.run([*pip, "--target", str(site), *map(str, chosen)], check=False)
        if done.returncode:
            sys.exit(f"error: pip could not install from {folder}: were the wheels collected for this Python?")
    names = ", ".join(wheel.name.split("-")[0] for wheel in chosen)
    print(f"from {folder}: {names or 'nothing, every package is installed'}", flush=True)


if __name__ == "__main__":
    main()
