"""A stage's command line, checked as far as it can be without torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygptv_ds.arguments import hyphenated
from tinygptv_ds.config.deepspeed import load_deepspeed_json, precision, resolve_deepspeed, zero_stage
from tinygptv_ds.config.deepspeed_rules import check_machine
from tinygptv_ds.config.load import load_recipe, recipe_dict
from tinygptv_ds.config.paths import expand_user
from tinygptv_ds.config.quantization import check_frozen_bits
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.distributed import Ranks, ranks_from_env
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import hold_library_output
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.liveness.launchers import Launchers
from tinygptv_ds.train.liveness.start_up import end_without_launcher
from tinygptv_ds.train.setup.finished import check_finished
from tinygptv_ds.train.setup.machine import (
    check_accelerator,
    check_interface,
    check_kinds,
    check_port,
    check_writable,
    complete_user,
    gpus_are_hidden,
    leave_safe_path,
    raise_open_files,
)
from tinygptv_ds.train.setup.options import decode_options
from tinygptv_ds.train.setup.same_options import check_typed_options

if TYPE_CHECKING:
    import torch

    from tinygptv_ds.evaluation.benchmarks.question import Task

DRY_STEPS = 2
DRY_SUFFIX = ".dry-run"


@dataclass(frozen=True)
class Job:
    """What a stage script works from.

    Attributes:
        recipe: the checked recipe.
        deepspeed: the JSON for DeepSpeed, complete.
        run_dir: everything the run writes.
        resume: "auto" resumes from the newest whole checkpoint of the run directory, "never" does not; else the path of
            a checkpoint.
        ranks: who this process is.
        dry_run: stop after `DRY_STEPS` steps and leave nothing behind.
        resume_anyway: resume although recipe, data or base weights differ from the checkpoint's.
        scored: what `recipe.evaluation` names, with its questions.
        evaluate_only: measure the weights that the run starts or resumes from, and train nothing.
        launchers: the processes that have started this one.
    """

    recipe: Recipe
    deepspeed: dict[str, Any]
    run_dir: Path
    resume: str
    ranks: Ranks
    dry_run: bool = False
    resume_anyway: bool = False
    scored: Sequence[Task] = ()
    evaluate_only: bool = False
    launchers: Launchers = field(default_factory=Launchers)

    @property
    def last_step(self) -> int:
        """Optimizer steps after which the run ends."""
        total = self.recipe.train.total_steps
        return min(DRY_STEPS, total) if self.dry_run else total

    @property
    def precision(self) -> str:
        """ "bf16", "fp16" or "fp32"."""
        return precision(self.deepspeed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights, that of `precision`; imports torch."""
        from tinygptv_ds.dtypes import DTYPES

        return DTYPES[self.precision]

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage."""
        return zero_stage(self.deepspeed)

    def settings(self) -> dict[str, Any]:
        """Return the recipe, the JSON and the options that must be equal on all ranks, by dotted key."""
        found: dict[str, Any] = {"--run-dir": str(self.run_dir), "--resume": self.resume, "--dry-run": self.dry_run}
        for section, values in (recipe_dict(self.recipe) | {"deepspeed": self.deepspeed}).items():
            if isinstance(values, dict):
                found |= {f"{section}.{key}": value for key, value in values.items()}
            else:
                found[section] = values
        found.pop("data.cache_dir")  # a local disk of each node
        return found


def stage_parser(recipe: Path) -> argparse.ArgumentParser:
    """Return the parser of a stage script whose default recipe is `recipe`."""
    script = f"launch/{recipe.stem}.sh"
    parser = argparse.ArgumentParser(
        prog=script,
        description=f"Train {recipe.stem} of TinyGPT-V.",
        epilog=f"Start it with 'deepspeed {script} [options]' or 'bash {script} [options]'; the launcher's own options "
        "(--num_gpus, --hostfile, --include, --master_port, ...) go before the script in the first form and anywhere "
        "in the second, which also takes --restarts N: start a run that has lost a rank again from its newest "
        "checkpoint, at most N times.",
    )
    parser.add_argument(
        "--recipe", type=Path, default=recipe, metavar="FILE", help="the stage's YAML (default: %(default)s)"
    )
    parser.add_argument(
        "--deepspeed-config",
        type=Path,
        metavar="FILE",
        help="the JSON of the engine (default: ds_configs/zero2_bf16.json with a GPU, ds_configs/cpu.json without)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of the recipe, e.g. --set train.batch_size=32 or --set data.datasets.0.weight=2; "
        "deepspeed.KEY changes the JSON; may be given any number of times",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="where the run is written (default: runs/stageN)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|never",
        help="auto: resume from the run directory's newest whole checkpoint, if any; PATH: from this checkpoint, which "
        "may be another run's or in DeepSpeed's format; never: refuse a run directory with checkpoints",
    )
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        help="resume although recipe, data or base weights differ from the checkpoint's; the log says in what",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, run two real steps, save, report time, memory and what a run would write, and leave "
        "nothing behind",
    )
    parser.add_argument(
        "--evaluate-only",
        action="store_true",
        help="measure validation loss, scores and sample panel of the run directory's newest checkpoint, of the one "
        "that --resume names, or else of the recipe's own weights (model.init_from), and train nothing",
    )
    # Scripts written for other trainers pass it, alone or with the JSON.
    parser.add_argument("--deepspeed", nargs="?", const=None, default=None, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return parser


def parse_job(argv: Sequence[str] | None, recipe: Path) -> Job:
    """Read and check everything that a stage needs.

    Args:
        argv: the command line; None takes the process's own.
        recipe: the stage's own recipe.

    Raises:
        SystemExit: with `--help`.
        Finished: the run directory holds a finished run of this recipe.
        ConfigError: anything the user has to fix: recipe, JSON, missing weights or data, a run directory in use.
    """
    launchers = Launchers.above()
    end_without_launcher(launchers)
    if argv is None:
        check_typed_options(sys.argv[1:])
    given = decode_options(sys.argv[1:] if argv is None else argv)
    args = stage_parser(shown_path(recipe)).parse_args(hyphenated(given))
    check_accelerator()
    check_interface()
    leave_safe_path()
    complete_user()
    raise_open_files()
    loaded = load_recipe(args.recipe, args.set)
    if not has_gpu():  # otherwise every process of DeepSpeed warns that it has found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks = ranks_from_env()
    json_path = args.deepspeed_config or args.deepspeed or default_deepspeed_json()
    resolved = resolve_deepspeed(load_deepspeed_json(json_path), loaded, ranks.world_size, str(json_path))
    check_machine(resolved, has_gpu=has_gpu(), source=str(json_path))
    check_frozen_bits(loaded.model, resolved, str(json_path))
    run_dir = job_run_dir(args, loaded)
    if args.dry_run and args.evaluate_only:
        raise ConfigError("--dry-run is of a training, --evaluate-only of none: choose one")
    check_kinds(run_dir)
    if args.evaluate_only:
        _check_measured(loaded)
        _check_resume(run_dir, args.resume)
    elif not args.dry_run:
        check_finished(run_dir, loaded, args.resume)
        _check_resume(run_dir, args.resume)
    hold_library_output()  # what their import warns of belongs into the log file
    # Imported here because the readers of datasets and benchmarks load numpy: mistakes in the recipe come before.
    from tinygptv_ds.train.setup.preflight import check_and_open_benchmarks, check_mirror
    from tinygptv_ds.train.trackers.opening import check_trackers

    scored = check_and_open_benchmarks(loaded)
    check_trackers(loaded)
    if ranks.is_main:
        check_writable(run_dir)
        check_port()
        if not args.evaluate_only:
            check_mirror(loaded)
    resume = "never" if args.dry_run else args.resume
    return Job(
        recipe=loaded,
        deepspeed=resolved,
        run_dir=run_dir,
        resume=resume,
        ranks=ranks,
        dry_run=args.dry_run,
        resume_anyway=args.resume_anyway,
        scored=scored,
        evaluate_only=args.evaluate_only,
        launchers=launchers,
    )


def job_run_dir(args: argparse.Namespace, recipe: Recipe) -> Path:
    """Return the run directory that a stage's parsed options name."""
    if args.run_dir is not None and "://" in args.run_dir:
        raise ConfigError(
            f"--run-dir {args.run_dir}: a run directory is a local folder; train.mirror copies checkpoints and model/ "
            "to object storage"
        )
    run_dir = expand_user(args.run_dir or f"runs/stage{recipe.stage}")
    return run_dir.with_name(run_dir.name + DRY_SUFFIX) if args.dry_run else run_dir


def default_deepspeed_json() -> Path:
    """ZeRO-2 in bf16 where the driver shows a GPU, else the CPU's; known without importing torch."""
    return project_root() / "ds_configs" / ("zero2_bf16.json" if has_gpu() else "cpu.json")


def has_gpu() -> bool:
    """Return whether the driver shows a GPU, and the environment does not hide it."""
    if gpus_are_hidden():
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _check_resume(run_dir: Path, resume: str) -> None:
    if resume == "never" and any((run_dir / "checkpoints").glob("step-*")):
        raise ConfigError(f"{run_dir} holds checkpoints; choose another --run-dir, or --resume auto to use them")
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise ConfigError(f"--resume {resume}: there is no such folder; give auto, never, or the path of a checkpoint")


def _check_measured(recipe: Recipe) -> None:
    if not (recipe.data.has_validation or recipe.evaluation.benchmarks):
        raise ConfigError(
            "--evaluate-only: the recipe names nothing to measure; name datasets in data.validation, hold samples back "
            "with data.validation_share, or name what is scored in evaluation.benchmarks"
        )


def shown_path(path: Path) -> Path:
    """Return a path relative to the working directory where it is below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
