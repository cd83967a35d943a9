"""`doctor --hostfile` and `--all-reduce` as far as one host can show them: files, checks and their messages."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.verbs import call

from tinygptv_ds.config.hostfile import passed_on, read_hostfile
from tinygptv_ds.config.load import load_recipe, recipe_dict
from tinygptv_ds.doctor import host_probe
from tinygptv_ds.doctor import hosts as check
from tinygptv_ds.doctor import local as doctor
from tinygptv_ds.doctor.bandwidth import GRADIENTS_MB, TimingRow
from tinygptv_ds.doctor.check_result import CheckResult
from tinygptv_ds.doctor.exchange import table
from tinygptv_ds.doctor.ssh import Host, HostFailed
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.resources import project_root

ROOT = project_root()


def test_a_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("# nodes\n\nb.example slots=8\n  a slots=2  # the small one\n")
    assert list(read_hostfile(file).items()) == [("b.example", 8), ("a", 2)]
    file.write_bytes(b"# comment\r\n me@a.b\tslots=02  max_slots=4 # a comment\r\n\r\n10.0.0.1 slots=1")
    assert read_hostfile(file) == {"me@a.b": 2, "10.0.0.1": 1}
    assert read_hostfile(ROOT / "launch/hostfile.example") == {"node1": 8, "node2": 8}


ODD_HOSTS = ("node[1-4]", "a,b", "-oProxyCommand=x", "a;b", "a$b", "fe80::1", "[fe80::1]", "a:22", "*", "^a", "\ufeffa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory; launch/hostfile.example shows one"),
        ("", "names no host"),
        ("# node1 slots=8\n", "names no host"),
        ("node1 slots=8\nnode2\n", "line 2: 'node2' is not NAME slots=NUMBER"),
        ("node1 slot=8\n", "line 1: 'node1 slot=8' is not NAME"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0' is not NAME"),
        ("node1 slots=4\nnode2 slots=4\nnode1 slots=4", "line 3: node1 is named twice"),
        ("node1 slots=4 node2 slots=4\n", "line 1: 'node1 slots=4 node2 slots=4' is not NAME"),
        ("node1 slots=" + "9" * 5000, "line 1: 'node1 slots=999"),
        ("node1 slots=٣", "line 1: 'node1 slots=٣' is not NAME"),
        *((f"{odd} slots=2\n", f"line 1: {odd!r} is no name of one host") for odd in ODD_HOSTS),
    ],
)
def test_a_bad_hostfile_is_reported_before_ssh(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # neither ssh nor pdsh
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ConfigError) as caught:
        call(doctor, "--hostfile", tmp_path / "hostfile")
    assert message in str(caught.value) and str(tmp_path / "hostfile") in str(caught.value)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--recipe, --ssh-port can only be given with --hostfile"):
        call(doctor, "--recipe", "stages/stage1.yaml", "--ssh-port", 22)
    with pytest.raises(ConfigError, match="for this machine alone"):
        call(doctor, "--hostfile", tmp_path, "--all-reduce")


def test_what_the_launcher_passes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NCCL", "PYTHON"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_text("A=home\nHF_HOME=/hf\n")
    monkeypatch.chdir(tmp_path)
    example = (ROOT / "launch/deepspeed_env.example").read_text().splitlines()
    (tmp_path / ".deepspeed_env").write_text("\n".join(["A=b=c", *(line for line in example if line[0] != "#")]))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OTHER", "1")
    env = passed_on()
    assert env["A"] == "b=c" and env["NCCL_DEBUG"] == "INFO" and env["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "OTHER" not in env
    (tmp_path / ".deepspeed_env").write_text("A=1\n# B\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env, line 2: '# B' is not KEY=value"):
        passed_on()


NAME = "GLOO_SOCKET_IFNAME"
BOTH = {"lo": "127.0.0.1", "eth0": "192.168.0.7", "ib0": "10.0.0.7"}


@pytest.mark.parametrize(
    ("name", "given", "own", "text", "state"),
    [
        (NAME, "ib0", "127.0.1.1", "ib0, as GLOO_SOCKET_IFNAME=ib0 requires", "ok"),
        (NAME, "eth0", "10.0.0.7", "while ib0 leads to the others", "note"),
        (NAME, "eth9", "10.0.0.7", "names none of lo, eth0, ib0", "MISSING"),
        (NAME, None, "127.0.1.1", "gloo would take 127.0.1.1, the address of its own name", "note"),
        (NAME, None, "10.0.0.7", "ib0 leads to the others", "ok"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", "127.0.1.1", "ib0, as NCCL_SOCKET_IFNAME=^lo,eth requires", "ok"),
        ("NCCL_SOCKET_IFNAME", "^ib", "127.0.1.1", "while ib0 leads", "note"),
        ("NCCL_SOCKET_IFNAME", None, "127.0.1.1", "NCCL would choose among eth0, ib0", "note"),
    ],
)
def test_the_interface(name: str, given: str | None, own: str, text: str, state: str) -> None:
    found = check.network("ib0", BOTH, name, given, own)
    assert text in found.text and str(found).startswith(state)
    assert found.remedy is None or found.remedy == f"in .deepspeed_env: {name}=ib0"


def test_clocks() -> None:
    assert check.clock(0.0004, 0.001).remedy is None
    assert "within 0.1 s" in check.clock(-0.0004, 0.001).text
    assert check.clock(1.5, 0.6).remedy is None  # the way there and back took longer
    off = check.clock(-95.26, 0.001)
    assert off.text.startswith("95.3 s behind this host's") and "set-ntp" in off.remedy


def test_a_recipes_files(recipe_file: Callable[..., Path], weights: Path, tmp_path: Path) -> None:
    """Equal, of another size, and missing; the recipe is passed as JSON."""
    shards = tiny.write_shards(tmp_path / "mine", tiny.samples("vqa", 12))
    path = recipe_file(data__datasets=[{"name": "mine", "shards": str(shards)}], model__init_from=None)
    recipe = json.loads(json.dumps(recipe_dict(load_recipe(path))))
    here = host_probe.files(recipe)
    assert list(here) == ["model.phi", "model.eva_vit", "model.qformer", "dataset mine"]
    assert here["model.eva_vit"] == f"1 file(s), {(weights / 'eva_vit_g.pth').stat().st_size:,} bytes"
    assert here["dataset mine"].startswith("3 shard(s), ") and here["dataset mine"].endswith(" bytes, 12 samples")
    assert [found.remedy for found in check.files(here, "a", here)] == [None] * 4
    next(shards.glob("*.idx")).unlink()
    assert host_probe.files(recipe)["dataset mine"].endswith(" in those that are indexed (1 are not yet)")
    next(shards.glob("*.tar")).unlink()
    *_, other = check.files(host_probe.files(recipe), "a", here)
    assert other.blocks and "dataset mine: 2 shard(s)" in other.text and "; on a: 3 shard(s)" in other.text
    recipe["model"]["phi"] = str(tmp_path / "away")
    gone = host_probe.files(recipe)
    first, *_ = check.files(gone, "a", gone)  # missing on the first host itself
    assert first.blocks and first.text == f"model.phi: missing: {tmp_path / 'away'}"


def test_the_same_on_several_hosts_is_one_line() -> None:
    same, own = CheckResult("slots", "8"), CheckResult("slots", "4", "more", blocks=True)
    found = {
        "a": [same, CheckResult("disk", "x")],
        "b": [own, CheckResult("disk", "x")],
        "c": [same, CheckResult("disk", "x")],
    }
    lines = [(line.text, line.blocks) for line in check.merge(found, found)]
    assert lines == [("a, c: 8", False), ("b: 4", True), ("all 3 hosts: x", False)]


def test_the_table_of_all_reduces() -> None:
    """As nccl-tests counts: 2 (n - 1) / n of the tensor passes each rank's link."""
    head, *lines, meaning = table([TimingRow(64, 0.032), TimingRow(GRADIENTS_MB, 0.1)], 4, "nccl")
    assert "4 ranks over nccl" in head.text
    assert lines[0].text.split() == ["64", "MB", "|", "32.0", "ms", "|", "2.00", "GB/s", "|", "3.00", "GB/s"]
    assert "181 MB" in meaning.text and "0.10 s" in meaning.text and meaning.remedy is None
    assert "10 Gbit/s" in [*table([TimingRow(256, 2.0)], 2, "nccl")][-1].remedy
    assert [*table([TimingRow(256, 2.0)], 2, "gloo")][-1].remedy is None
    assert "1.41 s" in [*table([TimingRow(256, 2.0)], 2, "gloo")][-1].text  # where the greater sizes took too long


