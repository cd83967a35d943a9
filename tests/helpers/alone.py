"""Programs that run in a process of their own, in which this package and what it alone needs cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

_BLOCKED = """
import sys

class _Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tinygptv_ds", "numba", "simplejpeg", "webdataset"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _Blocker())
"""


def run_alone(script: str, folder: Path) -> str:
    """Run a script in `folder`, where the Hub is out of reach, and return its output."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", _BLOCKED + script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
