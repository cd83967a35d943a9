"""The verb `train`: a stage under DeepSpeed's launcher, checked before, supervised, and restarted where that helps."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.arguments import hyphenated
from tinygptv_ds.config.hostfile import passed_on, read_hostfile
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.console import print_to_stderr
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.checkpoint.folders import newest_step
from tinygptv_ds.train.launcher import machine
from tinygptv_ds.train.launcher.options import LaunchOptions, parse_options
from tinygptv_ds.train.launcher.supervisor import RemoteRanks, Supervisor
from tinygptv_ds.train.liveness.launchers import LAUNCHER_PID, LOST
from tinygptv_ds.train.setup.job import has_gpu, job_run_dir, parse_job, shown_path, stage_parser
from tinygptv_ds.train.setup.options import encode_options

STAGES = ("stage1", "stage2", "stage3", "stage4")
_PLAIN_PATH = r"[\w@%+=:,./-]"
_IN_QUOTES = r"[^$`\"\\!]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage; everything after it is passed on."""
    parser.add_argument("stage", choices=STAGES, help="the stage to train")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="options of the stage and of DeepSpeed's launcher, in any order (train stage1 --help lists them)",
    )


def run(args: argparse.Namespace) -> None:
    """Train, and exit with the run's code."""
    sys.exit(Launch(args.stage, parse_options(args.options)).run())


class Launch:
    """A stage to start, and to start again.

    Args:
        stage: "stage1" to "stage4".
        options: the launcher's and the stage's.

    Raises:
        ConfigError: a mistake in options, recipe or environment, found before anything is started.
    """

    def __init__(self, stage: str, options: LaunchOptions) -> None:
        self._options, self._script = options, project_root() / "stages" / f"{stage}.py"
        self._env = machine.launch_environment()
        recipe = self._script.with_suffix(".yaml")
        self._args = stage_parser(shown_path(recipe)).parse_args(hyphenated(options.stage))
        hostfile = options.launcher.get("--hostfile")
        self._hosts = None
        if hostfile is not None:
            self._hosts = read_hostfile(Path(hostfile))
            options.launcher["--hostfile"] = str(Path(hostfile).absolute())
        self._over_pdsh = self._hosts is not None and "--no_ssh" not in options.launcher
        visible = machine.name_gpus(options, self._env)
        if self._hosts is None and not has_gpu():  # otherwise every process of DeepSpeed warns that it has found none
            self._env.setdefault("DS_ACCELERATOR", "cpu")
        if "DS_ACCELERATOR" in self._env:
            os.environ["DS_ACCELERATOR"] = self._env["DS_ACCELERATOR"]
        self._recipe = load_recipe(self._args.recipe, self._args.set)
        if self._hosts is None:
            parse_job(options.stage, recipe)
            machine.choose_port(options)
        self._run_dir = job_run_dir(self._args, self._recipe)
        options.launcher.setdefault("--log_level", "critical")  # its messages at the end of a run repeat the ranks'
        options.launcher.setdefault("--master_port", "29500")
        self._env[LAUNCHER_PID] = str(os.getpid())
        self._encoded = encode_options(options.stage, os.getcwd(), visible)  # noqa: PTH109 - as a text
        self._folder = self._folder_for_pdsh() if self._over_pdsh else os.getcwd()  # noqa: PTH109

    def run(self) -> int:
        """Start the stage, as often as `--restarts` allows and it makes progress; return the last exit code."""
        for attempt in range(self._options.restarts + 1):
            before = newest_step(self._run_dir)
            code = self._start()
            if code != LOST or attempt == self._options.restarts:
                return code
            after = newest_step(self._run_dir)
            if after <= before:
                print_to_stderr(
                    "not started again: no checkpoint was written since the last start, so it would end the same way"
                )
                return code
            if not self._use_hosts_that_answer():
                return code
            print_to_stderr(f"restart {attempt + 1} of {self._options.restarts}, from step {after}")
        return LOST

    def _start(self) -> int:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *self._options.words()]
        remote = None
        if self._over_pdsh and self._hosts:
            ssh_port = self._options.launcher.get("--ssh_port")
            port = self._options.number("--master_port", 29500)
            remote = RemoteRanks(list(self._hosts), port, f"/stages/{self._script.name}", ssh_port, self._env)
        supervisor = Supervisor([*command, str(self._script), self._encoded], self._env, self._folder, remote)
        code = supervisor.run()
        if code != 0 or self._args.dry_run or self._args.evaluate_only or (self._run_dir / "model").exists():
            return code
        if supervisor.stopped_by is not None:
            return 128 + supervisor.stopped_by
        print_to_stderr(
            f"error: the ranks have ended, and {self._run_dir} holds no model: their launcher was killed. {_AGAIN}"
        )
        return LOST

    def _folder_for_pdsh(self) -> str:
        """Return a working directory for DeepSpeed's launcher, which passes it through a shell unquoted.

        The ranks enter the real one themselves.
        """
        machine.check_for_shell({"the repository": str(self._script), "Python": sys.executable}, _PLAIN_PATH)
        machine.check_for_shell(passed_on(), _IN_QUOTES)
        here = os.getcwd()  # noqa: PTH109
        try:
            machine.check_for_shell({"": here}, _PLAIN_PATH)
        except ConfigError:
            own = Path(here) / self._env.get("DS_ENV_FILE", ".deepspeed_env")
            if own.is_file():
                self._env["DS_ENV_FILE"] = str(own)
            return "/"
        return here

    def _use_hosts_that_answer(self) -> bool:
        """Leave out hosts that are down; return whether the rest can train."""
        if not self._over_pdsh or not self._hosts:
            return True
        up = machine.hosts_that_answer(self._hosts, self._options.launcher.get("--ssh_port"))
        if len(up) == len(self._hosts):
            return True
        down = sorted(self._hosts.keys() - set(up))
        hosts = {host: slots for host, slots in self._hosts.items() if host in up}
        try:
            if not hosts:
                raise ConfigError("no host answers")
            self._recipe.train.accumulation(sum(hosts.values()))
        except ConfigError as error:
            print_to_stderr(f"not started again without {', '.join(down)}: {error}")
            return False
        print_to_stderr(f"{', '.join(down)} cannot be reached over ssh and left out")
        self._hosts = hosts
        self._options.launcher["--hostfile"] = str(_write_hostfile(hosts))
        return True


_AGAIN = "Start the same command again to resume"


def _write_hostfile(hosts: Mapping[str, int]) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="hostfile-", delete=False) as file:
        file.write("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    return Path(file.name)
