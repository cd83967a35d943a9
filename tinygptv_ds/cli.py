"""Running a command so that mistakes show as one readable message, and the `python -m tinygptv_ds` verbs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

from tinygptv_ds import __version__
from tinygptv_ds.errors import Stopped, TinyGPTVError

USER_ERROR = 2
VERBS = {
    "doctor": ("what this machine offers, what is missing and how to get it", "tinygptv_ds.doctor.local"),
    "prepare": ("turn a dataset's own files into shards", "tinygptv_ds.data.prepare.prepare"),
    "stream": ("what a run would be fed, one JSON line a sample", "tinygptv_ds.data.checks.show_stream"),
    "convert_laion": (
        "LAION's caption JSON as the TSV that img2dataset reads",
        "tinygptv_ds.data.prepare.convert_captions",
    ),
    "convert_cc_sbu": (
        "CC/SBU's caption JSON as the TSV that img2dataset reads",
        "tinygptv_ds.data.prepare.convert_captions",
    ),
    "check-data": (
        "what of a recipe's data is there, whether it can train, and how much it is",
        "tinygptv_ds.data.checks.check_data",
    ),
    "preview": ("a page of samples as the model will see them", "tinygptv_ds.data.checks.preview"),
    "index": ("make the indexes of shards that are to be read from elsewhere", "tinygptv_ds.data.shards.index_verb"),
    "features": (
        "run the frozen ViT and Q-Former over a recipe's images once, to train from what they give",
        "tinygptv_ds.features.compute",
    ),
    "estimate": (
        "memory, time and disk that a recipe takes, before any GPU is touched",
        "tinygptv_ds.estimate.estimate",
    ),
    "inspect": ("what a file or folder of weights is, and whether it is whole", "tinygptv_ds.weights.inspect"),
    "convert": ("weights of any layout as safetensors in the one that is wanted", "tinygptv_ds.weights.convert"),
    "export": (
        "write a run's model for inference, as an adapter, or for the original's code",
        "tinygptv_ds.weights.export.export",
    ),
    "chat": ("talk with a model about images, in the terminal", "tinygptv_ds.apps.chat"),
    "answer": ("answer a file of questions about images, on one rank or many", "tinygptv_ds.apps.answer"),
    "serve": ("answer over HTTP, as OpenAI's chat API, with images", "tinygptv_ds.apps.serve.serve"),
    "demo": ("a page to talk with the model about an image", "tinygptv_ds.apps.demo.demo"),
}


def run_command(command: Callable[[], None]) -> None:
    """Call `command`; what the user has to fix ends in one message on stderr and exit code 2, no traceback.

    A run that a signal has stopped, and that is not finished, ends with 128 + the signal's number.

    Among several ranks only rank 0 speaks. The others wait a moment before they leave, since the launcher ends all
    ranks as soon as one has gone.
    """
    try:
        command()
    except TinyGPTVError as error:
        if int(os.environ.get("RANK", 0)) != 0:
            time.sleep(5)
        else:
            _tell(f"error: {error}")
        # Threads of the process group or the loader must not hold up, nor clutter, the way out.
        sys.stdout.flush()
        os._exit(USER_ERROR)
    except Stopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            _tell(f"stopped: {stop}")
        sys.stdout.flush()
        os._exit(stop.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # such as "| head" has seen enough
        os._exit(0)


def _tell(message: str) -> None:
    """On stderr, if there is still someone to read it: the exit code must be the same."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m tinygptv_ds VERB`."""
    parser = argparse.ArgumentParser(prog="python -m tinygptv_ds", description="Tools around the TinyGPT-V trainer.")
    parser.add_argument("--version", action="version", version=f"tinygptv_ds {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    argv = sys.argv[1:] if argv is None else argv
    for name, (help_text, module) in VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        if name in argv:  # the others may need packages that are not there yet, which doctor is to tell
            implementation = import_module(module)
            implementation.add_arguments(verb)
            verb.set_defaults(run=implementation.run)
    args = parser.parse_args(argv)
    run_command(lambda: args.run(args))
