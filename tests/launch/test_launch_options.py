"""What `tinygptv-ds train` makes of options, and what it refuses before it starts anything."""

import os
import re
import socket
import string
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptv_ds import distributed
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.launch import Launch
from tinygptv_ds.train.launcher import machine
from tinygptv_ds.train.launcher import options as options_module
from tinygptv_ds.train.launcher.options import LaunchOptions, parse_options
from tinygptv_ds.train.liveness.launchers import LOST
from tinygptv_ds.train.setup import machine as setup_machine
from tinygptv_ds.train.setup import same_options
from tinygptv_ds.train.setup.job import job_run_dir, stage_parser
from tinygptv_ds.train.setup.machine import check_writable, complete_user
from tinygptv_ds.train.setup.options import decode_options, encode_options

ROOT = Path(__file__).parents[2]
AWKWARD = [
    'text.end_sym="\\n"',
    "costs $5",
    '{"lora":0.1,"norms":0.2}',
    '"###"',
    "a & b; c",
    "~",
    "`date`",
    "*",
    "",
    "%n",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return tmp_path


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(alphabet=string.printable + "é问\udcff", max_size=12), max_size=4))
def test_options_pass_a_remote_shell(words: list[str]) -> None:
    """As pdsh does: all words joined with blanks, read by a shell."""
    words = [*AWKWARD, *words]
    line = f"printf %s {encode_options(words, str(Path.cwd()), {})}"
    passed = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert decode_options(["--local_rank=0", passed]) == ["--local_rank=0", *words]


