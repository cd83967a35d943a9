"""The examples for clusters: they parse, and what they run is what the launcher takes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import ROOT, check_command

from tinygptv_ds.config.hostfile import read_hostfile
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.train.launcher.options import parse_options

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
RECORDER = """
import os, sys
open(os.environ["RECORDED"], "a").write(chr(10).join([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + chr(10))
"""


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "examples" / name).read_text()))


def container() -> dict[str, Any]:
    (found,) = job()["template"]["spec"]["containers"]
    return found


def job() -> dict[str, Any]:
    (replicated,) = load("kubernetes.yaml")[1]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def recorded(script: str, folder: Path, programs: tuple[str, ...], **env: str) -> dict[str, list[str]]:
    """Run a shell's script where `programs` record their words, and return those."""
    for name in programs:
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable}\n{RECORDER.replace('RECORDED', f'RECORDED_{name}')}")
        file.chmod(0o755)
    out = {name: folder / f"{name}.words" for name in programs}
    given = {f"RECORDED_{name}": str(path) for name, path in out.items()}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["/bin/bash", "-c", script]
    subprocess.run(command, cwd=folder, env={**os.environ, **env, **given, "PATH": path}, check=True, timeout=60)
    return {name: path.read_text().splitlines() for name, path in out.items() if path.exists()}


def test_the_notebook_was_run_in_order_and_answers() -> None:
    """Outputs are those of one run from the first cell to the last, without an error or a path of a machine."""
    text = (ROOT / "examples/finetune_own_images.ipynb").read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len(text) < 60_000 and not re.search(r"/(tmp|home|root|work)/", text)
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    assert "held-out score" in shown and "held-out loss" in shown


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_says_how_it_is_used(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header and f"examples/{path.name}" in header[0] and "Restarts" in header[0]
    files = re.findall(r"\b(?:examples|docs|launch)/[\w/.]+\w", header[0])
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_a_pod_starts_its_node_of_a_run(tmp_path: Path) -> None:
    """With the environment that Kubernetes sets, the container's script names the nodes by their pods' addresses."""
    given = {entry["name"]: entry.get("value", "tinygptv") for entry in container()["env"]}
    nodes, gpus = int(given["NODES"]), int(given["GPUS"])
    assert (job()["parallelism"], job()["completions"], job()["completionMode"]) == (nodes, nodes, "Indexed")
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    (script,) = container()["args"]
    script = re.sub(r"\S+/hostfile", str(tmp_path / "hostfile"), script)
    words = recorded(script, tmp_path, ("tinygptv-ds", "getent"), **given, JOB_COMPLETION_INDEX="1")["tinygptv-ds"]
    options = parse_options(words[2:])
    hosts = read_hostfile(Path(options.launcher["--hostfile"]))
    name = load("kubernetes.yaml")[1]["metadata"]["name"]
    assert hosts == {f"{name}-node-0-{node}.{name}": gpus for node in range(nodes)}
    assert (options.launcher["--node_rank"], options.launcher["--master_addr"]) == ("1", next(iter(hosts)))
    check_command(words)
    recipe = load_recipe(ROOT / f"stages/{given['STAGE']}.yaml", ["train.micro_batch_size=4"])
    assert recipe.train.accumulation(nodes * gpus) == 1


def test_mistakes_are_not_repeated_and_lost_ranks_are() -> None:
    """By the table of exit codes: 1 and 2 end the JobSet; any other code restarts all pods, as often as is allowed."""
    rules = {rule["action"]: rule for rule in job()["podFailurePolicy"]["rules"]}
    codes = rules["FailJob"]["onExitCodes"]
    assert (codes["containerName"], codes["operator"], codes["values"]) == (container()["name"], "In", [1, 2])
    assert job()["backoffLimit"] == 0 and job()["template"]["spec"]["restartPolicy"] == "Never"
    policy = load("kubernetes.yaml")[1]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    assert set(load("skypilot.yaml")[0]["resources"]["job_recovery"]["recover_on_exit_codes"]) == {75, 138, 143}


def test_a_pod_has_what_a_run_needs() -> None:
    """Shared memory, a shared volume, time to save, and a user that is not root."""
    pod = job()["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts[container()["workingDir"]]]["persistentVolumeClaim"]["claimName"]
    assert claim == load("kubernetes.yaml")[0]["metadata"]["name"]
    assert load("kubernetes.yaml")[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["terminationGracePeriodSeconds"] >= 120 and pod["securityContext"]["runAsNonRoot"]


def test_skypilot_runs_the_launcher(tmp_path: Path) -> None:
    task = load("skypilot.yaml")[0]
    env = {**task["envs"], "HOME": str(tmp_path)}
    words = recorded(task["run"], tmp_path, ("bash",), **env)["bash"]
    assert shlex.join(words).startswith(f"bash launch/{env['STAGE']}.sh ")
    check_command(words)
    assert {(tmp_path / name).is_symlink() for name in ("weights", "data")} == {True}
    mounted = {Path(path).name: mount["source"] for path, mount in task["file_mounts"].items()}
    assert mounted == {name: f"{env['BUCKET']}/{name}" for name in ("weights", "data")}
    options = parse_options(words[2:])
    assert options.restarts > 0
    assert f"train.mirror={env['BUCKET']}/runs/{env['STAGE']}" in options.stage