def test_all_reduces_of_local_ranks() -> None:
    with pytest.raises(ConfigError, match="takes two ranks or more"):
        [*doctor._requested_checks(_arguments("--all-reduce"))[0]]
    where = {"master": "127.0.0.1", "backend": "gloo", "interface": "lo", "sizes_mb": [1, 9]}
    measured = host_probe.all_reduce(0, 2, 2, port=host_probe.machine(".")["free_port"], limit=60, **where)
    rows = [TimingRow(*row) for row in measured["rows"]]
    assert [row.size_mb for row in rows] == [1, 9] and rows[1].seconds > rows[0].seconds > 0
    lonely = host_probe.all_reduce(0, 1, 2, port=host_probe.machine(".")["free_port"], limit=0.5, **where)
    assert lonely == {"error": "not done within 0.5 s"}


def _arguments(*argv: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("ssh", "text", "remedy"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", "Permission denied", "ssh-copy-id node1"),
        ("echo 'Host key verification failed.' >&2; exit 255", "Host key", "ssh node1 once by hand"),
        (
            "echo Welcome; echo 'there is no /shared/code'; exit 3",
            "there is no /shared/code",
            "same paths on every host",
        ),
        ("echo Welcome; exit 1", "it hung up", "try by hand: ssh node1 true"),
    ],
)
def test_a_host_that_fails(ssh: str, text: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{ssh}\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(HostFailed, match=text) as caught:
        Host("node1", 1, None, {})
    assert remedy in caught.value.remedy


def test_a_host_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for ssh that runs the command here; a shell that chatters does no harm."""
    (tmp_path / "ssh").write_text('#!/bin/sh\necho "Welcome to node1"\nfor last; do :; done\nexec sh -c "$last"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    host = Host("node1", 1, 2222, {"GLOO_SOCKET_IFNAME": "it's eth0"})
    offset, error = host.clock_offset()
    assert abs(offset) <= error + 1e-3 < 1
    there = host.ask("software", packages=["torch", "no-such-package"])
    assert there == host_probe.software(["torch", "no-such-package"]) and there["no-such-package"] is None
    assert host.ask("machine", run_dir=str(tmp_path / "away/run"))["free"] > 0
    assert host.ask("route", to="127.0.0.1")["interface"] == "lo"
    with pytest.raises(HostFailed, match="KeyError: 'nonsense'"):
        host.ask("nonsense")
    host.close()


def test_requests_need_no_torch() -> None:
    """They are answered quickly, and where packages are missing."""
    code = (
        "import sys; import tinygptv_ds.doctor.host_probe, tinygptv_ds.doctor.hosts; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