def test_the_working_directory_comes_along(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "with a $space"
    folder.mkdir()
    word = encode_options([], str(folder), {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert decode_options([word]) == [] and Path.cwd() == folder
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    with pytest.raises(ConfigError, match=r"/not/here cannot be entered on this host \(No such file"):
        decode_options([encode_options([], "/not/here", {})])


def test_the_launchers_options_are_found_anywhere() -> None:
    words = ["--set", "a=b", "--num-gpus", "2", "-H", "f", "--no-ssh-check", "--restarts=3", "-q"]
    found = parse_options(words)
    assert found.launcher == {"--num_gpus": "2", "--hostfile": "f", "--no_ssh_check": "", "--quiet": ""}
    assert found.stage == ["--set", "a=b"] and found.restarts == 3
    assert found.words() == ["--num_gpus=2", "--hostfile=f", "--no_ssh_check", "--quiet"]


def test_every_option_of_deepspeeds_launcher_is_known() -> None:
    """Passed on, or refused with a reason."""
    known = Path(options_module.__file__).read_text()
    (folder,) = find_spec("deepspeed").submodule_search_locations
    theirs = set(re.findall(r'add_argument\(.*?"(--\w+)"', (Path(folder) / "launcher/runner.py").read_text(), re.S))
    assert len(theirs) > 15
    assert {option for option in theirs if f'"{option}"' not in known} == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_gpus"], "--num_gpus needs a value"),
        (["--num_gpus", "two"], "--num_gpus must be a whole number, not 'two'"),
        (["--master_port", "99999"], "--master_port 99999 is no port"),
        (["--restarts", "-1"], "--restarts must be a whole number"),
        (["--num_gpus=1", "--include=localhost:0"], "--include and --num_gpus cannot be combined"),
        (["--no_ssh"], "give --node_rank N"),
        (["--module"], "--module: a stage is a script"),
        (["--autotuning", "run"], "no code for DeepSpeed's autotuner"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(words)


def test_mistakes_are_found_before_anything_starts(
    raw_recipe: Callable[..., dict[str, Any]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(tiny.write_recipe(here / "r.yaml", raw_recipe()))
    (here / "file").touch()
    (here / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    for words, message in [
        (["--hostfile", "none", "--recipe", "x"], "hostfile none cannot be read: No such file"),
        (["--recipe", recipe, "--run-dir", "file"], r"--run-dir file cannot be used: .*file: it is not a folder"),
        (["--recipe", recipe, "--run-dir", "/proc/nope/run"], "--run-dir /proc/nope/run cannot be used: /proc"),
        (["--recipe", recipe, "--set", "optimizer.betas=[0.9, 1.5]"], "optimizer.betas must be two numbers in"),
        (["--recipe", recipe, "--set", "model.phi=" + "x" * 5000], "model.phi: x.* cannot be read .File name too long"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Launch("stage4", parse_options(words))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is taken on .*--master_port \d+"):
            Launch("stage4", parse_options(["--recipe", recipe, f"--master_port={port}"]))
    monkeypatch.setenv("PYTHONFOO", "costs $5")
    with pytest.raises(ConfigError, match=r"PYTHONFOO \(costs \$5\) holds '\$'"):
        Launch("stage4", parse_options(["--recipe", recipe, "--hostfile", "hosts"]))
    Launch("stage4", parse_options(["--recipe", recipe, "--deepspeed"]))  # as scripts for other trainers have it


@pytest.mark.parametrize(
    ("visible", "env", "gpus", "in_ranks"),
    [
        ("-1", {"DS_ACCELERATOR": "cpu"}, None, {}),
        ("", {"DS_ACCELERATOR": "cpu"}, None, {}),
        (" ", {"DS_ACCELERATOR": "cpu"}, None, {}),
        ("NoDevFiles", {"DS_ACCELERATOR": "cpu"}, None, {}),
        ("2, 0", {}, "2", {"CUDA_VISIBLE_DEVICES": "2, 0"}),
        ("3,-1,5", {}, "1", {"CUDA_VISIBLE_DEVICES": "3,-1,5"}),
        ("GPU-8f3a,GPU-11", {}, "2", {"CUDA_VISIBLE_DEVICES": "GPU-8f3a,GPU-11"}),
        ("MIG-77", {}, "1", {"CUDA_VISIBLE_DEVICES": "MIG-77"}),
    ],
)
def test_gpus_by_any_name(
    visible: str,
    env: dict[str, str],
    gpus: str | None,
    in_ranks: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    given, options = {"CUDA_VISIBLE_DEVICES": visible}, LaunchOptions()
    assert machine.name_gpus(options, given) == in_ranks
    assert given == env and options.launcher.get("--num_gpus") == gpus


def test_numbers_of_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher would end in a traceback; a number beyond those of this machine is for torch to report."""
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    given, options = {"CUDA_VISIBLE_DEVICES": "0,1"}, LaunchOptions()
    assert machine.name_gpus(options, given) == {} and not options.launcher
    assert given == {"DS_ACCELERATOR": "cpu"}


def test_gpus_that_cannot_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    odd = ("0-3", "0 1", "all", "none", "0,,1", "0x1", "1e3", "0;x", "٣", "0" * 9000, "cuda:0")
    for visible, options, message in [
        *((each, LaunchOptions(), "names no GPU; give numbers or UUIDs") for each in odd),
        ("0,1,0", LaunchOptions(), "0 is named twice"),
        ("2,3", LaunchOptions({"--num_gpus": "3"}), "--num_gpus 3, but CUDA_VISIBLE_DEVICES names 2"),
        ("MIG-1,MIG-2", LaunchOptions(), "between which NCCL does not"),
        ("GPU-1", LaunchOptions({"--num_gpus": "2"}), "--num_gpus 2, but CUDA_VISIBLE_DEVICES names 1"),
        ("GPU-1", LaunchOptions({"--include": "localhost:0"}), "leave out --include"),
    ]:
        with pytest.raises(ConfigError, match=message):
            machine.name_gpus(options, {"CUDA_VISIBLE_DEVICES": visible})


def test_run_directories_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `~` alone after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parse, recipe = stage_parser(Path("r.yaml")).parse_args, load_recipe("stages/stage1.yaml")
    assert job_run_dir(parse(["--run-dir=~/x", "--dry-run"]), recipe) == tmp_path / "x.dry-run"
    assert job_run_dir(parse([]), recipe) == Path("runs/stage1")
    with pytest.raises(
        ConfigError, match=r"--run-dir s3://b/x: a run directory is a local folder; train.mirror copies"
    ):
        job_run_dir(parse(["--run-dir", "s3://b/x"]), recipe)


@pytest.mark.parametrize(("soft", "hard", "set_to"), [(1024, 10**6, 65_536), (1024, 4096, 4096), (4096, 4096, None)])
def test_open_files(soft: int, hard: int, set_to: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    limited: list[int] = []
    monkeypatch.setattr(setup_machine.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(setup_machine.resource, "setrlimit", lambda _, limits: limited.append(limits[0]))
    setup_machine.raise_open_files()
    assert limited == ([] if set_to is None else [set_to])
    monkeypatch.setattr(setup_machine.resource, "getrlimit", lambda _: (20, 20))
    with pytest.raises(ConfigError, match="may open 20 files, and training needs at least 64: raise the limit"):
        setup_machine.raise_open_files()


def test_two_launches_at_once_have_two_ports() -> None:
    """No rank listens for seconds, so that the usual port looks free to both."""
    first, second = LaunchOptions(), LaunchOptions()
    machine.choose_port(first)
    machine.choose_port(second)
    ports = {options.launcher["--master_port"] for options in (first, second)}
    assert len(ports) == 2 and "29500" not in ports


def test_the_ranks_of_another_launcher_are_left_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes' training operators set them in every pod."""
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert not names.keys() & (machine.launch_environment().keys() | os.environ.keys())


def test_files_of_the_working_directory_are_no_modules(here: Path) -> None:
    """DeepSpeed's launcher is started with "python -m", and what a rank starts knows nothing of the remedy."""
    (here / "random.py").write_text("raise SystemExit('not this one')")
    env = machine.launch_environment()
    done = subprocess.run([sys.executable, "-m", "tempfile"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rank = (
        "import os; from tinygptv_ds.train.setup.machine import leave_safe_path as leave; "
        "leave(); print('PYTHONSAFEPATH' in os.environ)"
    )
    for value, left in ((env["PYTHONSAFEPATH"], "False\n"), ("1", "True\n")):
        env = {**os.environ, "PYTHONSAFEPATH": value, "PYTHONPATH": str(ROOT)}
        assert subprocess.run([sys.executable, "-c", rank], env=env, capture_output=True, text=True).stdout == left


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = socket.if_nameindex()[0][1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", there)
    setup_machine.check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{there},nosuch0")
    with pytest.raises(ConfigError, match=f"names nosuch0, which .* has not; it has {there}"):
        setup_machine.check_interface()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "abc"}, "environment variable RANK is 'abc', no number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "environment variable WORLD_SIZE is '-1', no number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK 3 of WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK 2 of 2"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "x"}, None),  # left over: RANK is what makes a rank
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),
    ],
)
def test_ranks_of_the_environment(
    env: dict[str, str], message: str | None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if message is None:
        assert distributed.ranks_from_env().world_size == (4 if env["WORLD_SIZE"] == "4" else 1)
        return
    with pytest.raises(ConfigError, match=message):
        distributed.ranks_from_env()


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_do_not_know_where_to_meet(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234", missing: ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"RANK is set, but not {missing}"):
        distributed.complete_env()


def test_a_shell_on_the_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that was typed is a process of this host; its words are not those that came."""
    typed = ["python", "bin/deepspeed", "--master_port=1234", "--hostfile", "h", "launch/stage4.sh", "--set", 'a="\\n"']
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setattr(sys, "argv", ["/repo/stages/stage4.py"])
    monkeypatch.setattr(same_options, "_commands", lambda: [typed])
    same_options.check_typed_options(["--local_rank=0", "--set", 'a="\\n"'])
    with pytest.raises(ConfigError, match=r"not those that were typed: '--set a=n'.*bash launch/stageN.sh"):
        same_options.check_typed_options(["--local_rank=0", "--set", "a=n"])
    monkeypatch.setenv("MASTER_PORT", "4321")  # another run's command
    same_options.check_typed_options(["--local_rank=0", "--set", "a=n"])


class Starts:
    """Stands in for starts of a launch: exit codes, and the checkpoint that each of them leaves."""

    def __init__(self, run_dir: Path, *ends: tuple[int, int]) -> None:
        self.run_dir, self.ends, self.count = run_dir, ends, 0

    def __call__(self) -> int:
        code, step = self.ends[self.count]
        self.count += 1
        if step:
            (self.run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        return code


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ([(LOST, 5), (LOST, 9), (0, 12)], 0, 3),  # progress each time
        ([(LOST, 5), (LOST, 9), (LOST, 11), (0, 0)], LOST, 3),  # --restarts 2
        ([(LOST, 0), (0, 0)], LOST, 1),  # no checkpoint: it would end the same way
        ([(LOST, 5), (LOST, 0), (0, 0)], LOST, 2),
        ([(2, 5), (0, 0)], 2, 1),  # a mistake recurs
        ([(1, 5), (0, 0)], 1, 1),
        ([(143, 5), (0, 0)], 143, 1),  # stopped on purpose
        ([(130, 5), (0, 0)], 130, 1),
    ],
)
def test_restarts(
    ends: list[tuple[int, int]],
    code: int,
    starts: int,
    raw_recipe: Callable[..., dict[str, Any]],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = str(tiny.write_recipe(here / "r.yaml", raw_recipe()))
    launch = Launch("stage4", parse_options(["--recipe", recipe, "--run-dir", "run", "--restarts=2"]))
    stand_in = Starts(here / "run", *ends)
    monkeypatch.setattr(launch, "_start", stand_in)
    assert launch.run() == code and stand_in.count == starts


def test_hosts_that_are_down_are_left_out(
    raw_recipe: Callable[..., dict[str, Any]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the batch of 8 still divides: among node1 and node3, but not among three ranks."""
    ssh = here / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\ncase "$*" in *"node2 true") exit 255 ;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    recipe = str(tiny.write_recipe(here / "r.yaml", raw_recipe(train__micro_batch_size=1)))
    for others, starts, code in (("node3 slots=1\n", 2, 0), ("node3 slots=2\n", 1, LOST)):
        run = here / f"run{starts}"
        (here / "hosts").write_text("node1 slots=1\nnode2 slots=2\n" + others)
        words = ["--recipe", recipe, "--run-dir", str(run), "--restarts=1", "--hostfile", "hosts"]
        launch = Launch("stage4", parse_options(words))
        stand_in = Starts(run, (LOST, 5), (0, 7))
        monkeypatch.setattr(launch, "_start", stand_in)
        assert launch.run() == code and stand_in.count == starts
        if starts == 2:
            left = Path(launch._options.launcher["--hostfile"])
            assert left.read_text() == "node1 slots=1\nnode3 slots=1\n"


def test_a_user_without_home_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygptv_ds.files import cache_home

    for name in ("HOME", "USER", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_home() == tmp_path / "tinygptv_ds-987654"
    complete_user()
    assert os.environ["USER"] == "user-987654" and Path(os.environ["HOME"]).is_dir()


def test_a_run_directory_leaves_no_trace_of_the_check(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []
