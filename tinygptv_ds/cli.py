"""The command line: the verbs of `tinygptv-ds`, and how commands end when something is wrong.

Nothing but the standard library is imported here, so that the verb `doctor` and every error message work in an
environment in which packages are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType
from typing import NoReturn

from tinygptv_ds import __version__
from tinygptv_ds.arguments import hyphenated
from tinygptv_ds.console import open_missing_streams, print_to_stderr
from tinygptv_ds.errors import ConfigError, Finished, Stopped, TinyGPTVError, disk_problem
from tinygptv_ds.processes import note_exit_code, own_rank
from tinygptv_ds.resources import is_clone, project_root

USER_ERROR = 2
# Name of the verb: (help, module with `add_arguments` and `run`), in the order in which a user meets them.
VERBS = {
    "doctor": ("check what this machine offers, what is missing and how to get it", "tinygptv_ds.doctor.local"),
    "prepare": ("turn a dataset's own files into shards", "tinygptv_ds.data.prepare.prepare"),
    "convert-laion": (
        "convert LAION's caption JSON to the TSV that img2dataset reads",
        "tinygptv_ds.data.prepare.convert_captions",
    ),
    "convert-cc-sbu": (
        "convert CC/SBU's caption JSON to the TSV that img2dataset reads",
        "tinygptv_ds.data.prepare.convert_captions",
    ),
    "index": ("build the indexes of shards that will be read from elsewhere", "tinygptv_ds.data.shards.make_indexes"),
    "check-data": (
        "check a recipe's data: what is there, whether it can train, and how much it is",
        "tinygptv_ds.data.checks.check_data",
    ),
    "preview": ("write a page of samples as the model will see them", "tinygptv_ds.data.checks.preview"),
    "stream": ("print the samples of a run, one JSON line each", "tinygptv_ds.data.checks.show_stream"),
    "estimate": (
        "estimate memory, time and disk of a recipe before any GPU is used",
        "tinygptv_ds.estimate.estimate",
    ),
    "features": (
        "run the frozen ViT and Q-Former over a recipe's images once, to train from their outputs",
        "tinygptv_ds.features.compute",
    ),
    "finetune": (
        "fine-tune a model on your own data: one command from a JSON file to a scored model",
        "tinygptv_ds.finetune.finetune",
    ),
    "train": ("train a stage through the DeepSpeed launcher", "tinygptv_ds.train.launch"),
    "eval": ("score a model on benchmarks or held-out shards", "tinygptv_ds.evaluation.cli"),
    "report": ("write a page about a run, or one that compares several", "tinygptv_ds.apps.report.report"),
    "inspect": (
        "report what a file or folder of weights is, and whether it is complete",
        "tinygptv_ds.weights.inspect",
    ),
    "convert": ("convert weights of any layout to safetensors in another one", "tinygptv_ds.weights.convert"),
    "export": (
        "write a run's model for inference, as an adapter, or for the original's code",
        "tinygptv_ds.weights.export.export",
    ),
    "chat": ("chat with a model about images, in the terminal", "tinygptv_ds.apps.chat"),
    "answer": ("answer a file of questions about images, on one rank or many", "tinygptv_ds.apps.answer"),
    "serve": ("serve OpenAI's chat API over HTTP, with images", "tinygptv_ds.apps.serve.serve"),
    "demo": ("open a web page to chat with the model about an image", "tinygptv_ds.apps.demo.demo"),
}
_PASS_ON = ("train",)  # its options belong to other programs, which read them themselves


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tinygptv-ds VERB ...`."""
    parser = argparse.ArgumentParser(
        prog="tinygptv-ds", description="Train TinyGPT-V, a small vision-language model, on DeepSpeed, and use it."
    )
    parser.add_argument("--version", action="version", version=f"tinygptv_ds {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = argv[0].replace("_", "-") if argv else ""
    argv = [asked, *(argv[1:] if asked in _PASS_ON else hyphenated(argv[1:]))] if argv else argv
    for name, (help_text, module) in VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if name == asked:  # the others may need packages that are missing here, which `doctor` reports
            implementation = import_module(module)
            implementation.add_arguments(verb)
            verb.set_defaults(run=implementation.run)
    args = parser.parse_args(argv)
    run_command(lambda: args.run(args))


def run_command(command: Callable[[], None]) -> None:
    """Call `command`; an error that the user can fix ends in one message on stderr and exit code 2, without traceback.

    A run that a signal stopped before it was finished exits with 128 + the signal's number.

    Of several ranks only rank 0 prints, and after a moment the first one of another node. The others wait before they
    exit, because the launcher ends all ranks as soon as one has exited.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that has not all letters gets escapes for them
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_working_directory()
        _check_docstrings()
        command()
        note_exit_code(0)
    except TinyGPTVError as error:
        _end_with_error(str(error))
    except Finished as finished:
        if own_rank() == 0:
            print(finished, flush=True)
    except Stopped as stop:
        if own_rank() == 0:
            print_to_stderr(f"stopped: {stop}")
        note_exit_code(stop.code)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(stop.code)
    except KeyboardInterrupt:
        if own_rank() == 0:
            print_to_stderr("stopped: interrupted by Ctrl-C")
        sys.exit(130)
    except BrokenPipeError:  # e.g. "| head" has read enough
        os._exit(0)
    except OSError as error:
        message = disk_problem(error)
        if message is None:
            raise
        _end_with_error(message)


def _check_working_directory() -> None:
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise ConfigError(f"the working directory cannot be used ({error.strerror}); cd into one that exists") from None


def _check_docstrings() -> None:
    if sys.flags.optimize > 1:  # transformers builds some from others while it is imported, and fails
        raise ConfigError(
            "PYTHONOPTIMIZE=2, or python -OO, removes the docstrings that transformers needs; set it to 1, or unset it"
        )


def _end_with_error(message: str) -> NoReturn:
    rank = own_rank()
    if rank != 0:
        time.sleep(5)  # until the launcher ends this process, because rank 0 has printed the same and exited
    # Else nothing would be printed on a node without rank 0, or where RANK is left over and no rank 0 exists.
    if rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0":
        print_to_stderr(f"error: {message}")
    # Threads of the process group or of the loader must neither delay the exit nor print during it.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(USER_ERROR)


def _explain_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace the traceback of a missing third-party package by one line: the wrong Python is in use."""
    if isinstance(error, KeyboardInterrupt):  # while modules were still being imported
        if own_rank() == 0:
            print_to_stderr("stopped: interrupted by Ctrl-C")
        return
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not missing or missing == "tinygptv_ds":
        sys.__excepthook__(kind, error, trace)
        return
    environment = project_root() / ".venv"
    if is_clone() and (environment / "bin/python").exists() and sys.prefix != str(environment):
        remedy = f"activate the project's environment: source {environment}/bin/activate"
    elif is_clone():
        remedy = f"set up the project's environment: cd {project_root()} && source launch/setup.sh requirements.txt"
    else:
        remedy = f"install it: {sys.executable} -m pip install {missing}"
    print_to_stderr(f"error: {sys.executable} has no package {missing!r}; {remedy}")
    sys.stdout.flush()
    os._exit(USER_ERROR)


# Scripts (stages/, eval/) import this module first, so that this holds for whatever they import afterwards.
open_missing_streams()
sys.excepthook = _explain_missing_package
