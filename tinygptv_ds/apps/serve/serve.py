"""The command `serve`: a server with OpenAI's chat API, images and streaming."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinygptv_ds.apps.server_args import add_serving_arguments, check_serving_arguments, listen
from tinygptv_ds.errors import require
from tinygptv_ds.log import set_up_logging

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEY_VARIABLE = "TINYGPTV_API_KEY"
_MB = 1_000_000
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    add_serving_arguments(parser, 8000)
    parser.add_argument("--model-name", metavar="NAME", help="the model's name for clients (default: the folder's)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"the key that clients must send (default: ${KEY_VARIABLE}; without one, everyone is served)",
    )
    limits = parser.add_argument_group("limits")
    for option, default, what in (
        ("--max-request-tokens", 1024, "tokens of an answer that a request may ask for"),
        ("--max-images", 8, "images of a request"),
        ("--max-image-mb", 20, "MB of an encoded image"),
        ("--max-megapixels", 40, "million pixels of an image"),
        ("--max-body-mb", 64, "MB of a request"),
        ("--max-batch", 8, "requests answered together"),
        ("--max-waiting", 16, "requests waiting while others are answered"),
    ):
        limits.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    group = parser.add_argument_group("access")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which clients reach the server, in addition to localhost; any other is refused then, as it "
        "always is if --host is this machine; repeatable",
    )
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page whose scripts may use the server, e.g., http://localhost:3000; * for all; repeatable",
    )
    group.add_argument(
        "--allowed-media-domain",
        action="append",
        default=[],
        metavar="HOST",
        help="a host from which images are fetched, and no other; repeatable",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse conversations in another form than the training's (system texts, roles that do not alternate)",
    )
    limits.add_argument("--no-fetch", action="store_true", help="accept images in data URLs only")


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted, or until SIGTERM, after which running answers are finished and the exit code is 0.

    Raises:
        ConfigError: an option is wrong, a package is missing, or the port is taken.
        WeightsError: there is no such model.
    """
    defaults = check_serving_arguments(args, "starlette", "uvicorn", "pydantic")
    for option in ("max_request_tokens", "max_images", "max_image_mb", "max_megapixels", "max_body_mb", "max_batch"):
        require(getattr(args, option) >= 1, f"--{option.replace('_', '-')} must be at least 1")
    require(args.max_waiting >= 0, "--max-waiting must be at least 0")
    api_key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    address = listen(args)
    set_up_logging()

    from tinygptv_ds.apps.serve.readiness import ReadinessServer
    from tinygptv_ds.apps.serve.request_images import ImageLimits
    from tinygptv_ds.apps.serve.routes import Access, Limits, build_app
    from tinygptv_ds.generate.model_args import load_from
    from tinygptv_ds.processing.image import parse_background

    images = ImageLimits(
        args.max_images,
        args.max_image_mb * _MB,
        args.max_megapixels * _MB,
        fetch=not args.no_fetch,
        domains=frozenset(domain.lower() for domain in args.allowed_media_domain),
        background=parse_background(args.background),
    )
    access = Access(api_key, allowed_hosts(args.host, args.allowed_host), tuple(args.cors))
    limits = Limits(args.max_body_mb * _MB, args.max_request_tokens, args.max_waiting, images, args.max_batch)

    def build() -> Starlette:
        answerer = load_from(args, name=args.model_name, show_prompts=args.show_prompt)
        app = build_app(answerer, defaults, limits, access, strict=args.strict)
        print(f"{answerer.name}, template {answerer.template.name}, at http://{args.host}:{args.port}/v1", flush=True)
        if api_key is None and not _is_loopback(args.host):
            print(
                f"anyone who reaches {args.host} is answered: --api-key or ${KEY_VARIABLE} asks for a key", flush=True
            )
        return app

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again after it has shut down
    server = ReadinessServer(build)
    server.run([address])
    if server.error is not None:
        raise server.error


def allowed_hosts(host: str, named: Sequence[str]) -> frozenset[str]:
    """Return the names that the Host header of a request may have; none: any.

    Args:
        host: the address to listen at. If it is not this machine's own, only names that are given restrict the header.
        named: the values of `--allowed-host`.
    """
    if not named and not _is_loopback(host):
        return frozenset()
    return frozenset(name.lower() for name in (*_LOOPBACK, host, *named))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
