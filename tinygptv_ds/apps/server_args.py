"""Command-line arguments that `serve` and `demo` share: their address, and the packages that they need."""

from __future__ import annotations

import argparse
import importlib.util
import socket

from tinygptv_ds.errors import ConfigError, require
from tinygptv_ds.generate.model_args import add_model_arguments, check_model_arguments
from tinygptv_ds.generate.settings import Generation, add_generation_arguments, generation_from
from tinygptv_ds.resources import is_clone


def add_serving_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the arguments of the model, the address and generation."""
    add_model_arguments(parser)
    group = parser.add_argument_group("address")
    group.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: every network (default: %(default)s, this machine)"
    )
    group.add_argument("--port", type=int, default=port, metavar="N", help="(default: %(default)s)")
    add_generation_arguments(parser)


def check_serving_arguments(args: argparse.Namespace, *packages: str) -> Generation:
    """Check all that can be checked without torch, and return the settings of generation.

    Raises:
        TinyGPTVError: one of `packages` is not installed, there is no such model, or a value is out of range.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    how = "pip install -r requirements-app.txt" if is_clone() else "pip install 'tinygptv_ds[app]'"
    require(not missing, f"this needs {' and '.join(missing)}, not installed here: {how}")
    check_model_arguments(args)
    require(0 < args.port < 65536, f"--port must be from 1 to 65535, not {args.port}")
    return generation_from(args)


def listen(args: argparse.Namespace) -> socket.socket:
    """Open a socket at the address, so that a taken one is reported before the model is loaded.

    Raises:
        ConfigError: another program uses the address, or it is not one of this machine's.
    """
    try:
        family = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{args.host}:{args.port} is not available ({error}); choose another --port or --host"
        ) from None
